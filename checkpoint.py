"""Folders on disk: find a model, read it strictly, write it whole or not at all, in Hugging Face's format.

Weights are read from safetensors, or from pytorch_model.bin with weights_only: nothing here can run code from a file.
"""

import json
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import PRESETS, BadInput, differing
from model import GPT2, GPT2Config, Policy

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
HINTS = {  # first folder of a path: what to do when the model in it is missing
    "finetune_checkpoints": "make it with: python finetune_gpt2.py",
    "reward_checkpoints": "make it with: python reward.py",
    "ppo_checkpoints": "make it with: python ppo.py",
    "asset": "it comes with this repository: run the scripts in its folder",
}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D: (in, out)
VALUE_HEAD = "value_head.safetensors"
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old releases stored among the weights
RUN_CONFIG = "run_config.json"  # the config of the run, beside Hugging Face's config.json of the model
SAVE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # save_dtype: of stored weights
RESULTS = "results.json"  # the figures of a run that is whole
CHECKPOINTS = "checkpoints"  # in the folder of a run: a folder a step, what --resume True goes on from

# fields of config.json that would change the arithmetic, and the values that model.py implements
SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def locate(name):
    """The local folder of a model: `name` itself if it is one, else the hub's copy, from its cache where there is one.

    Raises BadInput when config.json or the weights are nowhere to be had; for a folder of this project it says what to
    do. Only the files of a PyTorch checkpoint are fetched.
    """
    folder = Path(name)
    hint = HINTS.get(folder.parts[0], "") if folder.parts else ""
    if not (folder.is_dir() or hint or name.startswith((".", "/", "~"))):
        return _from_hub(name)
    if not (folder / "config.json").is_file():
        if hint.endswith(".py"):
            hint += next((f" --preset {part}" for part in folder.parts if part in PRESETS), "")
        raise BadInput(f"{name} holds no model: looked for {folder / 'config.json'}{hint and '; '}{hint}")
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
                problem = first_line(error)
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
    """Yield (name, tensor) of a checkpoint, single or sharded, on the CPU."""
    first = weight_file(Path(folder))
    if first.suffix == ".safetensors" and (first.parent / "pytorch_model.bin").is_file():
        print(f"{folder}: reading {first.name}, not the pytorch_model.bin beside it", file=sys.stderr)
    if first.suffix != ".json":
        yield from read_file(first)
        return
    shards = read_json(first).get("weight_map")
    if not shards:
        raise BadInput(f"{first} names no shards: it has no weight_map")
    for name in sorted(set(shards.values())):
        yield from read_file(first.parent / name)


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


def first_line(error):
    """The first line of what an exception says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    unfinished, resume = latest_checkpoint(cfg.out), getattr(cfg, "resume", False)
    if unfinished and not (cfg.force or resume):
        raise BadInput(
            f"{cfg.out} holds an unfinished run: --resume True goes on with it, --force True begins anew, --out names "
            "another folder"
        )
    if resume and not unfinished and (Path(cfg.out) / RESULTS).is_file():
        raise BadInput(f"{cfg.out} holds a finished run: there is nothing to resume; without --resume it begins anew")


def need_disk(out, model, copies=2):
    """BadInput unless the disk has room for so many copies of the model: an old one stays until its heir is whole."""
    need, free = copies * sum(p.numel() * p.element_size() for p in model.parameters()), shutil.disk_usage(out).free
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
        for file in synced(temporary):
            os.replace(file, Path(out) / file.name)


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


def write_text(path, text):
    """Write a text file so that a reader sees the old or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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


# ---- what a run goes on from


COPIES_WITH_CHECKPOINTS = 2 + 3 * 3  # of a model on disk: old and new weights; two checkpoints kept, a third written


