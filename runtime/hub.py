"""Hugging Face folders: a model found on disk or on the hub, a GPT-2 read strictly, and written whole or not at all.

Weights are read from safetensors, or from pytorch_model.bin with weights_only: nothing here can run code from a file.
"""

import json
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file

from config import PRESETS
from model import GPT2, GPT2Config, Policy
from runtime.checkpoint import REVISIONS, fingerprint, match, read_file, read_json, replacing
from runtime.errors import BadInput, first_line

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.json with merges.txt", "vocab.txt", "*.model")  # one of them is enough
HINTS = {  # first folder of a path: what to do when the model in it is missing
    "finetune_checkpoints": "make it with: python finetune_gpt2.py",
    "reward_checkpoints": "make it with: python reward.py",
    "ppo_checkpoints": "make it with: python ppo.py",
    "asset": "it comes with this repository: run the scripts in its folder",
}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D: (in, out)
VALUE_HEAD = "value_head.safetensors"
SENTENCE = "the movie was good"  # which any tokenizer of English can encode
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old releases stored among the weights
SAVE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # save_dtype: of stored weights

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

    A hub name may end in a revision (branch, tag or commit): gpt2@main. Raises BadInput when config.json, the weights
    or the tokenizer are missing; for a folder of this project it says what to do. Only the files of a PyTorch
    checkpoint are downloaded.
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
    if not has_tokenizer(folder):
        raise BadInput(f"{folder} holds no tokenizer: looked for {', '.join(TOKENIZERS)}")
    return folder


def _from_hub(name):
    small = ["config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
    small.append("*.model")  # SentencePiece
    repo, _, revision = name.partition("@")
    problem, missing = None, ""
    for local in (True, False):  # the cache first: no network where none is needed
        for weights in ("model*.safetensors*", "pytorch_model*.bin*"):
            try:
                folder = snapshot(repo, local, patterns=[*small, weights], revision=revision or None)
            except HFValidationError:
                raise BadInput(f"{name!r} is neither a folder here nor a name on the Hugging Face hub") from None
            except OSError as error:  # offline, no such name, gated
                problem = error
                if not local:
                    break  # the other format of weights would fail in the same way
                continue
            found = {
                "config.json": (folder / "config.json").is_file(),
                f"weights ({', '.join(WEIGHTS)})": has_weights(folder),
                f"a tokenizer ({', '.join(TOKENIZERS)})": has_tokenizer(folder),
            }
            if all(found.values()):
                REVISIONS[name] = folder.name  # the cache's folders are named after the commit
                return folder
            problem, missing = None, " and ".join(what for what, there in found.items() if not there)
    if not problem:
        raise BadInput(f"model {name!r} on the Hugging Face hub lacks {missing}")
    cached = f"its copy in the Hugging Face cache ({HF_HUB_CACHE}) lacks {missing}"
    if not missing:
        cached = f"not in the Hugging Face cache ({HF_HUB_CACHE})"
    raise BadInput(
        f"model {name!r}: no such folder, {cached}, and the hub did not give it ({problem}). Use --preset mini, which "
        "needs no network, or give a local folder"
    )


def has_weights(folder):
    """Whether a folder holds a file of weights, with all the shards that it names."""
    for file in map(folder.joinpath, WEIGHTS):
        if file.is_file():
            return file.suffix != ".json" or all((folder / name).is_file() for name in shards(file))
    return False


def has_tokenizer(folder):
    """Whether a folder holds the files of a tokenizer: without them transformers builds an empty one."""
    names = {file.name for file in folder.iterdir()}
    return (
        not names.isdisjoint(("tokenizer.json", "vocab.txt"))
        or {"vocab.json", "merges.txt"} <= names
        or any(name.endswith(".model") for name in names)
    )


def snapshot(name, local, kind="model", patterns=None, revision=None):
    """Return the folder of a hub repository in the Hugging Face cache; without `local`, download what is missing there.

    kind: "model" or "dataset". patterns: of the files to download; None: all. Raises OSError with the reason in one
    line, or HFValidationError if no repository can have this name.
    """
    try:
        if not local:  # snapshot_download starts with the same request, but without a time limit
            HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=HF_HUB_ETAG_TIMEOUT)
        return Path(
            snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns, local_files_only=local)
        )
    except HFValidationError:
        raise
    except Exception as error:  # not only OSError: the HTTP library and hf_xet raise their own
        raise OSError(hub_problem(error)) from None


def hub_problem(error):
    """Why a download from the hub failed, in one line."""
    if isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error
    if isinstance(error, GatedRepoError):
        return "access is restricted: accept the terms on its page, then log in with: hf auth login"
    response = getattr(error, "response", None)
    if response is None:
        return first_line(error)
    hints = {
        401: ": no such repository, or a private one that needs a login: hf auth login",
        404: ": no such repository or revision",
    }
    return f"{response.status_code} {response.reason_phrase}{hints.get(response.status_code, '')}"


