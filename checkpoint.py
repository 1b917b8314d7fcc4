"""What a run needs to go on after kill -9: checkpoints that are there whole or not at all, and the files they are of.

A checkpoint is a folder, <out>/checkpoints/<step>/: tensors.safetensors with the weights and the optimizer's moments,
state.json with all else, and SHA256SUMS, which `sha256sum --check` understands. Random numbers are not in it: a run
draws them from its seed and the step (device.random_generator), so that going on is exact by construction.
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
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import BadInput, Stopped, differing
from device import ONE_PROCESS

RUN_CONFIG = "run_config.json"  # the config of the run, beside Hugging Face's config.json of the model
RESULTS = "results.json"  # the figures of a run that is whole
CHECKPOINTS = "checkpoints"  # in the folder of a run: a folder for each, which --resume resumes
BEST = "best"  # in the folder of a PPO run: the policy with the highest objective so far, as a model folder
VIEWER = "viewer.json"  # what evaluate.py tells of each token of some answers
OTHER_CARD = "MODEL_CARD.md"  # the card of a policy where README.md is somebody else's
CARD, CARD_MARK = "README.md", "<!-- written by evaluate.py, which replaces it -->"  # the card of a policy
WRITTEN = (RESULTS, VIEWER, "samples.md", "example_results.png", "learning_curves.png", "report.html")  # of weights
TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"  # the files of a checkpoint
REVISIONS = {}  # of what this process read from the Hugging Face hub, {name: commit}: part of run_config.json
DISK_SPEED = 2e8  # bytes a second of a checkpoint: what a slow disk does, hashes included
SAVING = ".saving-"  # how the name of a folder begins while it is written; what a kill left of it is swept away

# ---- reading


def first_line(error):
    """The first line of what an exception says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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


def need_disk(out, model, copies=2):
    """BadInput unless the disk has room for so many copies of the model: an old one stays until its heir is whole."""
    need, free = copies * sum(p.numel() * p.element_size() for p in model.parameters()), shutil.disk_usage(out).free
    if free < need:
        raise BadInput(
            f"{out} has {free:,} bytes free, saving the model needs {need:,}: free some, or use another folder by --out"
        )


# ---- checkpoints


def save_checkpoint(out, model, optimizers, state, keep=2):
    """Write all that a run needs to go on: weights, the optimizers' moments and the loop's own state, JSON with "step".

    The folder out/checkpoints/<step>/ appears whole or not at all; then all but the `keep` latest are deleted.
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
        (folder / SUMS).write_text("".join(f"{sha256(folder / file)}  {file}\n" for file in (TENSORS, STATE)))
        synced(folder)
        os.replace(folder, parent / name)
        sync_folder(parent)
    for old in sorted(parent.glob("[0-9]*"))[:-keep]:
        shutil.rmtree(old)


def step_name(step):
    """The name of a checkpoint's folder."""
    return f"{step:08d}"


