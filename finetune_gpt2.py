"""Fine-tune GPT-2 on movie reviews as a language model: PPO's initial policy and its frozen reference.

    python finetune_gpt2.py                                      # gpt2 from the hub on IMDB
    python finetune_gpt2.py --preset mini                        # on a CPU: train asset/mini/gpt2 for another minute
    python finetune_gpt2.py --preset medium                      # a GPT-2 of 30 M parameters from scratch, in hours
    python finetune_gpt2.py --preset mini --init_from scratch    # as asset/mini/gpt2 was trained: medium is its teacher
    python finetune_gpt2.py --reviews positive                   # a baseline for PPO: positive reviews only
    torchrun --nproc_per_node 8 finetune_gpt2.py                 # on eight GPUs

Writes a Hugging Face folder with the weights that were best on the validation stream, log.jsonl, results.json and
the run's config to finetune_checkpoints/<preset>/. --resume resumes a run that was stopped.
"""

import runtime  # isort: skip  # noqa: F401 - first, since it refuses a Python older than 3.11
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from config import FinetuneConfig
from data import block_order, encode, language_model_texts, load_splits, pack, train_bpe
from model import GPT2, GPT2Config
from runtime.checkpoint import RESULTS, BestWeights, Checkpoints, check_run, delete_checkpoints, fingerprint, write_text
from runtime.cli import run
from runtime.device import DTYPES, micro_batch_size, pick_device, seed_of, to_device
from runtime.distributed import join
from runtime.errors import BadInput
from runtime.hub import load_gpt2, open_gpt2, save_gpt2, tokenizer_text
from runtime.log import RunLog, finetune_sheet
from runtime.optimizer import Stepper, make_optimizers


def plan(n_tokens, cfg, processes=1):
    """Return the numbers of blocks in a stream of n_tokens, of blocks in all epochs, and of optimizer steps.

    Each process has an equal share of every step; leftover blocks are not used. Raises BadInput if there is no step.
    """
    n_blocks = (n_tokens - 1) // cfg.block_size  # the last token of a block has a target too
    trained_blocks = int(cfg.epochs * n_blocks) // processes * processes
    steps = math.ceil(trained_blocks / cfg.batch_size)
    if steps < 1:
        raise BadInput(
            f"dataset {cfg.dataset}: {n_tokens} tokens give no block of {cfg.block_size} in {cfg.epochs} epochs"
        )
    return n_blocks, trained_blocks, steps


def blocks(stream, numbers, block_size):
    """Return inputs and targets, (len(numbers), block_size) each: blocks of the stream (N,) and their next tokens."""
    indices = numbers[:, None] * block_size + np.arange(block_size)
    return torch.from_numpy(stream[indices]).long(), torch.from_numpy(stream[indices + 1]).long()


def learning_rate(step, steps, cfg):
    """Return lr for a step: linear warm-up from lr / (warmup_steps + 1), then a cosine to min_lr at the last step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / (cfg.warmup_steps + 1)
    done = (step - cfg.warmup_steps) / max(1, steps - 1 - cfg.warmup_steps)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (cfg.lr - cfg.min_lr)


@torch.no_grad()
def validate(model, stream, characters, block_size, batch_size, eos_id):
    """Return perplexity (per token) and bits per character of a fixed stream; each token is predicted exactly once.

    stream: (N,) ids of whole reviews with <|endoftext|> after each; characters: their total length. A token's
    context is what precedes it in its block of block_size; for the first token of the stream, <|endoftext|>. The sum of
    all negative log-likelihoods is divided once, so that the batch size does not change the result.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()  # no dropout
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
    model.train(training)
    return math.exp(nll / len(stream)), nll / math.log(2) / characters


def validation_texts(texts, tokenizer, n_tokens):
    """Return the first reviews, as many as are needed for n_tokens tokens with <|endoftext|> after each."""
    ends = np.cumsum([len(ids) + 1 for ids in encode(texts, tokenizer)])
    return texts[: np.searchsorted(ends, n_tokens) + 1]


@torch.no_grad()
def soft_targets(teacher, x, y, share):
    """Return share * the teacher's probabilities + (1 - share) * those of the next token: (B, L) ids -> (B * L, V).

    Hinton et al. 2015, section 2, at temperature 1.
    """
    probs = teacher(x).flatten(0, 1).softmax(-1).mul_(share)
    return probs.scatter_add_(1, y.view(-1, 1), torch.full_like(probs[:, :1], 1 - share))


