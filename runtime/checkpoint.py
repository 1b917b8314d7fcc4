"""Checkpoints: written atomically, resumed exactly; and the files in the folder of a run.

A checkpoint is a folder, <out>/checkpoints/<step>/: tensors.safetensors with the weights and the optimizer's moments,
and state.json with everything else. It has no state of a random number generator: random numbers depend on the seed and
the step (device.random_generator), so that a resumed run draws the same ones.
"""

import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.cli import differing
from runtime.distributed import ONE_PROCESS
from runtime.errors import BadInput, Stopped, first_line

RUN_CONFIG = "run_config.json"  # the config of the run, beside Hugging Face's config.json of the model
RESULTS = "results.json"  # the results of a finished run or of an evaluation
CHECKPOINTS = "checkpoints"  # subfolder of a run: a folder for each checkpoint
BEST = "best"  # in the folder of a PPO run: the policy with the highest objective so far, as a model folder
VIEWER = "viewer.json"  # per-token metrics of some responses, written by evaluate.py
OTHER_CARD = "MODEL_CARD.md"  # the model card if there is a README.md that evaluate.py did not write
CARD, CARD_MARK = "README.md", "<!-- written by evaluate.py, which replaces it -->"  # the model card
WRITTEN = (
    RESULTS,
    VIEWER,
    "samples.md",
    "example_results.png",
    "learning_curves.png",
    "report.html",
)  # all by evaluate.py
TENSORS, STATE = "tensors.safetensors", "state.json"  # the files of a checkpoint
REVISIONS = {}  # {name: commit} of what this process read from the Hugging Face hub, for run_config.json
DISK_SPEED = 2e8  # bytes per second at which a slow disk writes a checkpoint
SAVING = ".saving-"  # prefix of a temporary folder; leftovers of a killed run are removed

# ---- reading


def read_json(path):
    """The object in a JSON file; BadInput with the path when it is missing or broken, or holds no object."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} cannot be read: it holds a {type(values).__name__}, not an object")
    return values


def read_file(file):
    """Yield (name, tensor) of a weight file; BadInput with its path when it is damaged.

    A safetensors file is mapped anew for each tensor, the largest first: so a model that is filled from it never has
    much more than its own size in memory.
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
                raise BadInput(f"{file} holds more than named tensors")
            yield from tensors.items()
    except pickle.UnpicklingError:
        raise BadInput(
            f"{file} is damaged or missing, or holds more than plain tensors, and nothing else is read"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise BadInput(f"{file} is damaged or missing: {first_line(error)}") from None


def match(found, expected, where):
    """Raise BadInput unless `found` has exactly the names and shapes of `expected`: {name: tensor} both."""
    shapes, wanted = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (found, expected))
    problems = [f"missing {name} {wanted[name]}" for name in wanted if name not in shapes]
    problems += [f"unexpected {name} {shapes[name]}" for name in shapes if name not in wanted]
    both = [name for name in wanted if name in shapes]
    problems += [f"{name} is {shapes[name]}, expected {wanted[name]}" for name in both if shapes[name] != wanted[name]]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BadInput(f"{where} does not fit: {'; '.join(problems[:5])}{more}")


# ---- writing


@contextmanager
def new_folder(parent, tensors):
    """A folder to write into, on the disk and not only in its cache when the block ends; gone with what is in it then.

    tensors: {name: tensor} that will be written; none of them may hold a number that is not finite. BadInput when they
    do, or when the disk is full: it names the folder and the bytes that were needed.
    """
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise BadInput(
            f"{parent} was not written: {bad[0]} holds a number that is not finite in {tensors[bad[0]].dtype}"
        )
    try:
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=parent) as temporary:
            yield Path(temporary)
    except Exception as error:
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:  # as tokenizers raises
            raise
        free = shutil.disk_usage(parent).free
        need = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise BadInput(
            f"{parent} was not written, what it held stays: {first_line(error)}; {need:,} bytes are needed, {free:,} "
            "are free on that disk"
        ) from None


@contextmanager
def replacing(out, tensors):
    """A temporary folder beside the files of `out`; at the end of the block its files take their places there.

    tensors: as in new_folder. A crash inside the block leaves `out` as it was; files that the block does not write
    stay.
    """
    with new_folder(out, tensors) as temporary:
        yield temporary
        for file in synced(temporary):
            os.replace(file, Path(out) / file.name)
        sync_folder(out)


def synced(folder):
    """The files of a folder, when they are on the disk and not only in its cache, readable as open() makes files."""
    files = sorted(Path(folder).iterdir())
    umask = os.umask(0)
    os.umask(umask)
    for file in files:
        os.chmod(file, 0o666 & ~umask)  # safetensors makes its files unreadable to others
        with open(file, "rb+") as f:
            os.fsync(f.fileno())
    return files


