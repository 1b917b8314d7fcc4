"""Fine-tune GPT-2 on movie reviews as a language model: the start of PPO, and its frozen reference.

    python finetune_gpt2.py                                      # gpt2 from the hub on IMDB
    python finetune_gpt2.py --preset mini                        # on a CPU: asset/mini/gpt2 goes on for a minute
    python finetune_gpt2.py --preset mini --init_from scratch    # how asset/mini/gpt2 was made, in hours

Writes a Hugging Face folder with the weights that were best on the validation stream, log.jsonl, results.json and
the run's config to finetune_checkpoints/<preset>/. A run that was stopped goes on with --resume True.
"""

import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import (
    CHECKPOINTS,
    COPIES_WITH_CHECKPOINTS,
    RESULTS,
    SAVE_DTYPES,
    check_run,
    latest_checkpoint,
    load_checkpoint,
    load_gpt2,
    open_gpt2,
    save_checkpoint,
    save_gpt2,
    write_text,
)
from config import BadInput, FinetuneConfig, run
from data import block_order, digest, language_model_texts, load_splits, pack, train_bpe
from log import RunLog, finetune_sheet
from model import GPT2, GPT2Config, pick_device
from optimizer import Stepper, make_optimizers


def plan(n_tokens, cfg):
    """(blocks in a stream of n_tokens, optimizer steps over them); BadInput when there is not one."""
    n_blocks = (n_tokens - 1) // cfg.block_size  # the last token of a block has a target too
    steps = math.ceil(int(cfg.epochs * n_blocks) / cfg.batch_size)
    if steps < 1:
        raise BadInput(
            f"dataset {cfg.dataset}: {n_tokens} tokens are no block of {cfg.block_size} in {cfg.epochs} epochs"
        )
    return n_blocks, steps


def blocks(stream, numbers, block_size):
    """Inputs and targets, (len(numbers), block_size) each: a token's target is the next one, <|endoftext|> too."""
    at = numbers[:, None] * block_size + np.arange(block_size)
    return torch.from_numpy(stream[at]).long(), torch.from_numpy(stream[at + 1]).long()


