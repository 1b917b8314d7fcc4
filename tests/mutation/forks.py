"""Run pytest many times on changed copies of the repository, in forks of a process that has imported torch.

A run takes .1 to .3 s longer than its tests; in a new process, the imports alone would take 5 s.
"""

import contextlib
import gc
import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT, TIMEOUT_FACTOR = 15, 5  # a test may take so many seconds, or so many times its usual time if that is longer
UNKNOWN_TIME = 60  # seconds assumed for a test whose usual time is unknown
MEMORY = 16 * 2**30  # bytes that a run may allocate
NOT_COPIED = (".git", ".venv", ".*cache", ".hypothesis", "__pycache__", "*_checkpoints")
PRELOAD = "pytest hypothesis _hypothesis_pytestplugin coverage datasets jinja2 matplotlib.pyplot torch._dynamo"
MODELS = "bert.modeling_bert gpt2.modeling_gpt2 auto.modeling_auto"


@dataclass
class Result:
    verdict: str  # "passed", "failed", "timeout" or "no tests"
    stored: str  # the last text passed to store; Selection stores the name of each test
    output: str
    seconds: float


class Forks:
    """Workers, each with a copy of the repository in a temporary folder. Use it in a with statement."""

    def __init__(self, workers):
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache/inductor")}
        for name in [*PRELOAD.split(), *(f"transformers.models.{model}" for model in MODELS.split())]:
            importlib.import_module(name)
        signal.signal(signal.SIGTERM, self.stop)
        self.stopped = False
        gc.collect()
        gc.freeze()  # so that the garbage collector of a run skips the objects of torch
        self.scratch = Path(tempfile.mkdtemp(prefix="forks-")).resolve()
        self.pristine, *self.workers = (self.scratch / str(i) for i in range(workers + 1))
        shutil.copytree(ROOT, self.pristine / "tree", ignore=shutil.ignore_patterns(*NOT_COPIED))
        shutil.rmtree(self.pristine / "tree" / "frontier", ignore_errors=True)  # the results of analysis/frontier.py
        pid = start(self.pristine, lambda: run_pytest(["tests"], "--collect-only"), write_bytecode=True)
        result = finish(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT).si_pid, self.pristine, time.monotonic())
        if result.verdict != "passed":
            sys.exit(f"error: pytest cannot collect the tests\n{result.output}")
        for worker in self.workers:
            shutil.copytree(self.pristine / "tree", worker / "tree")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.scratch, ignore_errors=True)

    def stop(self, *_):
        """Exit without leaving processes or folders. Where Python ignores the exception, run checks the flag."""
        self.stopped = True
        sys.exit(1)

    def run(self, tasks):
        """Yield (key, Result) of each task (key, {file: new text}, function) when it ends.

        The function is called in a copy of the repository with these changes; it returns an exit status. The next task
        is taken from the iterable when a worker is free.
        """
        tasks, free, running = iter(tasks), list(self.workers), {}
        try:
            while True:
                while free and (task := next(tasks, None)):
                    key, changes, function = task
                    worker = free.pop()
                    for file, text in changes.items():
                        Path(worker, "tree", file).write_text(text, encoding="utf-8")
                        os.utime(worker / "tree" / file, (1, 1))  # so that cached bytecode is not used for this file
                    running[start(worker, function)] = key, worker, time.monotonic()
                if self.stopped:
                    sys.exit(1)
                if not running:
                    return
                pid = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT).si_pid
                key, worker, began = running.pop(pid)
                result = finish(pid, worker, began)
                synchronise(worker / "tree", self.pristine / "tree")
                free.append(worker)
                yield key, result
        finally:
            for pid, (_, worker, began) in running.items():
                finish(pid, worker, began)


