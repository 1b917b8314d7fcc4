"""The log of a run: its config, log.jsonl, TensorBoard or W&B; and tables for the terminal."""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from runtime.checkpoint import REVISIONS, RUN_CONFIG, delete_earlier_files, remove_leftovers, write_text
from runtime.device import DTYPES, peak_flops, warn
from runtime.errors import BadInput, printable

DPO_SHOWN = ("loss", "accuracy", "margin", "effective_samples")  # metrics of dpo.py on the terminal, if it has them
TITLES = ("before PPO", "after PPO")  # of two columns
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CPU_SHARE = 0.55  # a PPO step on a CPU reaches 0.48 to 0.65 of the speed of a large product, see docs/performance.md


class RunLog:
    """The log of a run in cfg.out, or of a part of it in a subfolder: one JSON line per step, also to cfg.report_to.

    The constructor prepares the folder: it writes the config, with the commits of what was read from the hub. A new run
    deletes the files of an earlier one; a run that is resumed at first_step keeps its checkpoints and the log before
    that step. Raises BadInput if the folder cannot be written. Only rank 0 writes.
    """

    def __init__(self, cfg, part="", first_step=0, rank=0):
        self.out, self.start, self.tensorboard, self.wandb = Path(cfg.out, part), time.time(), None, None
        self.rank, self.bar = rank, None
        if rank:
            return
        wandb = importlib.util.find_spec("wandb")
        if cfg.report_to == "wandb" and not (wandb and wandb.origin):  # no origin: only W&B's folder of runs
            raise BadInput("report_to is wandb, which is not installed: pip install wandb, or --report_to tensorboard")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.out)
            if not first_step:
                delete_earlier_files(self.out)
            write_text(Path(cfg.out, RUN_CONFIG), json.dumps(asdict(cfg) | {"revisions": REVISIONS}, indent=1))
            earlier = self.keep("log.jsonl", first_step)
            self.keep("samples.jsonl", first_step)
        except OSError as error:
            raise BadInput(f"cannot write to {self.out}: {error}") from None
        if earlier:
            self.start -= earlier[-1]["seconds"]
        if cfg.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.out / "tensorboard", purge_step=first_step)
        elif cfg.report_to == "wandb":
            import wandb

            file = self.out / "wandb_id"  # a resumed run continues the same run on W&B
            if not (file.is_file() and file.read_text(encoding="utf-8")):
                write_text(file, wandb.util.generate_id())
            run_id = file.read_text(encoding="utf-8")
            self.wandb = wandb.init(
                project="mini-rlhf", name=self.out.as_posix(), config=asdict(cfg), id=run_id, resume="allow"
            )

    def keep(self, name, first_step):
        """Drop the lines of a JSON lines file from first_step on; return the others."""
        file = self.out / name
        lines = [line for line in read_lines(file) if isinstance(line, dict) and isinstance(line.get("step"), int)]
        earlier = [line for line in lines if line["step"] < first_step]
        if file.is_file():
            write_text(file, "".join(json.dumps(line) + "\n" for line in earlier))
        return earlier

    def progress(self, checkpoints, steps, name, unit):
        """Yield the steps of a loop, from 0 or the resumed step on, with a progress bar.

        In a file or a notebook it is drawn every ten seconds: there, each time may give another line.
        """
        first, hidden, pause = checkpoints.first_step, bool(self.rank), 0.1 if sys.stderr.isatty() else 10
        with contextlib.closing(checkpoints.steps(steps)) as loop:  # ends with this loop, however it ends
            self.bar = tqdm(loop, name, initial=first, total=steps, unit=unit, disable=hidden, mininterval=pause)
            yield from self.bar

    def write(self, step, **metrics):
        """Log the metrics of a step: floats and ints by name."""
        if self.rank:
            return
        self.append("log.jsonl", dict(step=step, seconds=round(time.time() - self.start, 2), **metrics))
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def write_rollout(self, step, metrics, samples):
        """Log the metrics of a PPO step and show the main ones; with samples (see monitor.sample), print them too."""
        self.write(step, **metrics)
        score, kl = metrics["score"], metrics["kl"]
        shown = dict(score=f"{score:+.2f}", kl=f"{kl:.2f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
        self.bar.set_postfix(shown, refresh=False)
        if kl < -1:  # chance makes k1 only slightly negative
            self.print(f"warning: KL is {kl:.2f} nats: is the distribution that was sampled the one that was scored?")
        title = (
            f"step {step} | score {score:+.2f} | kl {kl:.2f} +- {metrics['kl_stderr']:.2f} nats | "
            f"clip {metrics['clip_frac']:.3f} | entropy {metrics['entropy']:.2f}"
        )
        self.write_samples(step, samples, title)

    def write_dpo(self, step, metrics, samples):
        """Log the metrics of a step of dpo.py and show the main ones, with samples like write_rollout."""
        self.write(step, **metrics)
        shown = {name: f"{metrics[name]:.3f}" for name in DPO_SHOWN if name in metrics}
        self.bar.set_postfix(shown, refresh=False)
        self.write_samples(step, samples, " | ".join([f"step {step}", *map(" ".join, shown.items())]))

    def write_samples(self, step, samples, title):
        """Write samples (see monitor.sample; None: not in this step) to samples.jsonl, and print them under a title."""
        if samples is None:
            return
        if samples and not self.rank:
            self.append("samples.jsonl", dict(step=step, samples=samples))
        lines = [title]
        for sample in samples:
            score = math.nan if sample["score"] is None else sample["score"]
            lines.append(f"  {score:+6.2f}  {one_line(sample['prompt'] + sample['response'], 110)}")
        self.print("\n".join(lines))

    def skip(self, step, problem, stepper):
        """Log a step that was skipped because a number in its rollout is not finite."""
        stepper.skip(f"a rollout is not finite: {problem}")
        self.print(f"step {step} is skipped: {problem}")
        self.write(step, skipped_steps=stepper.skipped)

    def print(self, text):
        """Print a line above the progress bar."""
        self.bar.write(text)

    def append(self, name, line):
        """Add a line to a JSON lines file. It does not stay open: Windows would not replace it in a resumed run."""
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self):
        """Close the log; return the seconds that the run took, including its earlier parts."""
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        return round(time.time() - self.start, 2)