def sync_folder(folder):
    """Put the names in a folder on the disk: a rename that is only in the cache is undone by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_text(path, text):
    """Write a text file so that a reader sees the old or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def is_our_card(file):
    """Whether a file is a model card that evaluate.py wrote: nobody else's is replaced or deleted."""
    return file.is_file() and f"\n{CARD_MARK}\n" in file.read_text(encoding="utf-8", errors="replace")


def delete_results(out):
    """Delete what evaluate.py and plot.py wrote of the weights in a folder."""
    for name in WRITTEN:
        Path(out, name).unlink(missing_ok=True)
    for card in (Path(out, CARD), Path(out, OTHER_CARD)):
        if is_our_card(card):
            card.unlink()


# ---- before a run


def check_run(cfg, result, *results):
    """BadInput if cfg.out holds a run that cfg would replace or cannot resume. Nothing is written: see RunLog.

    result, results: files in cfg.out; all of them are there when a run is finished.
    """
    file, resume = Path(cfg.out) / RUN_CONFIG, cfg.resume
    parts = [Path(cfg.out, part) for part in ("", "reward", "judge")]  # reward.py's run has two
    if file.is_file() and not cfg.force:
        changed = differing(cfg, read_json(file))
        if changed:
            effect = "resumes it with this one" if resume else "replaces it"
            raise BadInput(
                f"{cfg.out} holds a run of another config ({', '.join(changed[:5])}): --force {effect}, --out names "
                "another folder"
            )
    done = [Path(cfg.out, file).is_file() for file in (result, *results)]
    if (any(map(latest_checkpoint, parts)) or any(done) and not all(done)) and not (cfg.force or resume):
        raise BadInput(
            f"{cfg.out} holds an unfinished run: --resume resumes it, --force replaces it, --out names another folder"
        )
    if not (file.is_file() or cfg.force):
        foreign = [path for part in parts for path in replaced(part)]
        if foreign:
            raise BadInput(
                f"{cfg.out} holds {foreign[0].relative_to(cfg.out)}, and no {RUN_CONFIG} of the run that it is of: "
                "--force replaces such files, --out names another folder"
            )
    started = any((part / CHECKPOINTS).is_dir() for part in parts)  # over a finished run, by --force
    if all(done) and not started and (resume or not cfg.force):
        effect = "there is nothing to resume; without --resume, " if resume else ""
        raise BadInput(f"{cfg.out} holds a finished run: {effect}--force replaces it, --out names another folder")


def replaced(out):
    """The paths in a folder that a new run there deletes or writes over. An empty folder of checkpoints is none."""
    names = (BEST, "tensorboard", "log.jsonl", "samples.jsonl", *WRITTEN)
    found = [Path(out, name) for name in names if Path(out, name).exists()]
    return found + sorted((Path(out) / CHECKPOINTS).glob("*"))


def check_finished(policy):
    """BadInput for the folder of an unfinished run: weights in it are of an earlier one, its config and log are not."""
    if (Path(policy) / CHECKPOINTS).is_dir():
        raise BadInput(
            f"{policy} holds an unfinished run: python ppo.py --resume finishes it; its best policy so far is in "
            f"{Path(policy, BEST)}"
        )


# ---- checkpoints


def save_checkpoint(out, model, optimizers, state, keep=2):
    """Write weights, the optimizers' moments and state, a dict for JSON with "step", as out/checkpoints/<step>/.

    The folder appears complete or not at all; then all but the `keep` latest are deleted.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for j, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{name}": tensor for name, tensor in moments.items()}
    parent, name = Path(out) / CHECKPOINTS, step_name(state["step"])
    parent.mkdir(exist_ok=True)
    with new_folder(parent, tensors) as temporary:
        folder = temporary / name
        folder.mkdir()
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)
        (folder / STATE).write_text(json.dumps(state, indent=1))
        synced(folder)
        os.replace(folder, parent / name)
        sync_folder(parent)
    for old in sorted(parent.glob("[0-9]*"))[:-keep]:
        shutil.rmtree(old)


def step_name(step):
    """Return the name of a checkpoint's folder."""
    return f"{step:08d}"


def latest_checkpoint(out):
    """Return the folder of the latest checkpoint of a run, or None."""
    return max((Path(out) / CHECKPOINTS).glob("[0-9]*"), default=None)


def fingerprint(*parts):
    """Return 16 hexadecimal digits of a SHA-256 hash of texts and of models' weights."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            whole.update(part.encode() + b"\0")
        else:
            for name, tensor in part.state_dict().items():
                whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
                whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return whole.hexdigest()[:16]


def load_checkpoint(folder, model, optimizers):
    """Restore weights and moments from a checkpoint's folder; return its state, a dict. BadInput if they do not fit."""
    state = read_json(folder / STATE)
    tensors, moments = {}, [{} for _ in optimizers]
    parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    shapes = {(i, j): p.shape for i, some in enumerate(parameters) for j, p in enumerate(some)}
    for name, tensor in read_file(folder / TENSORS):
        kind, _, name = name.partition(".")
        if kind == "model":
            tensors[name] = tensor
        else:
            i, j, name = name.split(".")
            i, j = int(i), int(j)
            if (i, j) not in shapes or (tensor.dim() and tensor.shape != shapes[i, j]):
                raise BadInput(f"{folder} does not fit: its moments are of another optimizer")
            moments[i].setdefault(j, {})[name] = tensor.clone()  # otherwise it stays mapped to the file
    match(tensors, model.state_dict(), folder)
    model.load_state_dict(tensors)
    for optimizer, state_of_parameters in zip(optimizers, moments):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state_of_parameters, "param_groups": groups})
    return state