def weight_file(folder):
    """The file to read weights from, safetensors before pickles; BadInput names what was looked for."""
    found = [name for name in WEIGHTS if (folder / name).is_file()]
    if found:
        return folder / found[0]
    raise BadInput(f"{folder} holds no weights: looked for {', '.join(WEIGHTS)}")


def read_tensors(folder):
    """Yield (name, tensor) of a checkpoint, single or sharded, on the CPU."""
    first = weight_file(Path(folder))
    if first.suffix == ".safetensors" and (first.parent / "pytorch_model.bin").is_file():
        print(f"{folder}: reading {first.name}, not the pytorch_model.bin beside it", file=sys.stderr)
    if first.suffix != ".json":
        yield from read_file(first)
        return
    for name in shards(first):
        yield from read_file(first.parent / name)


def shards(index):
    """The names of the weight files that an index file (*.index.json) lists."""
    weight_map = read_json(index).get("weight_map")
    if not weight_map:
        raise BadInput(f"{index} names no shards: it has no weight_map")
    return sorted(set(weight_map.values()))


# ---- GPT-2


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
    """The tokenizer of a folder. BadInput if it cannot encode a sentence.

    With config, the tokenizer of a GPT-2: BadInput also if it decodes the sentence to another one, has no end-of-text
    token, or more ids than config.vocab_size.
    """
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        ids = tokenizer.encode(SENTENCE, add_special_tokens=False)
        decoded = tokenizer.decode(ids)
    except Exception as error:  # transformers raises whatever its readers do
        raise BadInput(f"{folder}: no tokenizer can be read ({first_line(error)})") from None
    if config and len(tokenizer) > config.vocab_size:
        raise BadInput(f"{folder}: the tokenizer has {len(tokenizer)} ids, the embedding {config.vocab_size} rows")
    if config and tokenizer.eos_token_id is None:
        raise BadInput(f"{folder}: the tokenizer has no end-of-text token (eos_token)")
    if set(ids) <= {tokenizer.unk_token_id} or config and decoded.split() != SENTENCE.split():
        raise BadInput(
            f"{folder}: the tokenizer encodes {SENTENCE!r} as {ids}, which it decodes as {decoded!r}: are its files "
            "complete?"
        )
    return tokenizer


def tokenizer_text(tokenizer):
    """Return what a tokenizer does as text, for fingerprints; of one written in Python, its vocabulary."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    return json.dumps(sorted(tokenizer.get_vocab().items()))


def policy_fingerprint(policy, tokenizer):
    """Return a hash of the weights, config and tokenizer of a policy."""
    return fingerprint(policy, str(policy.gpt2.config), tokenizer_text(tokenizer))


def open_gpt2(name):
    """(folder, GPT2Config, tokenizer) of a folder or hub name: all that can be checked before its weights are read."""
    folder = locate(name)
    config = read_config(folder)
    return folder, config, load_tokenizer(folder, config)


def open_pair(before, after):
    """{"before": ..., "after": ...}, what open_gpt2 returns of two names; BadInput unless they share one vocabulary."""
    opened = {"before": open_gpt2(before), "after": open_gpt2(after)}
    (_, config, tokenizer), (_, after_config, after_tokenizer) = opened.values()
    for what, a, b in (
        ("vocab_size", config.vocab_size, after_config.vocab_size),
        ("n_positions", config.n_positions, after_config.n_positions),
        ("size of the tokenizer", len(tokenizer), len(after_tokenizer)),
    ):
        if a != b:
            raise BadInput(f"{what} differs: {a} in {before}, {b} in {after}: the comparison needs one vocabulary")
    if tokenizer.get_vocab() != after_tokenizer.get_vocab():
        raise BadInput(f"{before} and {after} have different tokenizers: the comparison needs one vocabulary")
    return opened


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


def save_gpt2(model, tokenizer, out, value_head=None, dtype=torch.float32, weights=None):
    """Write a plain Hugging Face GPT-2 folder into `out`: weights, config, tokenizer; the value head beside them.

    dtype: of the stored weights; the value head stays as it is. weights: a state dict to write instead of the model's.
    """
    state = {}
    for name, tensor in (weights or model.state_dict()).items():
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
    head = {f"{VALUE_HEAD}: {name}": tensor for name, tensor in (value_head.state_dict() if value_head else {}).items()}
    with replacing(out, state | head) as folder:
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        if value_head is not None:
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in value_head.state_dict().items()},
                folder / VALUE_HEAD,
            )
