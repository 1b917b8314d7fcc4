"""What a run leaves to read: its config, log.jsonl, TensorBoard or W&B beside it; and tables for the terminal."""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import resource
import shutil
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import (
    BEST,
    CHECKPOINTS,
    REVISIONS,
    RUN_CONFIG,
    delete_checkpoints,
    delete_results,
    need_disk,
    sweep,
    write_text,
)
from config import BadInput, printable, sources
from device import peak_flops, warn
from model import exact_kl

SIDES = ("before PPO", "after PPO")  # titles of two columns
CPU_SHARE = 0.6  # of the speed of a large product, what a run on a CPU reaches: .5 to .74 in bench.py


class RunLog:
    """The log of a run in cfg.out, or of a part of it in a folder there: a JSON line a step, the same to cfg.report_to.

    Making one starts the run's folder: the config is written, with the commits of what came from the hub; log and
    checkpoints of an earlier run there are deleted; where a run is resumed at first_step, the log up to it stays and so
    do the checkpoints. BadInput when the folder cannot be written or the disk has no room for the model, a second copy
    of it and the checkpoints. Of several processes the one with rank 0 does all this, the others nothing.
    """

    def __init__(self, cfg, model, part="", first_step=0, rank=0):
        self.out, self.start, self.tensorboard, self.wandb = Path(cfg.out, part), time.time(), None, None
        self.file = self.samples = None
        if rank:
            return
        wandb = importlib.util.find_spec("wandb")
        if cfg.report_to == "wandb" and not (wandb and wandb.origin):  # without an origin: a folder of W&B's own files
            raise BadInput("report_to is wandb, which is not installed: pip install wandb, or --report_to tensorboard")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            sweep(self.out)
            # old and new weights; checkpoints of three times that, the weights and two moments, and one being written
            there = len(list((self.out / CHECKPOINTS).glob("[0-9]*"))) if first_step else 0
            need_disk(self.out, model, copies=2 + 3 * (max(cfg.keep - there, 0) + 1))
            if not first_step:
                delete_checkpoints(self.out)  # before the config: else a kill here could mix the two runs
                (self.out / CHECKPOINTS).mkdir()
            write_text(Path(cfg.out, RUN_CONFIG), json.dumps(asdict(cfg) | {"revisions": REVISIONS}, indent=1))
            earlier = self.keep("log.jsonl", first_step)
            self.file = open(self.out / "log.jsonl", "a", encoding="utf-8")
            if earlier:
                self.start -= earlier[-1]["seconds"]
            self.keep("samples.jsonl", first_step)
            if not first_step:
                (self.out / "wandb_id").unlink(missing_ok=True)
                shutil.rmtree(self.out / BEST, ignore_errors=True)
                delete_results(self.out)  # of the earlier run's weights
        except OSError as error:
            raise BadInput(f"cannot write to {self.out}: {error}") from None
        if cfg.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            if not first_step:
                shutil.rmtree(self.out / "tensorboard", ignore_errors=True)
            self.tensorboard = SummaryWriter(self.out / "tensorboard", purge_step=first_step)
        elif cfg.report_to == "wandb":
            import wandb

            file = self.out / "wandb_id"  # a resumed run continues the same run on W&B
            if not (file.is_file() and file.read_text()):
                write_text(file, wandb.util.generate_id())
            self.wandb = wandb.init(
                project="mini-rlhf", name=self.out.as_posix(), config=asdict(cfg), id=file.read_text(), resume="allow"
            )

    def keep(self, name, first_step):
        """Cut a file of JSON lines down to the steps before first_step, and delete it if none is left; returns them."""
        file = self.out / name
        lines = [line for line in read_lines(file) if isinstance(line, dict) and isinstance(line.get("step"), int)]
        earlier = [line for line in lines if line["step"] < first_step]
        if earlier:
            write_text(file, "".join(json.dumps(line) + "\n" for line in earlier))
        else:
            file.unlink(missing_ok=True)
        return earlier

    def progress(self, checkpoints, steps, name, unit):
        """The steps of a loop as a progress bar, from the one that is resumed at."""
        first, hidden = checkpoints.first_step, self.file is None
        return tqdm(checkpoints.steps(steps), name, initial=first, total=steps, unit=unit, disable=hidden)

    def write(self, step, **metrics):
        """Record the metrics of a step: floats and ints by name."""
        if not self.file:
            return
        self.write_line(self.file, dict(step=step, seconds=round(time.time() - self.start, 2), **metrics))
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def write_samples(self, step, samples):
        """Record responses to the same prompts: a dict each, see ppo.sample."""
        with open(self.out / "samples.jsonl", "a", encoding="utf-8") as file:
            self.write_line(file, dict(step=step, samples=samples))

    def write_line(self, file, line):
        try:
            file.write(json.dumps(line) + "\n")
            file.flush()
        except OSError as error:
            raise BadInput(f"{file.name} cannot be written: {error}; --resume resumes the run") from None

    def close(self):
        """End the log; returns the seconds that the run took, its earlier parts included."""
        if self.file:
            self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        return round(time.time() - self.start, 2)


