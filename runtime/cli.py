"""The command line of the scripts: a flag for each field of a config, and one line for each error."""

import argparse
import errno
import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

from config import PRESETS, ClassifierConfig, DataConfig, EvaluateConfig, PromptConfig, defaults
from runtime.errors import BadInput, Finished, Stopped, print_error

# fields that do not change the result, or only its rounding and what dropout drops
SAME_RESULT = ("force", "resume", "device", "report_to", "micro_batch_size", "compile", "out")
SAME_RESULT += ("keep", "save_share", "sample_every", "sample_prompts")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def parse(cls, argv=None):
    """Return the config of a run: the defaults of its preset, overridden by the flags in argv (None: sys.argv).

    Raises BadInput for an unknown flag, a value of the wrong type or one out of range.
    """
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="gpt2", choices=PRESETS)
    first.add_argument("--init_from", default="")
    given, _ = first.parse_known_args(argv)
    default = defaults(cls, given.preset, given.init_from)
    parser = Parser(description=inspect.getdoc(cls), allow_abbrev=False)
    for f in fields(cls):
        value = getattr(default, f.name)
        text = f"{comment(cls, f.name)} (default: {value!r})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=value, help=text, **options(f.type))
    values = vars(parser.parse_args(argv))
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def options(kind):
    """Return the arguments of add_argument for a field of this type."""
    choices = get_args(kind)
    if kind is bool:
        return {"nargs": "?", "const": True, "type": boolean, "metavar": "True|False"}
    if choices and kind.__origin__ is tuple:
        return {"nargs": "+", "type": choices[0], "metavar": choices[0].__name__.upper()}
    return {"choices": choices} if choices else {"type": kind, "metavar": kind.__name__.upper()}


def boolean(text):
    if text not in ("True", "False"):
        raise ValueError
    return text == "True"


def comment(cls, name):
    """Return the comment beside a field in config.py."""
    config = Path(inspect.getfile(cls)).read_text(encoding="utf-8")
    for base in cls.__mro__[:-1]:
        body = re.search(rf"^class {base.__name__}\b.*?(?=^@|\Z)", config, re.MULTILINE | re.DOTALL)[0]
        if field := re.search(rf"^    {name}: .*?  # (.*)$", body, re.MULTILINE):
            return field[1]
    raise KeyError(name)


def differing(cfg, other):
    """Return the fields that change results and differ in `other`, a dict from JSON, as ["name old -> new"].

    A field that `other` does not have, since an earlier version wrote it, counts as the default of the preset.
    """
    default = vars(defaults(type(cfg), cfg.preset, getattr(cfg, "init_from", "")))
    changes = [(name, other.get(name, default[name]), value) for name, value in vars(cfg).items()]
    return [f"{name} {old!r} -> {new!r}" for name, old, new in changes if name not in SAME_RESULT and old != new]


def evaluation(cfg):
    """Return the command that evaluates the policy of a run of ppo.py or dpo.py: with its models and prompts."""
    preset = vars(defaults(EvaluateConfig, cfg.preset))
    shared = {f.name for part in (DataConfig, ClassifierConfig, PromptConfig) for f in fields(part)} & vars(cfg).keys()
    if not getattr(cfg, "judge", ""):
        shared -= {"judge", "judge_positive_label"}
    values = {"before": cfg.policy} | {name: value for name, value in vars(cfg).items() if name in shared}
    changed = {"after": cfg.out} | {name: value for name, value in values.items() if value != preset[name]}
    words = ["python", "evaluate.py", "--preset", cfg.preset]
    words += [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def run(main, cls):
    """Parse the flags and call main(cfg). Report BadInput, a full disk and signals in one line, with an exit status.

    Prints UTF-8, whatever the code page of the console is, and line by line, also into a file or a pipe.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # as in pythonw
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        main(parse(cls))
    except Finished as finished:
        print(finished)
    except BadInput as error:
        sys.exit(print_error(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        resume = "; --resume resumes from the latest checkpoint" if hasattr(cls, "keep") else ""
        sys.exit(print_error(f"the disk is full: {error}{resume}"))
    except Stopped as stop:
        print("stopped; --resume resumes the run", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
