"""Windows, macOS and old versions of Python, simulated on Linux: what these lack is taken away.

None of this replaces a run there, which .github/workflows/test.yml has.
"""

import ast
import contextlib
import ctypes
import errno
import io
import os
import platform
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, message, reviews_csv, write_bert
from test_layout import MODULES, SCRIPTS
from test_ppo_main import Killed
from test_ppo_main import cfg as ppo_cfg  # noqa: F401 - a fixture

import finetune_gpt2
import ppo
import reward
import runtime
from config import FinetuneConfig, PPOConfig, RewardConfig
from runtime import checkpoint, cli, monitor
from runtime.checkpoint import Checkpoints, flush, latest_checkpoint, read_file, write_text
from runtime.device import pick_device, release_memory
from runtime.errors import Stopped
from runtime.log import RunLog

LINUX = sys.platform == "linux"
UNIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
SOURCES = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items()}

# ---- Windows: files


def in_use(path):
    """Return whether this process has the file open or mapped into memory, or a file in the folder."""
    path, used = os.path.realpath(path), set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of listdir itself
            used.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    used |= {words[5] for line in open("/proc/self/maps") if len(words := line.rstrip("\n").split(maxsplit=5)) == 6}
    return any(name == path or name.startswith(path + os.sep) for name in used)


@pytest.fixture
def windows(tmp_path, monkeypatch):
    """The files of Windows in tmp_path: open or mapped ones are not renamed or deleted, folders are not opened.

    A descriptor that is not open for writing is not flushed.
    """
    if not LINUX:
        return  # on Windows nothing is simulated
    import fcntl

    real = SimpleNamespace(**{name: getattr(os, name) for name in ("open", "fsync", "replace", "rename", "unlink")})

    def here(path):  # other libraries know the system by other means, and delete open files elsewhere
        return str(path).startswith(str(tmp_path))

    def denied(path):
        return PermissionError(errno.EACCES, "The process cannot access the file", str(path))

    def open_file(path, *args, **kwargs):
        if here(path) and os.path.isdir(path):
            raise denied(path)
        return real.open(path, *args, **kwargs)

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real.fsync(descriptor)

    def rename(old, new):
        for path in (old, new):
            if here(path) and (in_use(path) or path == new and os.path.isdir(path)):
                raise denied(path)
        real.replace(old, new)

    def unlink(path, **kwargs):
        if here(path) and in_use(path):
            raise denied(path)
        real.unlink(path, **kwargs)

    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # rmtree opens folders elsewhere
    for name, function in dict(open=open_file, fsync=fsync, replace=rename, rename=rename, unlink=unlink).items():
        monkeypatch.setattr(os, name, function)
    monkeypatch.setattr(os, "remove", unlink)


@pytest.mark.skipif(not LINUX and os.name != "nt", reason="neither Windows nor its simulation")
def test_the_simulation_refuses_what_windows_refuses(windows, tmp_path):
    (tmp_path / "a").write_text("a")
    torch.save({}, tmp_path / "b")
    with open(tmp_path / "a", encoding="utf-8"):
        for refused in (lambda: os.replace(tmp_path / "b", tmp_path / "a"), (tmp_path / "a").unlink):
            with pytest.raises(PermissionError):
                refused()
    os.replace(tmp_path / "b", tmp_path / "a")
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)


def test_files_are_flushed_and_folders_where_the_system_can(windows, tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(descriptor) or fsync(descriptor))
    (tmp_path / "a").write_text("a")
    flush(tmp_path / "a")
    assert len(flushed) == 1
    flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "b")


def test_a_run_that_failed_is_resumed_in_the_same_process(windows, ppo_cfg, monkeypatch):  # noqa: F811
    """As in a notebook, which keeps the traceback and with it the log of the failed run. The path has spaces."""
    cfg = replace(ppo_cfg, out=f"{ppo_cfg.out} of a (first) run", steps=4, save_every=1)
    with pytest.raises(Killed) as kept, monkeypatch.context() as patch:
        update, calls = ppo.update, []

        def update_or_die(*args):
            calls.append(args)
            if len(calls) == 3:
                raise Killed
            return update(*args)

        patch.setattr(ppo, "update", update_or_die)
        ppo.main(cfg)
    assert latest_checkpoint(cfg.out).name == "00000002" and kept.traceback
    ppo.main(replace(cfg, resume=True))
    assert not list(Path(cfg.out).rglob(".saving-*")) and latest_checkpoint(cfg.out) is None
    assert (Path(cfg.out) / "model.safetensors").is_file()


def test_a_classifier_is_trained_in_its_own_folder(windows, tmp_path):
    """Its weights are mapped to the file that they replace, unless they are copied."""
    for name in ("reward", "judge"):
        write_bert(tmp_path / "bert" / name)
    csv, folder = reviews_csv(tmp_path / "toy.csv", 200), str(tmp_path / "bert")
    before = (tmp_path / "bert/judge/model.safetensors").read_bytes()
    cfg = RewardConfig(dataset=str(csv), init_from=folder, out=folder, force=True, report_to="none", device="cpu")
    reward.main(replace(cfg, epochs=0.2, eval_reviews=8, batch_size=16, lr=1e-2))
    assert (tmp_path / "bert/judge/model.safetensors").read_bytes() != before


