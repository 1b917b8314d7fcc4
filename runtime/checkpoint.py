"""Checkpoints, written atomically and resumed exactly; and the files in the folder of a run.

A checkpoint is a folder, <out>/checkpoints/<step>/: tensors.safetensors has the weights and the optimizers' moments,
state.json everything else. The state of a random number generator is not in it: random numbers depend on the seed and
the step alone (device.random_generator), so that a resumed run draws the same ones.
"""

import gc
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.cli import differing
from runtime.device import release_memory
from runtime.distributed import ONE_PROCESS
from runtime.errors import BadInput, Finished, Stopped, first_line

RUN_CONFIG = "run_config.json"  # the config of the run, beside Hugging Face's config.json of the model
RESULTS = "results.json"  # the results of a finished run or of an evaluation
CHECKPOINTS = "checkpoints"  # subfolder of a run, with a folder per checkpoint
TENSORS, STATE = "tensors.safetensors", "state.json"  # the files of a checkpoint
BEST = "best"  # in the folder of a PPO run: the policy with the highest objective so far, as a model folder
VIEWER = "viewer.json"  # per-token metrics of sampled responses, written by evaluate.py
WRITTEN = (RESULTS, VIEWER, "samples.md", "example_results.png", "learning_curves.png", "report.html")  # by evaluate.py
CARD, CARD_MARK = "README.md", "<!-- written by evaluate.py, which replaces it -->"  # the model card
OTHER_CARD = "MODEL_CARD.md"  # the model card if there is a README.md that evaluate.py did not write
SAVING = ".saving-"  # prefix of a temporary folder
SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")  # end a run: Ctrl-C, a batch system, and Ctrl-Break, only on Windows
DISK_SPEED = 2e8  # bytes per second at which a slow disk writes a checkpoint
REVISIONS = {}  # {name: commit} of what this process read from the Hugging Face hub, for run_config.json

# ---- reading