def read_lines(file):
    """Return the JSON lines of a file as a list, without those that a crash left incomplete; [] if there is no file."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


# ---- the time of a run on a CPU


def time_on_cpu(flops, cfg, device):
    """Return {"time": an estimate for a run of so many FLOPs} on a CPU, otherwise {}; warn if it is over an hour.

    The estimate uses the speed of fp32 products also for bf16: a PPO step in bf16 is hardly faster on a CPU.
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
    """Format seconds in the unit that leaves two or three digits: 90 s, 90 min, 41 h, 12 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def classifier_flops(model, tokens):
    """Return the FLOPs of a forward pass of a Hugging Face classifier; embeddings are lookups and take none."""
    return 2 * tokens * sum(p.numel() for name, p in model.named_parameters() if "embeddings" not in name)


def ppo_flops(cfg, gpt2, rewards):
    """Return the FLOPs of a PPO run: generation, scoring, log-probabilities of policy and reference, and updates.

    A backward pass takes twice a forward pass. rewards: the reward and the judge; only classifiers count.
    """
    prompt = (cfg.min_prompt_len + cfg.max_prompt_len) / 2
    tokens, passes = prompt + cfg.response_len, 3 + 3 * cfg.ppo_epochs
    scored = [(reward, tokens) for reward in rewards]
    if cfg.shaping_every and cfg.advantage == "gae":  # the reward scores each text so far
        lengths = range(0, cfg.response_len, cfg.shaping_every)
        scored += [(reward, prompt + t) for reward in rewards[:1] for t in lengths]
    classifiers = sum(classifier_flops(reward.model, n) for reward, n in scored if hasattr(reward, "model"))
    return cfg.steps * cfg.batch_size * (passes * gpt2.flops(tokens, cfg.response_len) + classifiers)


def dpo_flops(cfg, gpt2, reward_fn):
    """Return the FLOPs of a run of dpo.py: generation, scoring, and updates, with the reference's pass if it is DPO."""
    tokens = (cfg.min_prompt_len + cfg.max_prompt_len) / 2 + cfg.response_len
    passes = 1 + cfg.epochs * (4 if cfg.method == "dpo" else 3)
    classifier = classifier_flops(reward_fn.model, tokens) if hasattr(reward_fn, "model") else 0
    return cfg.steps * cfg.batch_size * (passes * gpt2.flops(tokens, cfg.response_len) + classifier)


def finetune_flops(cfg, gpt2, steps, n_validation, teacher=None):
    """Return the FLOPs of a fine-tuning run: steps of three forward passes and one of the teacher, and evaluations."""
    trained, evaluated = steps * cfg.batch_size * cfg.block_size, (math.ceil(steps / cfg.eval_every) + 2) * n_validation
    passes = 3 * trained + evaluated  # a backward pass takes twice as long as a forward pass
    return gpt2.flops(passes, passes) + (teacher.flops(trained, trained) if teacher else 0)