def train_step(stepper, x, y, cfg, teacher=None):
    """Accumulate the gradients of the mean loss over a batch (B, block_size) in micro-batches. Return the loss.

    x, y: this process's share of the batch. Shares are equal, so the mean of their losses is the loss of the batch.
    """
    loss, size = 0.0, cfg.micro_batch_size // stepper.ranks.size
    for xs, ys in zip(x.split(size), y.split(size)):
        targets = soft_targets(teacher, xs, ys, cfg.teacher_share) if teacher else ys.flatten()
        part = F.cross_entropy(stepper.model(xs).flatten(0, 1), targets, reduction="sum") / y.numel()
        stepper.backward(part)
        loss += part.detach()
    return loss


def initial_model(cfg, opened, texts, dtype):
    """Return (GPT2, tokenizer): those of open_gpt2, or random weights and a tokenizer trained on texts."""
    if opened:
        folder, config, tokenizer = opened
        return load_gpt2(folder, config, len(tokenizer), dtype), tokenizer
    print(f"training a tokenizer of {cfg.vocab_size:,} tokens", flush=True)
    tokenizer = train_bpe(texts, cfg.vocab_size)
    torch.manual_seed(cfg.seed)
    config = GPT2Config(len(tokenizer), cfg.n_positions, cfg.n_embd, cfg.n_layer, cfg.n_head)
    return GPT2(config, dtype=dtype).init_weights(), tokenizer


def load_teacher(cfg, opened, tokenizer, dtype, device):
    """Return the GPT2 that open_gpt2 returned, or None for None. Raise BadInput if it cannot teach the model."""
    if not opened:
        return None
    folder, config, its_tokenizer = opened
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise BadInput(
            f"teacher {cfg.teacher} has another tokenizer than the model: train it on the same reviews with the same "
            "vocab_size, or train without one by --teacher ''"
        )
    if cfg.block_size > config.n_positions:
        raise BadInput(f"block_size {cfg.block_size} is over the {config.n_positions} positions of {cfg.teacher}")
    return load_gpt2(folder, config, len(tokenizer), dtype).to(device).requires_grad_(False)


class BestModel(BestWeights):
    """The weights with the lowest validation perplexity, or the last ones. start, best: first and best validation."""

    saved = ("start", "best")

    def __init__(self, model, tokenizer, cfg):
        super().__init__(model)
        self.tokenizer, self.cfg, self.start, self.best = tokenizer, cfg, None, None

    def update(self, validation):
        """Keep the current weights if `validation`, (perplexity, bits per character), is best, or weights "last"."""
        self.start = self.start or validation
        if self.best is None or validation[0] < self.best[0] or self.cfg.weights == "last":
            self.best = validation
            self.keep()

    def save(self, weights):
        save_gpt2(self.model, self.tokenizer, self.cfg.out, dtype=DTYPES[self.cfg.save_dtype], weights=weights)

    def finish(self, evaluate, results):
        """Write the model and results.json, with the validation of the first model and of the saved one."""
        self.write()
        saved = load_gpt2(Path(self.cfg.out), self.model.config, len(self.tokenizer), self.model.dtype)  # in save_dtype
        after, names = evaluate(saved.to(self.model.wte.weight.device)), ("perplexity", "bits_per_character")
        results |= {"parameters": sum(p.numel() for p in saved.parameters())}
        results |= {"before": dict(zip(names, self.start)), "after": dict(zip(names, after))}
        write_text(Path(self.cfg.out, RESULTS), json.dumps(results, indent=1))
        change = f"{self.start[0]:.2f} before, {after[0]:.2f} after, {after[1]:.3f} bits per character"
        print(f"validation perplexity {change}: {self.cfg.out}")
        delete_checkpoints(self.cfg.out)