def test_gpt2_is_trained_in_its_own_folder(windows, tmp_path, gpt2_folder):
    folder, csv = shutil.copytree(gpt2_folder, tmp_path / "gpt2"), reviews_csv(tmp_path / "toy.csv", 200)
    before = (folder / "model.safetensors").read_bytes()
    cfg = FinetuneConfig(dataset=str(csv), init_from=str(folder), out=str(folder), force=True, report_to="none")
    finetune_gpt2.main(replace(cfg, block_size=32, batch_size=8, epochs=0.2, device="cpu", eval_tokens=64))
    assert (folder / "model.safetensors").read_bytes() != before


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_the_simulation_knows_mapped_files(tmp_path):
    """Otherwise the tests above would pass without a copy."""
    write_bert(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = dict(read_file(file))
    assert in_use(file) and in_use(tmp_path)
    del tensors
    assert not in_use(file)


@pytest.mark.parametrize("system", ["win32", "linux"])
def test_a_file_that_is_open_for_a_moment_is_replaced_on_windows(tmp_path, monkeypatch, system):
    """A virus scanner opens new files."""
    replace_file, attempts = os.replace, []

    def busy_twice(old, new):
        attempts.append(new)
        if len(attempts) < 3:
            raise PermissionError(errno.EACCES, "in use")
        replace_file(old, new)

    monkeypatch.setattr(os, "replace", busy_twice)
    monkeypatch.setattr(sys, "platform", system)
    with contextlib.nullcontext() if system == "win32" else pytest.raises(PermissionError):
        write_text(tmp_path / "a", "new")
    assert len(attempts) == (3 if system == "win32" else 1)


def test_a_file_that_stays_open_ends_the_save_with_one_line(tmp_path, monkeypatch):
    def busy(old, new):
        raise PermissionError(errno.EACCES, "The process cannot access the file")

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(checkpoint.time, "monotonic", iter(range(100)).__next__)

    def save():
        with checkpoint.replacing(tmp_path, {}) as folder:
            (folder / "a").write_text("a")

    assert "was not written, its old files are kept: " in message(save)


# ---- Windows: signals, output, modules


def test_ctrl_break_ends_a_run_after_its_step_with_a_checkpoint(windows, tmp_path, monkeypatch):
    """Also without SIGTERM, which no program sends on Windows."""
    monkeypatch.delattr(signal, "SIGTERM")
    number = getattr(signal, "SIGBREAK", None) or signal.SIGUSR1
    monkeypatch.setattr(signal, "SIGBREAK", number, raising=False)
    before, done = signal.getsignal(number), []
    cfg = FinetuneConfig(out=str(tmp_path), save_every=100)
    with pytest.raises(Stopped) as stopped:
        for step in Checkpoints(cfg, tmp_path, torch.nn.Linear(2, 2), [], {}, {}).steps(9):
            done.append(step)
            if step == 3:
                signal.raise_signal(number)
    assert done == [0, 1, 2, 3] and stopped.value.args == (number,)
    assert latest_checkpoint(tmp_path).name == "00000004" and signal.getsignal(number) == before


def test_a_run_in_a_thread_has_no_signal_handlers(tmp_path):
    """Python allows them in the main thread only; some notebooks run a cell in another one."""
    steps = []

    def run():
        steps.extend(Checkpoints(FinetuneConfig(), tmp_path, torch.nn.Linear(2, 2), [], {}, {}).steps(2))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert steps == [0, 1]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_scripts_print_utf_8_whatever_the_code_page(monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--preset", "mini"])

    def main(cfg):
        print("… 好 █ \udcff")
        raise reward.BadInput("好 …")

    with pytest.raises(SystemExit):
        cli.run(main, PPOConfig)
    printed = [stream.buffer.getvalue() for stream in streams if not stream.flush()]
    assert printed[0].decode().strip() == "… 好 █ \\udcff" and printed[1].decode().strip() == "error: 好 …"


def test_scripts_run_without_streams(monkeypatch, tmp_path):
    """pythonw has none, and the streams of a notebook cannot be configured."""

    def main(cfg):
        cfg = replace(cfg, out=str(tmp_path))
        log, model = RunLog(cfg), torch.nn.Linear(1, 1)
        assert [*log.progress(Checkpoints(cfg, tmp_path, model, [], {}, {}), 2, "loop", "step")] == [0, 1]
        log.print("a line")

    monkeypatch.setattr(sys, "argv", ["ppo.py"])
    for stream in (None, SimpleNamespace(write=len, flush=lambda: None, isatty=lambda: False)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            assert cli.run(main, PPOConfig) is None


def top_level_imports(source):
    """Return the modules that a source imports whenever it is imported; those in a try block may be missing."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def test_no_module_imports_what_only_unix_has():
    for module, source in SOURCES.items():
        assert not top_level_imports(source) & UNIX_ONLY, module


def test_scripts_are_imported_without_the_modules_of_unix():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(UNIX_ONLY - {'posix'})}))\n"
        "import finetune_gpt2, reward, ppo, evaluate, generate\nfrom analysis import frontier, bench"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_text_file_is_opened_with_an_encoding():
    """On Windows the default is the code page."""
    scripts = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.py")}
    for module, source in (SOURCES | scripts).items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            code, function = ast.unparse(node), node.func
            opens = isinstance(function, ast.Name) and function.id == "open"
            opens |= isinstance(function, ast.Attribute) and function.attr in ("read_text", "write_text")
            assert not opens or "encoding=" in code or "'rb'" in code, f"{module}, line {node.lineno}: {code}"
            assert not re.search(r"\b(text|universal_newlines)=True", code), f"{module}, line {node.lineno}: {code}"


def test_the_peak_memory_on_windows_is_that_of_the_working_set(monkeypatch):
    def process_memory(process, counters, size):
        assert process.value == ctypes.c_void_p(-1).value and size == 72
        counters[:3] = [72, 2_500_000_000, 7]  # bytes of the structure and page faults in one; peak; current
        return 1

    kernel32 = SimpleNamespace(K32GetProcessMemoryInfo=process_memory)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    monkeypatch.setattr(monitor, "resource", None)
    assert monitor.peak_memory(torch.device("cpu")) == 2.5


# ---- macOS


def test_pytorch_prints_no_note_on_macos():
    """At import, about the output of processes: bad input would be reported in two lines."""
    name = "torch.distributed.elastic.multiprocessing.redirects"
    file = Path(torch.__file__).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    note = f"import runpy, sys; sys.platform = 'darwin'; runpy.run_path({str(file)!r}, run_name={name!r})"
    printed = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stderr
        for code in (note, f"import runtime; {note}")
    ]
    assert "MacOs" in printed[0] and not printed[1]


@pytest.mark.parametrize(
    ("preset", "device", "expected"),
    [("mini", "auto", "cpu"), ("mini", "mps", "mps"), ("gpt2", "auto", "mps"), ("gpt2", "cpu", "cpu")],
)
def test_preset_mini_is_computed_on_the_cpu_of_a_mac_unless_asked_otherwise(monkeypatch, preset, device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device(PPOConfig(preset=preset, device=device))[0].type == expected


def test_preset_mini_is_computed_on_an_nvidia_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert pick_device(PPOConfig(preset="mini", dtype="fp32"))[0].type == "cuda"


def test_the_memory_of_mps_is_released_after_each_step(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("memory"))
    release_memory(torch.device("cpu"))
    assert not calls
    monkeypatch.setattr(torch.mps, "clear_graph_cache", lambda: calls.append("graphs"), raising=False)
    release_memory(torch.device("mps"))
    assert calls == ["memory", "graphs"]
    monkeypatch.delattr(torch.mps, "clear_graph_cache")  # as in torch 2.13
    release_memory(torch.device("mps"))
    assert calls == ["memory", "graphs", "memory"]
    monkeypatch.setattr(checkpoint, "release_memory", lambda device: calls.append(device.type))
    calls.clear()
    list(Checkpoints(FinetuneConfig(), tmp_path, torch.nn.Linear(1, 1, device="meta"), [], {}, {}).steps(3))
    assert calls == ["meta"] * 3


# ---- notebooks


@pytest.mark.parametrize(("terminal", "drawn"), [(True, 50), (False, 1)])
def test_a_progress_bar_is_drawn_every_ten_seconds_where_it_cannot_be_drawn_in_place(
    tmp_path, monkeypatch, terminal, drawn
):
    """In a notebook or a file; 50 steps of 0.2 s on the clock of the bar."""
    stream, clock = io.StringIO(), SimpleNamespace(now=0.0)
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    log = RunLog(PPOConfig(out=str(tmp_path), report_to="none"))
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    steps = SimpleNamespace(first_step=0, steps=lambda n: (step for step in range(n)))
    for _ in log.progress(steps, 50, "ppo", "rollout"):
        clock.now += 0.2
    assert abs(stream.getvalue().count("rollout/s") - drawn) <= 2


# ---- Python


@pytest.mark.parametrize("module", [*SCRIPTS, "runtime", "analysis"])
def test_scripts_are_parsed_by_old_versions_of_python(module):
    """Up to the check of the version; a syntax error would not say what is wrong."""
    file = ROOT / (f"{module}.py" if module in SCRIPTS else f"{module}/__init__.py")
    ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_first_what_checks_the_version(script):
    first = next(node for node in ast.parse(SOURCES[script]).body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert isinstance(first, ast.Import) and [alias.name for alias in first.names] == ["runtime"]


def test_an_old_python_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.13")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(runtime.__file__)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: Python 3.11 or newer is needed, this is Python 3.10.13\n"