def read_lines(file):
    """The lines of a log as dicts; one that a crash left half written is none, nor is there any without a file."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


@torch.no_grad()
def rollout_metrics(batch, policy, ref_policy, truncated_frac, cfg):
    """The metrics of a Rollout, as floats: see the README for what healthy values look like.

    kl is the one that is penalised (k1, summed over a response, mean over responses) with its standard error; kl_k3 is
    the estimator that is never negative, and kl_exact takes the whole vocabulary at each token, on 8 episodes.
    """
    mask, few = batch.mask, slice(8)
    kl = batch.kl.where(mask, 0)  # (B, T)
    exact = exact_kl(policy, ref_policy, batch.sequences[few], mask[few], batch.prompt_len, cfg.temperature)
    responses, returns = kl.sum(1), batch.returns[mask]
    metrics = {
        "score": batch.scores.mean(),
        "score_std": batch.scores.std(unbiased=False),
        "objective": batch.objective.mean(),
        "kl": responses.mean(),
        "kl_stderr": responses.std(unbiased=False) / len(responses) ** 0.5,
        "kl_k3": ((-kl).exp() - 1 + kl).sum(1).mean(),
        "kl_exact": exact.mean(),
        "entropy": -batch.logprobs[mask].mean(),  # nats a token, of the policy's own samples: unbiased
        "explained_variance": 1
        - (returns - batch.values[mask]).var(unbiased=False) / (returns.var(unbiased=False) + 1e-8),
        "response_length": mask.sum(1).float().mean(),
        "eos_frac": batch.ended.float().mean(),
        "truncated_frac": truncated_frac,
    }
    shares = {"positive_by_reward": batch.positive_by_reward, "positive_by_judge": batch.positive_by_judge}
    metrics |= {name: positive.mean() for name, positive in shares.items() if positive is not None}
    return {k: float(v) for k, v in metrics.items()} | {f"seconds_{k}": v for k, v in batch.seconds.items()} | {
        "tokens_per_second": int(mask.sum()) / batch.seconds["generate"],
        "peak_memory_gb": peak_memory(mask.device),
    }  # fmt: skip


class Watch:
    """Says when a run goes wrong: the KL is over its ceiling, or the judge falls while the score rises.

    The second is over-optimisation (Gao et al. 2022, arXiv:2210.10760): the policy has found what only the reward
    likes. Score and judge of the last cfg.alarm_window rollouts are compared half by half; a change counts from twice
    its standard error on. history: [score, share positive by the judge] of those rollouts, in a checkpoint's state.
    """

    def __init__(self, cfg, history):
        self.ceiling, self.window, self.history = cfg.kl_ceiling, cfg.alarm_window // 2 * 2, history
        self.over = False

    def __call__(self, metrics):
        """What is wrong after a rollout with these metrics, as text; empty where nothing is."""
        before, self.over = self.over, 0 < self.ceiling < metrics["kl"]
        if self.over and not before:  # said once for each time it goes there
            return f"KL is {metrics['kl']:.1f} nats a response, over kl_ceiling {self.ceiling}: raise kl_coef, lower lr"
        if not self.window or "positive_by_judge" not in metrics:
            return ""
        self.history.append([metrics["score"], metrics["positive_by_judge"]])
        del self.history[: -self.window]
        if len(self.history) == self.window:
            score, judge = (change(values) for values in zip(*self.history))
            if score > 2 and judge < -2:
                self.history.clear()  # said once a window
                return (
                    f"in {self.window} rollouts the score rose and the share positive by the judge fell: the policy "
                    "learns what only the reward likes: raise kl_coef, or stop here"
                )
        return ""


def change(values):
    """The mean of the later half of an even number of values less that of the earlier, in its standard errors."""
    halves = torch.tensor(values, dtype=torch.float64).view(2, -1)
    stderr = (halves.var(1, correction=0).sum() / halves.shape[1]).sqrt()
    return float((halves[1].mean() - halves[0].mean()) / (stderr + 1e-12))


def average(parts, shares):
    """Metrics of parts (dicts of the same names) as one: weighted by shares, and of a max_ the largest."""
    return {
        name: max(part[name] for part in parts)
        if name.startswith("max_")
        else sum(part[name] * share for part, share in zip(parts, shares))
        for name in parts[0]
    }


def peak_memory(device):
    """The most memory this process had, in GB: of the GPU on CUDA, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def time_on_cpu(flops, cfg, device):
    """{"time": an estimate for a run of so many FLOPs, as text} on a CPU, {} elsewhere; over an hour it warns too.

    By the speed of fp32 products, with bf16 too: a PPO step on a CPU is hardly faster in it.
    """
    if device.type != "cpu":
        return {}
    peak = peak_flops(device, n=1024, seconds=0.3)
    seconds = flops / (CPU_SHARE * peak) / int(os.environ.get("WORLD_SIZE", 1))
    if seconds > 3600:
        hint = "" if cfg.preset == "mini" else "; --preset mini is made for a CPU"
        warn(f"this run takes about {duration(seconds)} on this CPU{hint}")
    return {"time": f"about {duration(seconds)} on this CPU"}