def main(cfg):
    check_run(cfg, "model.safetensors")
    device, dtype = pick_device(cfg)
    ranks = join(device, cfg)
    opened = None if cfg.init_from == "scratch" else open_gpt2(cfg.init_from)
    opened_teacher = open_gpt2(cfg.teacher) if cfg.teacher else None
    if opened and cfg.block_size > opened[1].n_positions:
        raise BadInput(f"block_size {cfg.block_size} is over the {opened[1].n_positions} positions of {cfg.init_from}")

    splits = load_splits(cfg.dataset, cfg.text_column, cfg.label_column)
    texts = language_model_texts(splits, cfg.reviews)
    model, tokenizer = initial_model(cfg, opened, texts, dtype)
    model.to(device).set_dropout(cfg.dropout)
    teacher = load_teacher(cfg, opened_teacher, tokenizer, dtype, device)
    size = micro_batch_size(cfg, cfg.batch_size, cfg.block_size, model, 3, device, ranks)
    cfg = replace(cfg, micro_batch_size=size)
    stream, data = pack(texts, tokenizer), fingerprint(*texts)
    n_blocks, trained_blocks, steps = plan(len(stream), cfg, ranks.size)
    held_out = validation_texts(language_model_texts(splits, cfg.reviews, ["prompts"]), tokenizer, cfg.eval_tokens)
    validation, characters = pack(held_out, tokenizer), sum(map(len, held_out))
    sizes = dict(block_size=cfg.block_size, batch_size=size, eos_id=tokenizer.eos_token_id)
    evaluate = partial(validate, stream=validation, characters=characters, **sizes)

    matrices = [p for p in model.h.parameters() if p.dim() == 2] if cfg.optimizer == "muon" else []
    optimizers = make_optimizers(model, matrices, cfg.lr, cfg.weight_decay, (cfg.beta1, cfg.beta2), muon_lr=cfg.muon_lr)
    stepper, best = Stepper(model, optimizers, cfg.grad_clip, ranks, dtype), BestModel(model, tokenizer, cfg)
    inputs = {"texts": data, "tokenizer": fingerprint(tokenizer_text(tokenizer))}
    if teacher:
        inputs["teacher"] = fingerprint(teacher)
    saved = {"stepper": stepper, "best": best}
    checkpoints = Checkpoints(cfg, cfg.out, model, optimizers, inputs, saved, ranks, best.write)
    log = RunLog(cfg, first_step=checkpoints.first_step, rank=ranks.rank)
    if cfg.compile:
        model.compile(dynamic=True)  # the last block of the validation stream is shorter
    counts = len(texts), len(stream), len(held_out), len(validation)
    print(finetune_sheet(cfg, model, teacher, steps, *counts, device), flush=True)

    for step in log.progress(checkpoints, steps + 1, "fine-tune", "step"):
        metrics = {}
        if step % cfg.eval_every == 0 or step == steps:
            perplexity, bits = evaluate(model)
            metrics = dict(val_perplexity=perplexity, val_bits_per_character=bits)
            log.print(f"step {step} | validation perplexity {perplexity:.2f} | {bits:.3f} bits per character")
            best.update((perplexity, bits))
        if step < steps:
            start = time.time()
            numbers = block_order(step, n_blocks, cfg.batch_size, trained_blocks, cfg.seed)
            x, y = (to_device(t, device) for t in blocks(stream, ranks.share(numbers), cfg.block_size))
            lr = learning_rate(step, steps, cfg)
            stepper.set_lr(lr / cfg.lr)
            torch.manual_seed(seed_of(cfg.seed, step, ranks.rank))  # of dropout
            loss = train_step(stepper, x, y, cfg, teacher).item()
            metrics |= ranks.mean(dict(loss=loss)) | dict(lr=lr, grad_norm=stepper.step())
            metrics["skipped_steps"] = stepper.skipped
            speed = metrics["tokens_per_second"] = len(numbers) * cfg.block_size / (time.time() - start)
            log.bar.set_postfix(loss=f"{metrics['loss']:.3f}", lr=f"{lr:.1e}", tok_s=f"{speed:.0f}", refresh=False)
        log.write(step, tokens=min(step * cfg.batch_size, trained_blocks) * cfg.block_size, **metrics)
    seconds = log.close()
    if ranks.rank == 0:
        results = {"data": data, "tokens": trained_blocks * cfg.block_size, "validation_tokens": len(validation)}
        best.finish(evaluate, results | {"seconds": seconds})


if __name__ == "__main__":
    run(main, FinetuneConfig)