def start(worker, function, write_bytecode=False):
    """Fork a process that calls the function in the folder worker / "tree"; return its id, also that of its group."""
    temporary = tempfile.mkdtemp(dir=worker)
    for name in ("output", "stored"):
        (worker / name).write_text("")
    if pid := os.fork():
        return pid
    status = 3
    try:
        os.setsid()
        os.chdir(worker / "tree")
        output = os.open("../output", os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        own = (ROOT, ROOT / "tests", ROOT / "tests/mutation")
        sys.path[:] = [path for path in sys.path if Path(path).resolve() not in own]
        sys.modules["__main__"].__file__ = __file__  # multiprocessing imports it in its processes
        sys.dont_write_bytecode = not write_bytecode
        os.environ |= {"TMPDIR": temporary, "PYTHONDONTWRITEBYTECODE": "1", "STORED": str(worker / "stored")}
        tempfile.tempdir = None
        sys.modules["datasets"].config.HF_DATASETS_CACHE = Path(temporary, "datasets")
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(4 * TIMEOUT)
        status = function()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(ValueError):  # a test may have closed them
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def finish(pid, worker, began):
    """Kill a process, if it is still running, and all that it started; return its Result."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    verdict = {0: "passed", 5: "no tests", -signal.SIGALRM: "timeout"}.get(status, "failed")
    for folder in worker.glob("tmp*"):
        shutil.rmtree(folder, ignore_errors=True)
    stored, output = ((worker / name).read_text(encoding="utf-8", errors="replace") for name in ("stored", "output"))
    return Result(verdict, stored, output, time.monotonic() - began)


def store(text):
    """Store a text for the Result of this run."""
    Path(os.environ["STORED"]).write_text(text, encoding="utf-8")


def synchronise(tree, pristine):
    """Restore a copy of the pristine tree. Files are compared by size and modification time."""
    originals, copies = ({path.relative_to(top): path for path in top.rglob("*")} for top in (pristine, tree))
    for path in sorted(copies.keys() - originals.keys(), reverse=True):  # files before their folder
        copies[path].rmdir() if copies[path].is_dir() and not copies[path].is_symlink() else copies[path].unlink()
    for path, original in sorted(originals.items()):
        if original.is_dir():
            (tree / path).mkdir(exist_ok=True)
        elif path not in copies or identity(original) != identity(copies[path]):
            shutil.copy2(original, tree / path)


def identity(path):
    return path.stat().st_size, path.stat().st_mtime_ns


# ---- code that runs in a fork


class Selection:
    """A pytest plugin: run these tests in this order, store the name of each, limit its time, exit at a failure.

    A name without [parameters] selects the test with all its parameters.
    """

    def __init__(self, names, usual, exit_at_failure):
        self.order, self.usual, self.exit_at_failure = {name: i for i, name in enumerate(names)}, usual, exit_at_failure

    def position(self, item):
        return self.order.get(item.nodeid, self.order.get(item.nodeid.split("[")[0]))

    def pytest_collection_modifyitems(self, items):
        if any("::" in name for name in self.order):
            items[:] = sorted((item for item in items if self.position(item) is not None), key=self.position)

    def pytest_runtest_logstart(self, nodeid):
        store(nodeid)
        signal.alarm(int(max(TIMEOUT, TIMEOUT_FACTOR * self.usual.get(nodeid, UNKNOWN_TIME))))

    def pytest_runtest_logreport(self, report):
        if report.failed and self.exit_at_failure:
            os.write(1, f"\n{report.nodeid}\n{report.longreprtext}\n".encode())
            os._exit(1)


def run_pytest(names, *options, usual=(), plugins=(), exit_at_failure=True):
    """Run test files or single tests in the current folder; return the exit status.

    usual: {test: seconds that it usually takes}. exit_at_failure: exit the process at the first test that fails.
    """
    import pytest

    files = list(dict.fromkeys(name.split("::")[0] for name in names))
    common = ["-q", f"--rootdir={os.getcwd()}", "--assert=plain", "-p", "no:cacheprovider"]
    hypothesis = ["-p", "_hypothesis_pytestplugin", "--hypothesis-seed=0"]
    selection = Selection(names, dict(usual), exit_at_failure)
    return pytest.main([*common, *hypothesis, *options, *files], [selection, *plugins])