def duration(seconds):
    """Seconds as text, in the unit that leaves two or three digits: 90 s, 90 min, 41 h, 12 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def classifier_flops(model, tokens):
    """FLOPs of a forward pass of a Hugging Face classifier: embeddings are looked up and take none."""
    return 2 * tokens * sum(p.numel() for name, p in model.named_parameters() if "embeddings" not in name)


def ppo_flops(cfg, gpt2, rewards):
    """FLOPs of a PPO run: an episode is generated, scored, evaluated by policy and reference, and learned from.

    A backward pass takes twice a forward pass. rewards: the reward and the judge, of which only classifiers count.
    """
    tokens = (cfg.min_prompt_len + cfg.max_prompt_len) / 2 + cfg.response_len
    passes = 3 + 3 * cfg.ppo_epochs
    classifiers = sum(classifier_flops(reward.model, tokens) for reward in rewards if hasattr(reward, "model"))
    return cfg.steps * cfg.batch_size * (passes * gpt2.flops(tokens, cfg.response_len) + classifiers)


def ppo_sheet(cfg, policy, reward_fn, judge, n_prompts, device):
    """The run in numbers before it starts, as text: sizes resolved, optimizer steps, memory."""
    c, V = policy.gpt2.config, policy.gpt2.n_tokens
    weights = sum(p.numel() for p in policy.parameters())
    reward_weights = sum(p.numel() for p in reward_fn.model.parameters()) if hasattr(reward_fn, "model") else 0
    judge_weights = sum(p.numel() for p in judge.model.parameters()) if judge else 0
    tokens = cfg.micro_batch_size * (cfg.max_prompt_len + cfg.response_len)
    trunk = tokens * c.n_layer * 16 * c.n_embd  # numbers that a block keeps for its backward pass, a token
    logits = 2 * cfg.micro_batch_size * cfg.response_len * V  # logits and their gradient
    # weights, gradient, two moments of Adam, the reference; 4 bytes each
    estimate = 4 * (5 * weights + reward_weights + judge_weights + trunk + logits)
    updates = cfg.ppo_epochs * cfg.batch_size // cfg.minibatch_size
    rows = {
        "policy": f"{weights:,} parameters from {cfg.policy}",
        "reward": cfg.reward + (f", {reward_weights:,} parameters, {cfg.reward_kind}" if reward_weights else ""),
        "episodes": f"{cfg.steps * cfg.batch_size:,}: {cfg.steps} rollouts of {cfg.batch_size}, {n_prompts:,} prompts",
        "tokens": f"prompts of {cfg.min_prompt_len} to {cfg.max_prompt_len}, responses of up to {cfg.response_len}",
        "optimizer steps": f"{cfg.steps * updates:,}: {updates} a rollout, over {cfg.ppo_epochs} epochs",
        "forward passes": f"{cfg.micro_batch_size} episodes each",
        "KL": f"coefficient {cfg.kl_coef}, " + (f"adaptive, target {cfg.kl_target} nats" if cfg.kl_target else "fixed"),
        "device": f"{device}, {'bf16' if policy.gpt2.bf16 else 'fp32'}, about {estimate / 1e9:.1f} GB",
        **time_on_cpu(ppo_flops(cfg, policy.gpt2, [reward_fn, judge]), cfg, device),
        "config": sources(cfg),
        "writes": cfg.out,
    }  # fmt: skip
    return sheet("PPO", rows)


def finetune_sheet(cfg, model, steps, n_reviews, n_tokens, n_held_out, n_validation, device):
    """The fine-tuning in numbers before it starts, as text; n_tokens are packed from n_reviews."""
    trained, evaluated = steps * cfg.batch_size * cfg.block_size, (math.ceil(steps / cfg.eval_every) + 2) * n_validation
    flops = model.flops(3 * trained + evaluated, 3 * trained + evaluated)  # a backward pass takes twice a forward pass
    rows = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "reviews": f"{n_reviews:,} to learn from, {n_held_out:,} for validation",
        "tokens": f"{n_tokens:,} packed, {cfg.epochs} epochs of them; {n_validation:,} for validation",
        "optimizer steps": f"{steps:,} of {cfg.batch_size} x {cfg.block_size} tokens",
        "device": f"{device}, {'bf16' if model.bf16 else 'fp32'}",
        **time_on_cpu(flops, cfg, device),
        "config": sources(cfg),
        "writes": cfg.out,
    }
    return sheet(f"fine-tuning {cfg.init_from} on {cfg.dataset}", rows)


def show(progress, step, metrics, samples, cfg):
    """The numbers that matter on the progress bar, and where there are samples a table of them above it."""
    progress.set_postfix(
        score=f"{metrics['score']:+.2f}",
        kl=f"{metrics['kl']:.2f}",
        tok_s=f"{metrics['tokens_per_second']:.0f}",
        refresh=False,
    )
    if metrics["kl"] < -1:  # by chance k1 dips below 0 a little; by more only when scored is not what was sampled
        progress.write(f"warning: KL is {metrics['kl']:.2f} nats: are sampling and log-probabilities one distribution?")
    if step % cfg.sample_every == 0 or step == cfg.steps - 1:
        line = (
            f"step {step} | score {metrics['score']:+.2f} | "
            f"kl {metrics['kl']:.2f} +- {metrics['kl_stderr']:.2f} nats | "
            f"clip {metrics['clip_frac']:.3f} | entropy {metrics['entropy']:.2f}"
        )
        rows = [
            f"  {math.nan if s['score'] is None else s['score']:+6.2f}  {one_line(s['prompt'] + s['response'], 110)}"
            for s in samples
        ]
        progress.write("\n".join([line, *rows]))


def one_line(text, width):
    """Text for a table: control characters and newlines as spaces, cut to width with an ellipsis."""
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def sheet(title, rows):
    """Names and values in two aligned columns under a title, as text."""
    width = max(len(name) for name in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def column_width(width=None):
    """Characters of each of two columns that fill width, the terminal's when None."""
    return max(20, min(width or shutil.get_terminal_size().columns, 160)) // 2 - 2