def fingerprint(*parts):
    """16 hexadecimal digits of a hash of texts, and of the weights of models: the same only for the same content."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            whole.update(part.encode() + b"\0")
        else:
            for name, tensor in part.state_dict().items():
                whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
                whole.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return whole.hexdigest()[:16]


def sha256(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def latest_checkpoint(out):
    """The folder of the latest checkpoint of a run, or None."""
    return max((Path(out) / CHECKPOINTS).glob("[0-9]*"), default=None)


def load_checkpoint(folder, model, optimizers, inputs, force=False):
    """Put weights and moments back where save_checkpoint took them from; returns the loop's own state.

    inputs: hashes of what the run depends on besides its config, {"texts": ..., "reward": ...}; BadInput where those in
    the checkpoint's state differ (with force a warning), or where a file is not the one that was written.
    """
    check_sums(folder)
    state = read_json(folder / STATE)
    before = state.get("inputs", {})
    if changed := [name for name in {**before, **inputs} if before.get(name) != inputs.get(name)]:
        found = ", ".join(
            f"{name} ({before.get(name) or 'none'} then, {inputs.get(name) or 'none'} now)" for name in changed
        )
        if not force:
            raise BadInput(f"{folder} was made with another content of: {found}. --force resumes all the same")
        print(f"warning: resuming with another content of: {found}", file=sys.stderr)
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
            moments[i].setdefault(j, {})[name] = tensor.clone()  # else it stays mapped to the file
    match(tensors, model.state_dict(), folder)
    model.load_state_dict(tensors)
    for optimizer, found in zip(optimizers, moments):
        optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def check_sums(folder):
    """BadInput unless every file of a checkpoint is there and, to the bit, the one that was written."""
    try:
        sums = dict(reversed(line.split()) for line in (folder / SUMS).read_text().splitlines())
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / SUMS} is damaged or missing: {first_line(error)}") from None
    for file in (TENSORS, STATE):
        if not (folder / file).is_file() or sha256(folder / file) != sums.get(file):
            raise BadInput(
                f"{folder / file} is damaged or missing: its SHA-256 is not that in {SUMS}; delete {folder} to go on "
                "from the checkpoint before it"
            )


class Checkpoints:
    """The steps of a loop, with a checkpoint every cfg.save_every of them and one before a signal ends the run.

    A checkpoint that is due is left out where those of this run, with it, would take more than cfg.save_share of the
    run's time; it is taken to need as long as the last one, the first one to be written at DISK_SPEED. state: the
    loop's own JSON values, which it changes in place; "inputs", as in load_checkpoint, stays. With cfg.resume they are
    those of the latest checkpoint in `out`, and so are weights and moments. before_save: called before each checkpoint,
    to write what belongs to it.
    """

    def __init__(self, cfg, out, model, optimizers, state, ranks=ONE_PROCESS, before_save=lambda: None):
        self.cfg, self.out, self.model, self.optimizers = cfg, out, model, optimizers
        self.ranks, self.state, self.signal, self.before_save = ranks, {"step": 0} | state, 0, before_save
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self.start, self.spent, self.cost = time.monotonic(), 0.0, 3 * size / DISK_SPEED  # s; weights and two moments
        if folder := latest_checkpoint(out) if cfg.resume else None:
            saved = load_checkpoint(folder, model, optimizers, state["inputs"], cfg.force)
            if "inputs" not in saved:
                raise BadInput(f"{folder} was saved by an earlier version of this project and cannot be resumed")
            self.state |= saved | {"inputs": state["inputs"]}
            print(f"resuming from {folder}", flush=True)
        self.first_step = self.state["step"]
        if self.ranks.any(self.first_step) != self.first_step:  # the largest of all processes
            raise BadInput(f"another process resumes from a checkpoint that is not in {out}: share that folder")

    def steps(self, end):
        """Yield first_step to end - 1. After Ctrl-C or SIGTERM the step is finished and saved, then Stopped raised."""
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        self.start = time.monotonic()
        try:
            for step in range(self.first_step, end):
                self.state["step"], stop = step, self.ranks.any(self.signal)
                if step > self.first_step and (stop or self.due(step)):
                    self.save()
                if stop:
                    raise Stopped(stop)
                yield step
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def due(self, step):
        elapsed = time.monotonic() - self.start
        affordable = self.spent + self.cost <= self.cfg.save_share * (elapsed + self.cost)
        return step % self.cfg.save_every == 0 and affordable

    def save(self):
        """Write a checkpoint of the state before the current step, unless it is there already."""
        if self.ranks.rank or (Path(self.out) / CHECKPOINTS / step_name(self.state["step"])).is_dir():
            return
        start = time.monotonic()
        self.before_save()
        save_checkpoint(self.out, self.model, self.optimizers, self.state, self.cfg.keep)
        self.cost = time.monotonic() - start
        self.spent += self.cost

    def _ask(self, number, frame):
        if self.signal and number == signal.SIGINT:  # a second Ctrl-C: at once. torchrun may send SIGTERM twice
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, b"\nstopping after this step; Ctrl-C once more stops at once\n")  # print is not for handlers


class BestWeights:
    """The best weights of a model so far: copied to memory when they are found, written with the next checkpoint.

    So finding a better model costs no write. A kill between the two leaves weights that are newer than the checkpoint:
    the resumed run finds the same ones again. save: called with the state dict.
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
    """The run is whole, or begins anew: there is nothing to go on from. A kill leaves all of them or none."""
    if (Path(out) / CHECKPOINTS).is_dir():
        gone = Path(out) / (SAVING + CHECKPOINTS)  # sweep deletes it where this process is not able to
        os.replace(Path(out) / CHECKPOINTS, gone)
        shutil.rmtree(gone, ignore_errors=True)


def sweep(out):
    """Delete what runs that were killed while they saved have left in a folder."""
    for parent in (Path(out), Path(out) / CHECKPOINTS, Path(out) / BEST):
        for folder in parent.glob(SAVING + "*"):
            with suppress(OSError):
                shutil.rmtree(folder)