def read_json(path):
    """Return the object in a JSON file. Raise BadInput with its path if it is missing, damaged, or not an object."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} cannot be read: it contains a {type(values).__name__}, not an object")
    return values


def read_file(file):
    """Yield (name, tensor) of a weight file. Raise BadInput with its path if it is damaged.

    A safetensors file is mapped into memory anew for each tensor, in order of decreasing size, so that filling a model
    from it never needs much more memory than the model.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as f:
                sizes = {name: math.prod(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
            for name in sorted(sizes, key=sizes.get, reverse=True):
                with safe_open(file, framework="pt") as f:
                    tensor = f.get_tensor(name)
                yield name, tensor
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
                raise BadInput(f"{file} is not a dictionary of tensors")
            yield from tensors.items()
    except pickle.UnpicklingError:
        raise BadInput(f"{file} is damaged, or contains more than plain tensors, which is not read") from None
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise BadInput(f"{file} is damaged or missing: {first_line(error)}") from None


def match(tensors, expected, source):
    """Raise BadInput unless `tensors` has exactly the names and shapes of `expected`, both {name: tensor}."""
    shapes, needed = ({name: tuple(t.shape) for name, t in group.items()} for group in (tensors, expected))
    problems = [f"missing {name} {needed[name]}" for name in needed if name not in shapes]
    problems += [f"unexpected {name} {shapes[name]}" for name in shapes if name not in needed]
    both = [name for name in needed if name in shapes]
    problems += [f"{name} is {shapes[name]}, expected {needed[name]}" for name in both if shapes[name] != needed[name]]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BadInput(f"{source} does not fit: {'; '.join(problems[:5])}{more}")


# ---- writing


@contextmanager
def replacing(out, tensors):
    """Yield a temporary folder inside `out`; after the block, its files and folders replace those of `out`.

    If the block fails, `out` is left unchanged. tensors: {name: tensor} to be written. Raises BadInput if one of
    them is not finite, or if the disk is full.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadInput(f"{out} was not written: {name} has a value that is not finite in {tensor.dtype}")
    umask = os.umask(0)
    os.umask(umask)
    try:
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=out, ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
            for path in Path(temporary).rglob("*"):
                if path.is_file():
                    path.chmod(0o666 & ~umask)  # safetensors makes its files unreadable to others
                flush(path)
            for path in sorted(Path(temporary).iterdir()):
                replace(path, Path(out) / path.name)
            flush(out)
    except Exception as error:
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:  # tokenizers raises Exception
            raise BadInput(f"{out} was not written, its old files are kept: {first_line(error)}") from None
        raise


def flush(path):
    """Write a file or the names in a folder from the cache to the disk, so that a power cut does not undo it.

    Windows flushes only files that are open for writing, and no folders.
    """
    is_folder = Path(path).is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if is_folder:
            return
        raise
    os.fsync(descriptor)
    os.close(descriptor)


def replace(old, new, seconds=2.0):
    """Rename a file or folder, which replaces a file. On Windows, retry for some seconds while a file in it is open.

    A virus scanner, for example, opens each new file for a moment.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return os.replace(old, new)
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > end:
                raise
        time.sleep(0.05)


def write_text(path, text):
    """Write a text file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    replace(temporary, path)


# ---- the folder of a run


def check_run(cfg, *results):
    """Raise BadInput if cfg.out has files that a run of cfg would replace, and Finished if nothing is left to resume.

    cfg.force allows replacing them. results: the files in cfg.out that a finished run has. Nothing is written here:
    RunLog prepares the folder.
    """
    out, other = Path(cfg.out), "--out names another folder"
    parts = [out, out / "reward", out / "judge"]  # the last two are of reward.py
    done = [(out / file).is_file() for file in results]
    if not cfg.force:
        if (out / RUN_CONFIG).is_file():
            if changed := differing(cfg, read_json(out / RUN_CONFIG)):
                effect = "resumes it with this one" if cfg.resume else "replaces it"
                changes = ", ".join(changed[:5])
                raise BadInput(f"{out} contains a run of another config ({changes}): --force {effect}, {other}")
        elif paths := [path for part in parts for path in earlier_files(part)]:
            raise BadInput(f"{paths[0]} belongs to no known run (no {RUN_CONFIG}): --force replaces it, {other}")
        if not cfg.resume and (any(map(latest_checkpoint, parts)) or any(done) and not all(done)):
            raise BadInput(f"{out} contains an unfinished run: --resume resumes it, --force replaces it, {other}")
    started = any((part / CHECKPOINTS).is_dir() for part in parts)  # with --force, over a finished run
    if all(done) and not started:
        if cfg.resume:
            raise Finished(f"{out} contains a finished run: nothing is left to resume")
        if not cfg.force:
            raise BadInput(f"{out} contains a finished run: --force replaces it, {other}")


def is_finished(out, *results):
    """Return whether a folder has these results of a finished run, and no checkpoints of an unfinished one."""
    return all(Path(out, file).is_file() for file in results) and not Path(out, CHECKPOINTS).is_dir()


def earlier_files(out):
    """Return the paths of an earlier run in a folder, which a new run deletes."""
    names = BEST, "tensorboard", "wandb_id", "log.jsonl", "samples.jsonl"
    earlier = [out / name for name in names if (out / name).exists()]
    return earlier + evaluation_files(out) + sorted((out / CHECKPOINTS).glob("*"))


def evaluation_files(out):
    """Return the paths of what evaluate.py wrote in a folder, its card included, but no card of another origin."""
    names = [*WRITTEN, *(name for name in (CARD, OTHER_CARD) if is_our_card(out / name))]
    return [out / name for name in names if (out / name).exists()]


def delete_earlier_files(out):
    """Delete the files of an earlier run in a folder, checkpoints first, so that a kill here cannot mix two runs."""
    delete_checkpoints(out)
    (out / CHECKPOINTS).mkdir()
    for path in earlier_files(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_finished(policy):
    """Raise BadInput for the folder of an unfinished run, which may have the weights of an earlier run."""
    if (Path(policy) / CHECKPOINTS).is_dir():
        hint = f"python ppo.py --resume finishes it; its best policy so far is {Path(policy, BEST)}"
        if (file := Path(policy, RUN_CONFIG)).is_file() and "method" in read_json(file):
            hint = "python dpo.py --resume finishes it"
        raise BadInput(f"{policy} contains an unfinished run: {hint}")


def is_our_card(file):
    """Return whether a file is a model card that evaluate.py wrote; others are never replaced or deleted."""
    return file.is_file() and f"\n{CARD_MARK}\n" in file.read_text(encoding="utf-8", errors="replace")


def delete_checkpoints(out):
    """Delete all checkpoints of a run. If the process is killed, all or none of them are left."""
    if (Path(out) / CHECKPOINTS).is_dir():
        folder = tempfile.mkdtemp(prefix=SAVING, dir=out)  # a later run removes it if this one is killed
        replace(Path(out) / CHECKPOINTS, Path(folder) / CHECKPOINTS)
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(out):
    """Delete the temporary folders of runs that were killed while saving."""
    for parent in (Path(out), Path(out) / CHECKPOINTS, Path(out) / BEST):
        for folder in parent.glob(SAVING + "*"):
            shutil.rmtree(folder, ignore_errors=True)


def fingerprint(*parts):
    """Return 16 hexadecimal digits of a SHA-256 hash of texts and of the weights of models."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            whole.update(part.encode() + b"\0")
        else:
            for name, tensor in part.state_dict().items():
                whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
                whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return whole.hexdigest()[:16]


# ---- checkpoints


def save_checkpoint(out, model, optimizers, state, keep=2):
    """Write weights, the optimizers' moments and state, a dict for JSON with "step", as out/checkpoints/<step>/.

    Then delete all but the `keep` latest checkpoints.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for j, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{name}": tensor for name, tensor in moments.items()}
    parent = Path(out) / CHECKPOINTS
    parent.mkdir(exist_ok=True)
    with replacing(parent, tensors) as temporary:
        folder = temporary / f"{state['step']:08d}"
        folder.mkdir()
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)
        (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    for old in sorted(parent.glob("[0-9]*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)  # what is open on Windows is deleted after the next save


def latest_checkpoint(out):
    """Return the folder of the latest checkpoint of a run, or None."""
    return max((Path(out) / CHECKPOINTS).glob("[0-9]*"), default=None)


def load_checkpoint(folder, model, optimizers):
    """Restore weights and moments from a checkpoint; return its state, a dict. BadInput if they do not fit."""
    state, weights, shapes = read_json(folder / STATE), {}, {}
    for i, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shapes |= {f"optimizer.{i}.{j}": p.shape for j, p in enumerate(parameters)}
    moments = {parameter: {} for parameter in shapes}
    for name, tensor in read_file(folder / TENSORS):
        parameter, _, moment = name.rpartition(".")
        if name.startswith("model."):
            weights[name.removeprefix("model.")] = tensor
        elif parameter in shapes and tensor.shape in ((), shapes[parameter]):
            moments[parameter][moment] = tensor.clone()  # otherwise it stays mapped to the file
        else:
            raise BadInput(f"{folder} does not fit: {name} {tuple(tensor.shape)} is not of this run's optimizers")
    match(weights, model.state_dict(), folder)
    model.load_state_dict(weights)
    for i, optimizer in enumerate(optimizers):
        groups = optimizer.state_dict()["param_groups"]
        restored = {j: moments[f"optimizer.{i}.{j}"] for group in groups for j in group["params"]}
        optimizer.load_state_dict({"state": restored, "param_groups": groups})
    return state


class Checkpoints:
    """The steps of a training loop, with a checkpoint every cfg.save_every steps and one if a signal ends the run.

    A checkpoint is skipped if saving, this one included, would exceed cfg.save_share of the run's time. It is assumed
    to take as long as the previous one, and the first one to be written at DISK_SPEED.

    inputs: {name: hash} of what the run depends on besides its config. parts: {name: object}; a checkpoint has the
    attributes of each object named in object.saved. With cfg.resume, weights, moments and attributes are those of the
    latest checkpoint. before_save: called before each checkpoint.
    """

    def __init__(self, cfg, out, model, optimizers, inputs, parts, ranks=ONE_PROCESS, before_save=lambda: None):
        self.cfg, self.out, self.model, self.optimizers, self.inputs = cfg, out, model, optimizers, inputs
        self.parts, self.ranks, self.before_save, self.signal = parts, ranks, before_save, 0
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self.start, self.spent, self.cost = time.monotonic(), 0.0, 3 * size / DISK_SPEED  # s; weights and two moments
        folder = latest_checkpoint(out) if cfg.resume else None
        self.first_step = self.step = self.load(folder) if folder else 0
        if ranks.any(self.first_step) != self.first_step:  # the largest of all processes
            raise BadInput(f"another process resumes from a checkpoint that is not in {out}: share that folder")

    def load(self, folder):
        """Restore the run from a checkpoint; return its step."""
        state = load_checkpoint(folder, self.model, self.optimizers)
        saved = {name: {*part.saved} for name, part in self.parts.items()}
        if state.keys() != {"step", "inputs", *saved} or any(state[name].keys() != saved[name] for name in saved):
            raise BadInput(f"{folder} was saved by another version of this project and cannot be resumed")
        old, new = state["inputs"], self.inputs
        if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            hashes = ", ".join(f"{name} ({old.get(name) or '-'} then, {new.get(name) or '-'} now)" for name in changed)
            if not self.cfg.force:
                raise BadInput(f"{folder} was made with different inputs: {hashes}. --force resumes anyway")
            print(f"warning: resuming with different inputs: {hashes}", file=sys.stderr)
        for name, part in self.parts.items():
            for attribute in part.saved:
                setattr(part, attribute, state[name][attribute])
        print(f"resuming from {folder}", flush=True)
        return state["step"]

    def steps(self, end):
        """Yield first_step to end - 1. After one of SIGNALS, finish the step, save and raise Stopped."""
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():  # as in some notebooks: Python allows no handlers
            numbers = []
        before = {number: signal.signal(number, self.handle) for number in numbers}
        device = next(self.model.parameters()).device
        self.start = time.monotonic()
        # what exists now stays: the garbage collector need not look through it again and again
        gc.collect()
        gc.freeze()
        try:
            for step in range(self.first_step, end):
                self.step, stop = step, self.ranks.any(self.signal)
                if step > self.first_step and (stop or self.due()):
                    self.save()
                if stop:
                    raise Stopped(stop)
                yield step
                release_memory(device)
        finally:
            gc.unfreeze()
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle(self, number, frame):
        if self.signal and number == signal.SIGINT:  # a second Ctrl-C stops at once; torchrun may send SIGTERM twice
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, b"\nstopping after this step; press Ctrl-C again to stop now\n")  # print is not safe in handlers

    def due(self):
        elapsed = time.monotonic() - self.start
        affordable = self.spent + self.cost <= self.cfg.save_share * (elapsed + self.cost)
        return self.step % self.cfg.save_every == 0 and affordable

    def save(self):
        """Write a checkpoint of the state before the current step, unless it exists. Only rank 0 writes."""
        latest = latest_checkpoint(self.out)
        if self.ranks.rank or latest and int(latest.name) == self.step:
            return
        start = time.monotonic()
        self.before_save()
        parts = {name: {a: getattr(part, a) for a in part.saved} for name, part in self.parts.items()}
        state = {"step": self.step, "inputs": self.inputs} | parts
        save_checkpoint(self.out, self.model, self.optimizers, state, self.cfg.keep)
        self.cost = time.monotonic() - start
        self.spent += self.cost

    def save_before(self, error):
        """Save a checkpoint of the state before the current step; return the error with a hint to resume."""
        self.save()
        hint = f"--resume resumes it at step {self.step}, with --force if you changed the file of the reward"
        return BadInput(f"{error}. The run is saved: {hint}")


class BestWeights:
    """The best weights of a model so far, copied to memory and written just before the next checkpoint.

    If the process is killed between the two, the weights on the disk are newer than the latest checkpoint; the resumed
    run computes the same ones again. A subclass has the method save, which is called with the state dict.
    """

    def __init__(self, model):
        self.model, self.weights = model, None

    def keep(self):
        """Copy the current weights."""
        self.weights = {name: t.detach().to("cpu", copy=True) for name, t in self.model.state_dict().items()}

    def write(self):
        """Save the copied weights, once."""
        if self.weights:
            self.save(self.weights)
            self.weights = None