# ---- tables


def sheet(title, rows):
    """Return a table: names and values in two aligned columns under a title."""
    width = max(len(name) for name in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def ppo_sheet(cfg, policy, reward_fn, judge, n_prompts, device):
    """Return a table of a PPO run before it starts: models, episodes, optimizer steps, time on a CPU."""
    updates = cfg.ppo_epochs * cfg.batch_size // cfg.minibatch_size
    rows = {
        "policy": f"{sum(p.numel() for p in policy.parameters()):,} parameters from {cfg.policy}",
        "reward": cfg.reward + (f", {cfg.reward_kind}" if hasattr(reward_fn, "model") else ""),
        "episodes": f"{cfg.steps * cfg.batch_size:,}: {cfg.steps} rollouts of {cfg.batch_size}, {n_prompts:,} prompts",
        "optimizer steps": f"{cfg.steps * updates:,}: {updates} per rollout, over {cfg.ppo_epochs} epochs",
        "forward passes": f"{cfg.micro_batch_size} episodes each",
        "device": f"{device}, {DTYPE_NAMES[policy.gpt2.dtype]}",
        **time_on_cpu(ppo_flops(cfg, policy.gpt2, [reward_fn, judge]), cfg, device),
        "output": cfg.out,
    }
    return sheet("PPO", rows)


def dpo_sheet(cfg, policy, reward_fn, n_prompts, device):
    """Return a table of a run of dpo.py before it starts, like ppo_sheet."""
    updates, groups = cfg.epochs * cfg.batch_size // cfg.minibatch_size, cfg.batch_size // cfg.samples_per_prompt
    rows = {
        "policy": f"{sum(p.numel() for p in policy.gpt2.parameters()):,} parameters from {cfg.policy}",
        "reward": cfg.reward + (f", {cfg.reward_kind}" if hasattr(reward_fn, "model") else ""),
        "episodes": f"{cfg.steps * cfg.batch_size:,}: {cfg.steps} rollouts of the reference, {cfg.samples_per_prompt} "
        f"responses to each of {groups} prompts, of {n_prompts:,}",
        "optimizer steps": f"{cfg.steps * updates:,}: {updates} per rollout, over {cfg.epochs} epochs",
        "forward passes": f"{cfg.micro_batch_size} episodes each",
        "device": f"{device}, {DTYPE_NAMES[policy.gpt2.dtype]}",
        **time_on_cpu(dpo_flops(cfg, policy.gpt2, reward_fn), cfg, device),
        "output": cfg.out,
    }
    return sheet("DPO" if cfg.method == "dpo" else "reward-weighted fine-tuning", rows)


def finetune_sheet(cfg, model, teacher, steps, n_reviews, n_tokens, n_held_out, n_validation, device):
    """Return a table of a fine-tuning run before it starts; n_tokens are packed from n_reviews."""
    rows = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "reviews": f"{n_reviews:,} for training, {n_held_out:,} for validation",
        "tokens": f"{n_tokens:,} packed, for {cfg.epochs} epochs; {n_validation:,} for validation",
        "optimizer steps": f"{steps:,} of {cfg.batch_size} x {cfg.block_size} tokens",
        "teacher": cfg.teacher or "none",
        "device": f"{device}, {DTYPE_NAMES[model.dtype]}",
        **time_on_cpu(finetune_flops(cfg, model, steps, n_validation, teacher), cfg, device),
        "output": cfg.out,
    }
    return sheet(f"fine-tuning {cfg.init_from} on {cfg.dataset}", rows)


def one_line(text, width):
    """Return text on one line without control characters, cut to width with an ellipsis."""
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def column_width(width=None):
    """Return the width of each of two columns, in characters, that fill `width` (None: the terminal)."""
    return max(20, min(width or shutil.get_terminal_size().columns, 160)) // 2 - 2


def columns(texts, column):
    """Return two texts side by side, as lines, each wrapped to `column` characters."""
    rows = itertools.zip_longest(*(textwrap.wrap(text, column) for text in texts), fillvalue="")
    return [f"{left:{column}}    {right}".rstrip() for left, right in rows]


def side_by_side(samples, width=None):
    """Return responses before and after PPO in two columns, as text.

    samples: (prompt, [before, after]) each, both (response, judge's probability of POSITIVE). width: see column_width.
    """
    column = column_width(width)
    lines = columns(TITLES, column)
    for prompt, responses in samples:
        lines += ["", one_line(prompt, 2 * column) + " …"]
        lines += columns([f"({p:.2f}) {one_line(text, 600)}" for text, p in responses], column)
    return "\n".join(lines)
