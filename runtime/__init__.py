"""How a run is carried out: command line, devices, processes, checkpoints, the Hugging Face hub, logs, optimizers.

Each script imports this package first, so that the following runs before torch is imported. It and the scripts must
parse on an old Python, here 3.8, which would otherwise print a syntax error.
"""

import logging
import os
import platform
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    print(f"error: Python 3.11 or newer is needed, this is Python {platform.python_version()}", file=sys.stderr)
    sys.exit(2)

# On Windows, MKL's Fortran library would otherwise end the process at Ctrl-C, before a checkpoint is saved.
os.environ.setdefault("FOR_DISABLE_CONSOLE_CTRL_HANDLER", "1")
# On macOS, PyTorch would print a note on what it cannot do with the output of processes that are not started here.
logging.getLogger("torch.distributed.elastic.multiprocessing.redirects").setLevel(logging.ERROR)
