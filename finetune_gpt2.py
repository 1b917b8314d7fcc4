"""Fine-tune GPT-2 on movie reviews as a language model: the start of PPO, and its frozen reference.

    python finetune_gpt2.py                                      # gpt2 from the hub on IMDB
    python finetune_gpt2.py --preset mini                        # on a CPU: asset/mini/gpt2 goes on for a minute
    python finetune_gpt2.py --preset mini --init_from scratch    # how asset/mini/gpt2 was made, in hours
    python finetune_gpt2.py --reviews positive                   # the plain way, to compare PPO with
    torchrun --nproc_per_node 8 finetune_gpt2.py                 # on eight GPUs

Writes a Hugging Face folder with the weights that were best on the validation stream, log.jsonl, results.json and
the run's config to finetune_checkpoints/<preset>/. --resume resumes a run that was stopped.
"""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import RESULTS, BestWeights, Checkpoints, check_run, delete_checkpoints, fingerprint, write_text
from config import BadInput, FinetuneConfig, run
from data import block_order, digest, language_model_texts, load_splits, pack, texts_of, train_bpe
from device import ONE_PROCESS, join, micro_batch_size, pick_device, to_device
from hub import SAVE_DTYPES, load_gpt2, open_gpt2, save_gpt2
from log import RunLog, finetune_sheet
from model import GPT2, GPT2Config
from optimizer import Stepper, make_optimizers


def plan(n_tokens, cfg, processes=1):
    """(blocks in a stream of n_tokens, blocks of all epochs, optimizer steps over these); BadInput without a step.

    Each process has an equal share of every step, of the last one too: what is left over is not trained on.
    """
    n_blocks = (n_tokens - 1) // cfg.block_size  # the last token of a block has a target too
    trained_blocks = int(cfg.epochs * n_blocks) // processes * processes
    steps = math.ceil(trained_blocks / cfg.batch_size)
    if steps < 1:
        raise BadInput(
            f"dataset {cfg.dataset}: {n_tokens} tokens are no block of {cfg.block_size} in {cfg.epochs} epochs"
        )
    return n_blocks, trained_blocks, steps


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


def train_step(model, x, y, cfg, ranks=ONE_PROCESS):
    """Gradients of the mean loss over a batch (B, block_size), summed up by micro-batches. Returns the loss.

    Of several processes each has an equal share of the batch, so that the mean of their losses is the batch's.
    """
    loss, size = 0.0, cfg.micro_batch_size // ranks.size
    micro_batches = x.split(size)
    for i, (xs, ys) in enumerate(zip(micro_batches, y.split(size))):
        with ranks.accumulate(model, last=i == len(micro_batches) - 1):
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


def write_results(cfg, model, before, after, facts):
    """results.json, and a line on the terminal. before, after: (perplexity, bits per character) each."""
    names = ("perplexity", "bits_per_character")
    results = facts | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "before": dict(zip(names, before)),
        "after": dict(zip(names, after)),
    }
    write_text(Path(cfg.out) / RESULTS, json.dumps(results, indent=1))
    change = f"{before[0]:.2f} before, {after[0]:.2f} after, {after[1]:.3f} bits a character"
    print(f"validation perplexity {change}: {cfg.out}")