def save_checkpoint(out, model, optimizers, state, keep=2):
    """Write all that a run needs to go on: weights, the optimizers' moments and the loop's own state, JSON with "step".

    The folder out/checkpoints/<step>/ appears whole or not at all; then all but the `keep` latest are deleted.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for j, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{name}": tensor for name, tensor in moments.items()}
    parent = Path(out) / CHECKPOINTS
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=parent) as temporary:
        folder = Path(temporary) / "checkpoint"
        folder.mkdir()
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / "tensors.safetensors")
        (folder / "state.json").write_text(json.dumps(state, indent=1))
        synced(folder)
        os.replace(folder, parent / f"{state['step']:08d}")
    for old in sorted(parent.glob("[0-9]*"))[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(out):
    """The folder of the latest checkpoint of a run, or None."""
    return max((Path(out) / CHECKPOINTS).glob("[0-9]*"), default=None)


def load_checkpoint(folder, model, optimizers, data):
    """Put weights and moments back where save_checkpoint took them from; returns the loop's own state.

    data: the hash of the texts that the run learns from; BadInput where the checkpoint's state has another.
    """
    state = read_json(folder / "state.json")
    if state["data"] != data:
        raise BadInput(
            f"{folder} learned from other texts: their hash is {state['data']}, that of the dataset now {data}"
        )
    tensors, moments = {}, [{} for _ in optimizers]
    for name, tensor in read_file(folder / "tensors.safetensors"):
        kind, _, name = name.partition(".")
        if kind == "model":
            tensors[name] = tensor
        else:
            i, j, name = name.split(".")
            moments[int(i)].setdefault(int(j), {})[name] = tensor
    match(tensors, model.state_dict(), folder)
    model.load_state_dict(tensors)
    for optimizer, found in zip(optimizers, moments):
        optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


# ---- GPT-2 folders


def read_config(folder):
    """GPT2Config of a folder; BadInput when its config.json asks for arithmetic that model.py does not have."""
    file = Path(folder) / "config.json"
    values = read_json(file)
    for name, supported in SUPPORTED.items():
        found = values.get(name, supported[0] if name != "model_type" else None)
        if found not in supported:
            raise BadInput(f"{file}: {name} is {found!r}, supported: {', '.join(map(repr, supported))}")
    sizes = {f.name: values[f.name] for f in fields(GPT2Config) if values.get(f.name) is not None}
    for name, value in sizes.items():
        kind = float if name == "layer_norm_epsilon" else int
        if type(value) is not kind or value <= 0:
            raise BadInput(f"{file}: {name} is {value!r}, it must be a positive {kind.__name__}")
    config = GPT2Config(**sizes)
    if config.n_embd % config.n_head:
        raise BadInput(f"{file}: n_head {config.n_head} does not divide n_embd {config.n_embd}")
    return config


def load_tokenizer(folder, config=None):
    """The tokenizer of a folder; BadInput if it has no end-of-text token, or more ids than config.vocab_size."""
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except Exception as error:  # transformers raises whatever its readers do
        raise BadInput(f"{folder}: no tokenizer can be read ({first_line(error)})") from None
    if config and len(tokenizer) > config.vocab_size:
        raise BadInput(f"{folder}: the tokenizer has {len(tokenizer)} ids, the embedding {config.vocab_size} rows")
    if config and tokenizer.eos_token_id is None:
        raise BadInput(f"{folder}: the tokenizer has no end-of-text token (eos_token)")
    return tokenizer


def open_gpt2(name):
    """(folder, GPT2Config, tokenizer) of a folder or hub name: all that can be checked before its weights are read."""
    folder = locate(name)
    config = read_config(folder)
    return folder, config, load_tokenizer(folder, config)


def check_context(cfg, config):
    """BadInput unless the longest prompt and response of cfg fit the model."""
    if cfg.max_prompt_len + cfg.response_len > config.n_positions:
        raise BadInput(
            f"max_prompt_len {cfg.max_prompt_len} + response_len {cfg.response_len} is over the model's "
            f"{config.n_positions} positions"
        )


def load_gpt2(folder, config, n_tokens=None, bf16=False):
    """GPT2 from a Hugging Face folder, strictly: every tensor there, none left over, every shape right, or BadInput.

    The network is built without values and filled tensor by tensor, in float32 whatever they were stored in.
    """
    with torch.device("meta"):
        model = GPT2(config, n_tokens, bf16)
    model.to_empty(device="cpu")
    state, found, lm_head = model.state_dict(), {}, None
    for name, tensor in read_tensors(folder):
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight":
            lm_head = tensor
        elif not MASK_BUFFER.fullmatch(name):
            tensor = tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
            if name in state and state[name].shape == tensor.shape:
                state[name].copy_(tensor)
            found[name] = tensor.to("meta")
    match(found, state, folder)
    if lm_head is not None and not torch.equal(lm_head.float(), state["wte.weight"]):
        raise BadInput(f"{folder}: lm_head.weight differs from wte.weight, and GPT-2 ties them")
    return model


def load_policy(folder, config, tokenizer, bf16=False):
    """Policy of what open_gpt2 returned, with the value head that lies beside the weights, or else zeros."""
    policy = Policy(load_gpt2(folder, config, len(tokenizer), bf16))
    if (folder / VALUE_HEAD).is_file():
        head = dict(read_file(folder / VALUE_HEAD))
        match(head, policy.value_head.state_dict(), folder / VALUE_HEAD)
        policy.value_head.load_state_dict(head)
    return policy


def save_gpt2(model, tokenizer, out, value_head=None, dtype=torch.float32):
    """Write a plain Hugging Face GPT-2 folder into `out`: weights, config, tokenizer; the value head beside them.

    dtype: of the stored weights; the value head stays as it is.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu", dtype)
        state["transformer." + name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    config = dict(
        asdict(model.config),
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
        activation_function="gelu_new",
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=str(dtype).removeprefix("torch."),
    )
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise BadInput(f"{out} was not written: a weight is not a finite number in {dtype}")
    with replacing(out) as folder:
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        if value_head is not None:
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in value_head.state_dict().items()},
                folder / VALUE_HEAD,
            )
