"""Folders on disk: find a model, read its tensors one by one, and save whole or not at all.

Weights are read from safetensors, or from pytorch_model.bin with weights_only: nothing here can run code from a file.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from config import PRESETS, BadInput, differing

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MADE_BY = {"finetune_checkpoints": "finetune_gpt2.py", "reward_checkpoints": "reward.py", "ppo_checkpoints": "ppo.py"}
RUN_CONFIG = "run_config.json"  # the config of the run, beside Hugging Face's config.json of the model


def locate(name):
    """The local folder of a model: `name` itself if it is one, else the hub's copy, from its cache where there is one.

    Raises BadInput when config.json or the weights are nowhere to be had; for a folder that a script of this project
    makes it names the command. Only the files of a PyTorch checkpoint are fetched.
    """
    folder = Path(name)
    script = MADE_BY.get(folder.parts[0]) if folder.parts else None
    if not (folder.is_dir() or script or name.startswith((".", "/", "~"))):
        return _from_hub(name)
    if not (folder / "config.json").is_file():
        preset = next((f" --preset {part}" for part in folder.parts if part in PRESETS), "")
        hint = f"; make it with: python {script}{preset}" if script else ""
        raise BadInput(f"{name} holds no model: looked for {folder / 'config.json'}{hint}")
    weight_file(folder)
    return folder


def _from_hub(name):
    small = ["config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
    problem = None
    for local in (True, False):  # the cache first: no network where none is needed
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            try:
                folder = Path(snapshot_download(name, allow_patterns=[*small, weights], local_files_only=local))
                if (folder / "config.json").is_file() and any((folder / file).is_file() for file in WEIGHTS):
                    return folder
            except HFValidationError:
                raise BadInput(f"{name!r} is neither a folder here nor a name on the Hugging Face hub") from None
            except (OSError, ValueError) as error:  # offline, no such name, gated
                problem = str(error).strip().splitlines()[0]
    raise BadInput(
        f"model {name!r}: no such folder, not in the Hugging Face cache ({HF_HUB_CACHE}), and the hub did not give it "
        f"({problem}). Use --preset mini, which needs no network, or give a local folder"
    )


def weight_file(folder):
    """The file to read weights from, safetensors before pickles; BadInput names what was looked for."""
    found = [name for name in WEIGHTS if (folder / name).is_file()]
    if found:
        return folder / found[0]
    raise BadInput(f"{folder} holds no weights: looked for {', '.join(WEIGHTS)}")


def read_json(path):
    """The object in a JSON file; BadInput with the path when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None


def read_tensors(folder):
    """Yield (name, tensor) of a checkpoint, single or sharded, on the CPU, each tensor a copy of its own.

    A safetensors file is opened once a tensor, so that no more than one tensor is in memory beside the model.
    """
    first = weight_file(Path(folder))
    if first.suffix == ".safetensors" and (first.parent / "pytorch_model.bin").is_file():
        print(f"{folder}: reading {first.name}, not the pytorch_model.bin beside it", file=sys.stderr)
    if first.suffix == ".json":
        files = sorted({first.parent / name for name in read_json(first)["weight_map"].values()})
    else:
        files = [first]
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as f:
                    names = list(f.keys())
                for name in names:
                    with safe_open(file, framework="pt") as f:
                        tensor = f.get_tensor(name).clone()
                    yield name, tensor
            else:
                yield from torch.load(file, map_location="cpu", weights_only=True).items()
        except (SafetensorError, OSError, RuntimeError, EOFError) as error:
            raise BadInput(f"{file} is damaged or missing: {str(error).splitlines()[0]}") from None


def check_run(cfg):
    """BadInput if cfg.out holds a run of another config and cfg.force is not set. Nothing is written: see RunLog."""
    file = Path(cfg.out) / RUN_CONFIG
    if file.is_file() and not cfg.force:
        changed = differing(cfg, read_json(file))
        if changed:
            raise BadInput(
                f"{cfg.out} holds a run of another config ({', '.join(changed[:5])}): --force True replaces it, "
                "--out names another folder"
            )


def need_disk(out, model):
    """BadInput unless the disk has room for two copies of the model: the old one stays until the new one is whole."""
    need, free = 2 * sum(p.numel() * p.element_size() for p in model.parameters()), shutil.disk_usage(out).free
    if free < need:
        raise BadInput(
            f"{out} has {free:,} bytes free, saving the model needs {need:,}: free some, or use another folder by --out"
        )


@contextmanager
def replacing(out):
    """A temporary folder beside the files of `out`; at the end of the block its files take their places there.

    A crash inside the block leaves `out` as it was; files that the block does not write stay.
    """
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=out) as temporary:
        yield Path(temporary)
        files = sorted(Path(temporary).iterdir())
        umask = os.umask(0)
        os.umask(umask)
        mode = 0o666 & ~umask  # what open() gives; safetensors makes its files unreadable to others
        for file in files:
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
        for file in files:
            os.chmod(file, mode)
            os.replace(file, Path(out) / file.name)


def write_text(path, text):
    """Write a text file so that a reader sees the old or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def match(state, expected, where):
    """Raise BadInput unless the tensors in `state` have exactly the names and shapes in `expected` (name -> shape)."""
    problems = [f"missing {name} {tuple(expected[name])}" for name in expected if name not in state]
    problems += [f"unexpected {name} {tuple(state[name].shape)}" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name])}"
        for name in expected
        if name in state and state[name].shape != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BadInput(f"{where} does not fit: {'; '.join(problems[:5])}{more}")


MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old releases stored among the weights