def main(cfg):
    check_run(cfg, "model.safetensors")
    device, bf16 = pick_device(cfg)
    ranks = join(device, cfg, "micro_batch_size")
    opened = None if cfg.init_from == "scratch" else open_gpt2(cfg.init_from)
    if opened and cfg.block_size > opened[1].n_positions:
        raise BadInput(f"block_size {cfg.block_size} is over the {opened[1].n_positions} positions of {cfg.init_from}")

    splits = load_splits(cfg.dataset, cfg.text_column, cfg.label_column)
    texts = language_model_texts(splits, cfg.reviews)
    model, tokenizer = start_model(cfg, opened, texts, bf16)
    model.to(device)
    size = micro_batch_size(cfg, cfg.batch_size, cfg.block_size, model, 3, device, ranks)
    cfg = replace(cfg, micro_batch_size=size)
    stream, data = pack(texts, tokenizer), digest(texts)
    n_blocks, trained_blocks, steps = plan(len(stream), cfg, ranks.size)
    validation_reviews = validation_texts(texts_of(splits["prompts"], cfg.reviews), tokenizer, cfg.eval_tokens)
    validation, characters = pack(validation_reviews, tokenizer), sum(map(len, validation_reviews))

    def look(model):
        return validate(model, validation, characters, cfg.block_size, cfg.micro_batch_size, tokenizer.eos_token_id)

    matrices = [p for p in model.h.parameters() if p.dim() == 2] if cfg.optimizer == "muon" else []
    optimizers = make_optimizers(model, matrices, cfg.lr, cfg.weight_decay, (cfg.beta1, cfg.beta2), muon_lr=cfg.muon_lr)
    stepper = Stepper(model, optimizers, cfg.grad_clip)
    inputs = {"texts": data, "tokenizer": fingerprint(tokenizer.backend_tokenizer.to_str())}
    state = {"inputs": inputs, "start": None, "best": None, "skips": stepper.skips}
    dtype = SAVE_DTYPES[cfg.save_dtype]
    best_weights = BestWeights(model, lambda w: save_gpt2(model, tokenizer, cfg.out, dtype=dtype, weights=w))
    checkpoints = Checkpoints(cfg, cfg.out, model, optimizers, state, ranks, best_weights.write)
    state, stepper.skips = checkpoints.state, checkpoints.state["skips"]
    log = RunLog(cfg, model, first_step=checkpoints.first_step, rank=ranks.rank)
    if cfg.compile:
        model.compile(dynamic=True)  # the last block of the validation stream is shorter
    learner = ranks.learner(model)
    counts = len(texts), len(stream), len(validation_reviews), len(validation)
    print(finetune_sheet(cfg, model, steps, *counts, device), flush=True)
    progress = log.progress(checkpoints, steps + 1, "fine-tune", "step")
    for step in progress:
        metrics = {}
        if step % cfg.eval_every == 0 or step == steps:
            now = look(model)
            metrics = dict(zip(("val_perplexity", "val_bits_per_character"), now))
            progress.write(f"step {step} | validation perplexity {now[0]:.2f} | {now[1]:.3f} bits a character")
            state["start"] = state["start"] or now
            best = state["best"] is None or now[0] < state["best"][0] or cfg.weights == "last"
            if best and ranks.rank == 0:
                state["best"] = now
                best_weights.keep()
        if step < steps:
            clock = time.time()
            numbers = block_order(step, n_blocks, cfg.batch_size, trained_blocks, cfg.seed)
            x, y = (to_device(t, device) for t in blocks(stream, ranks.share(numbers), cfg.block_size))
            lr = learning_rate(step, steps, cfg)
            stepper.set_lr(lr / cfg.lr)
            loss = train_step(learner, x, y, cfg, ranks).item()
            metrics |= ranks.mean(dict(loss=loss)) | dict(lr=lr, grad_norm=stepper.step())
            tok_s = len(numbers) * cfg.block_size / (time.time() - clock)
            metrics |= dict(skipped_steps=stepper.skipped, tokens_per_second=tok_s)
            progress.set_postfix(loss=f"{metrics['loss']:.3f}", lr=f"{lr:.1e}", tok_s=f"{tok_s:.0f}", refresh=False)
        log.write(step, tokens=step * cfg.batch_size * cfg.block_size, **metrics)
    seconds = log.close()
    if ranks.rank == 0:
        best_weights.write()
        stored = load_gpt2(Path(cfg.out), model.config, len(tokenizer), bf16).to(device)  # as it was rounded
        facts = {"data": data, "tokens": trained_blocks * cfg.block_size, "validation_tokens": len(validation)}
        write_results(cfg, stored, state["start"], look(stored), facts | {"seconds": seconds})
        delete_checkpoints(cfg.out)


if __name__ == "__main__":
    run(main, FinetuneConfig)