def columns(texts, column, codes=(0, 0)):
    """Two texts side by side, as lines: each wrapped to column characters and in its colour, an ANSI code or 0."""
    cells = [textwrap.wrap(text, column) for text in texts]
    return [
        "    ".join(paint(text, code) + " " * (column - len(text)) for text, code in zip(row, codes)).rstrip()
        for row in itertools.zip_longest(*cells, fillvalue="")
    ]


def paint(text, code):
    """Text in a colour, 0 for none: only for a terminal (or FORCE_COLOR), and never with NO_COLOR (no-color.org)."""
    colours = not os.environ.get("NO_COLOR") and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)
    return f"\033[{code}m{text}\033[0m" if colours and code and text else text


def tint(probability):
    """The colour of what the judge finds positive with this probability: green, or else red."""
    return 32 if probability > 0.5 else 31


def side_by_side(samples, width=None):
    """Answers before and after PPO in two columns, as text, in the judge's colours.

    samples: (prompt, [(response, judge's probability of POSITIVE) before, and after]) each. width: as in column_width.
    """
    column = column_width(width)
    lines = columns(SIDES, column)
    for prompt, answers in samples:
        lines += ["", paint(one_line(prompt, 2 * column) + " …", 1)]
        texts = [f"({p:.2f}) {one_line(text, 600)}" for text, p in answers]
        lines += columns(texts, column, [tint(p) for _, p in answers])
    return "\n".join(lines)