def learning_rate(step, steps, cfg):
    """Linear warm-up from lr / (warmup_steps + 1), then a cosine that reaches min_lr at the last step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)
    done = (step - cfg.warmup_steps) / max(1, steps - 1 - cfg.warmup_steps)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (cfg.lr - cfg.min_lr)


@torch.no_grad()
def validate(model, stream, characters, block_size, batch_size, eos_id):
    """Perplexity (per token) and bits per character of a fixed stream, every token of it predicted exactly once.

    stream: (N,) ids of whole reviews with <|endoftext|> after each; characters: how many those reviews have. A token
    sees what precedes it in its block of block_size, no more; before the first one stands <|endoftext|>. The sum of
    all negative log-likelihoods is divided once, so the batch size changes nothing.
    """
    device = next(model.parameters()).device
    stream = torch.as_tensor(stream, dtype=torch.long)
    inputs, targets = torch.cat([torch.tensor([eos_id]), stream[:-1]]), stream
    whole = len(stream) // block_size * block_size
    batches = list(zip(*(t[:whole].view(-1, block_size).split(batch_size) for t in (inputs, targets)))) if whole else []
    if whole < len(stream):
        batches.append((inputs[None, whole:], targets[None, whole:]))
    nll = sum(
        F.cross_entropy(model(x.to(device)).flatten(0, 1), y.to(device).flatten(), reduction="sum").item()
        for x, y in batches
    )
    return math.exp(nll / len(stream)), nll / math.log(2) / characters


def validation_texts(texts, tokenizer, n_tokens):
    """The first whole reviews that make up about n_tokens tokens."""
    chosen, total = [], 0
    for text in texts:
        if total >= n_tokens:
            break
        chosen.append(text)
        total += len(tokenizer.tokenize(text)) + 1
    return chosen


def train_step(model, x, y, cfg):
    """Gradients of the mean loss over a batch (B, block_size), summed up by micro-batches. Returns the loss."""
    loss = 0.0
    for xs, ys in zip(x.split(cfg.micro_batch_size), y.split(cfg.micro_batch_size)):
        logits = model(xs)
        part = F.cross_entropy(logits.flatten(0, 1), ys.flatten(), reduction="sum") / y.numel()
        part.backward()
        loss += part.detach()
    return loss


def start_model(cfg, opened, texts, bf16):
    """(GPT2, tokenizer): from what open_gpt2 returned, or random weights and a tokenizer trained on texts."""
    if opened:
        folder, config, tokenizer = opened
        return load_gpt2(folder, config, len(tokenizer), bf16), tokenizer
    print(f"training a tokenizer of {cfg.vocab_size:,} tokens", flush=True)
    tokenizer = train_bpe(texts, cfg.vocab_size)
    torch.manual_seed(cfg.seed)
    config = GPT2Config(len(tokenizer), cfg.n_positions, cfg.n_embd, cfg.n_layer, cfg.n_head)
    return GPT2(config, bf16=bf16).init_weights(), tokenizer


def main(cfg):
    check_run(cfg)
    device, bf16 = pick_device(cfg)
    opened = None if cfg.init_from == "scratch" else open_gpt2(cfg.init_from)
    if opened and cfg.block_size > opened[1].n_positions:
        raise BadInput(f"block_size {cfg.block_size} is over the {opened[1].n_positions} positions of {cfg.init_from}")

    splits = load_splits(cfg.dataset)
    texts = language_model_texts(splits)
    model, tokenizer = start_model(cfg, opened, texts, bf16)
    model.to(device)
    stream, data = pack(texts, tokenizer), digest(texts)
    n_blocks, steps = plan(len(stream), cfg)
    validation_reviews = validation_texts(splits["prompts"].texts, tokenizer, cfg.eval_tokens)
    validation = pack(validation_reviews, tokenizer), sum(map(len, validation_reviews))

    matrices = [p for p in model.h.parameters() if p.dim() == 2] if cfg.optimizer == "muon" else []
    optimizers = make_optimizers(model, matrices, cfg.lr, cfg.weight_decay, (cfg.beta1, cfg.beta2), muon_lr=cfg.muon_lr)
    stepper = Stepper(model, optimizers, cfg.grad_clip)
    state = {"step": 0, "start": None, "best": None, "skipped_steps": 0}
    if checkpoint := latest_checkpoint(cfg.out) if cfg.resume else None:
        state = load_checkpoint(checkpoint, model, optimizers, data)
        print(f"going on from {checkpoint}")
    first_step, start, best, stepper.skipped = (state[name] for name in ("step", "start", "best", "skipped_steps"))
    log = RunLog(cfg, model, first_step=first_step, copies=COPIES_WITH_CHECKPOINTS)
    if cfg.compile:
        model.compile()
    counts = len(texts), len(stream), len(validation_reviews), len(validation[0])
    print(finetune_sheet(cfg, model, steps, *counts, device), flush=True)

    progress = tqdm(range(first_step, steps + 1), "fine-tune", initial=first_step, total=steps + 1, unit="step")
    for step in progress:
        metrics = {}
        if step > first_step and step % cfg.save_every == 0:
            state = dict(step=step, start=start, best=best, skipped_steps=stepper.skipped, data=data)
            save_checkpoint(cfg.out, model, optimizers, state)
        if step % cfg.eval_every == 0 or step == steps:
            now = validate(model, *validation, cfg.block_size, cfg.micro_batch_size, tokenizer.eos_token_id)
            metrics = dict(zip(("val_perplexity", "val_bits_per_character"), now))
            progress.write(f"step {step} | validation perplexity {now[0]:.2f} | {now[1]:.3f} bits a character")
            start = start or now
            if best is None or now[0] < best[0]:
                best = now
                save_gpt2(model, tokenizer, cfg.out, dtype=SAVE_DTYPES[cfg.save_dtype])
        if step < steps:
            clock = time.time()
            numbers = block_order(step, n_blocks, cfg.batch_size, cfg.epochs, cfg.seed)
            x, y = (t.to(device) for t in blocks(stream, numbers, cfg.block_size))
            lr = learning_rate(step, steps, cfg)
            stepper.set_lr(lr / cfg.lr)
            loss = train_step(model, x, y, cfg).item()
            metrics |= dict(loss=loss, lr=lr, grad_norm=stepper.step(), skipped_steps=stepper.skipped)
            metrics["tokens_per_second"] = y.numel() / (time.time() - clock)
            tok_s = f"{metrics['tokens_per_second']:.0f}"
            progress.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", tok_s=tok_s, refresh=False)
        log.write(step, tokens=step * cfg.batch_size * cfg.block_size, **metrics)
    stored = load_gpt2(Path(cfg.out), model.config, len(tokenizer), bf16).to(device)  # as it was rounded
    after = validate(stored, *validation, cfg.block_size, cfg.micro_batch_size, tokenizer.eos_token_id)
    results = {
        "data": data,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": int(cfg.epochs * n_blocks) * cfg.block_size,
        "seconds": log.close(),
        "validation_tokens": len(validation[0]),
        "before": dict(zip(("perplexity", "bits_per_character"), start)),
        "after": dict(zip(("perplexity", "bits_per_character"), after)),
    }
    write_text(Path(cfg.out) / RESULTS, json.dumps(results, indent=1))
    shutil.rmtree(Path(cfg.out) / CHECKPOINTS, ignore_errors=True)  # the run is whole
    print(
        f"validation perplexity {start[0]:.2f} before, {after[0]:.2f} after, {after[1]:.3f} bits a character: {cfg.out}"
    )


if __name__ == "__main__":
    run(main, FinetuneConfig)