class Checkpoints:
    """The steps of a training loop, with a checkpoint every cfg.save_every of them and one if a signal ends the run.

    A checkpoint that is due is skipped if this run's checkpoints, with it, would take more than cfg.save_share of its
    time; it is assumed to take as long as the last one, the first one to be written at DISK_SPEED.

    inputs: hashes of what the run depends on besides its config, {"texts": ..., "reward": ...}. parts: {name: object};
    a checkpoint has those attributes of each that object.saved names. With cfg.resume, weights, moments and attributes
    are those of the latest checkpoint. before_save: called before each checkpoint.
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
        """Restore the run from a checkpoint's folder; return its step."""
        state = load_checkpoint(folder, self.model, self.optimizers)
        if state.keys() != {"step", "inputs", *self.parts}:
            raise BadInput(f"{folder} was saved by another version of this project and cannot be resumed")
        old, new = state["inputs"], self.inputs
        if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            hashes = ", ".join(f"{name} ({old.get(name, '-')} then, {new.get(name, '-')} now)" for name in changed)
            if not self.cfg.force:
                raise BadInput(f"{folder} was made with different inputs: {hashes}. --force resumes anyway")
            print(f"warning: resuming with different inputs: {hashes}", file=sys.stderr)
        for name, part in self.parts.items():
            for attribute in part.saved:
                setattr(part, attribute, state[name][attribute])
        print(f"resuming from {folder}", flush=True)
        return state["step"]

    def steps(self, end):
        """Yield first_step to end - 1. After Ctrl-C or SIGTERM, finish the step, save it, and raise Stopped."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        self.start = time.monotonic()
        try:
            for step in range(self.first_step, end):
                self.step, stop = step, self.ranks.any(self.signal)
                if step > self.first_step and (stop or self.due()):
                    self.save()
                if stop:
                    raise Stopped(stop)
                yield step
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def due(self):
        elapsed = time.monotonic() - self.start
        affordable = self.spent + self.cost <= self.cfg.save_share * (elapsed + self.cost)
        return self.step % self.cfg.save_every == 0 and affordable

    def save(self):
        """Write a checkpoint from before the current step, unless it exists."""
        if self.ranks.rank or (Path(self.out) / CHECKPOINTS / step_name(self.step)).is_dir():
            return
        start = time.monotonic()
        self.before_save()
        parts = {name: {a: getattr(part, a) for a in part.saved} for name, part in self.parts.items()}
        state = {"step": self.step, "inputs": self.inputs} | parts
        save_checkpoint(self.out, self.model, self.optimizers, state, self.cfg.keep)
        self.cost = time.monotonic() - start
        self.spent += self.cost

    def save_before(self, error):
        """Save a checkpoint from before the current step; return the error with a hint to resume."""
        self.save()
        return BadInput(
            f"{error}. The run is saved: --resume resumes it at step {self.step}, with --force if you changed the file "
            "of the reward"
        )

    def _handle(self, number, frame):
        if self.signal and number == signal.SIGINT:  # a second Ctrl-C: at once. torchrun may send SIGTERM twice
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, b"\nstopping after this step; press Ctrl-C again to stop now\n")  # print is not safe in handlers


class BestWeights:
    """The best weights of a model so far, copied to memory and written with the next checkpoint.

    A kill between the two leaves weights on disk that are newer than the checkpoint: the resumed run finds them again.
    save: called with the state dict.
    """

    def __init__(self, model, save):
        self.model, self.save, self.weights = model, save, None

    def keep(self):
        self.weights = {name: t.detach().to("cpu", copy=True) for name, t in self.model.state_dict().items()}

    def write(self):
        if self.weights:
            self.save(self.weights)
            self.weights = None


def delete_checkpoints(out):
    """Delete all checkpoints of a run. A kill leaves all of them or none."""
    if (Path(out) / CHECKPOINTS).is_dir():
        gone = Path(out) / (SAVING + CHECKPOINTS)  # a later run removes it if this one is killed
        os.replace(Path(out) / CHECKPOINTS, gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(out):
    """Delete the temporary folders of runs that were killed while they saved."""
    for parent in (Path(out), Path(out) / CHECKPOINTS, Path(out) / BEST):
        for folder in parent.glob(SAVING + "*"):
            shutil.rmtree(folder, ignore_errors=True)
