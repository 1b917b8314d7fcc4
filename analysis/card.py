"""The model card: README.md in the folder of a policy, in the format of the Hugging Face hub, with its results.

    hf upload USER/NAME ppo_checkpoints/mini

Names and generated texts are untrusted: quote escapes them for Markdown, and huggingface_hub for YAML.
"""

import shlex
from dataclasses import fields
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from analysis.tables import CAPTIONS, JUDGED, KL_NOTE, caption, efficiency_text, kl_text, markdown, number, table_text
from config import DPOConfig, PPOConfig
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
from runtime.hub import on_hub
from runtime.log import DPO_SHOWN, one_line, read_lines

METHODS = {  # method of a run: (tags, introduction)
    "ppo": (
        ("ppo", "rlhf", "reinforcement-learning"),
        "A GPT-2 trained with PPO (Schulman et al. 2017, arXiv:1707.06347) to increase a reward, with a KL penalty for "
        "diverging\nfrom the frozen fine-tuned model (Ziegler et al. 2019, arXiv:1909.08593).",
    ),
    "dpo": (
        ("dpo", "rlhf"),
        "A GPT-2 trained with direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) on pairs of "
        "responses of the\nfrozen fine-tuned model, of which a reward scored one higher. Columns named after PPO are "
        "this policy.",
    ),
    "weighted": (
        ("reward-weighted-regression", "rlhf"),
        "A GPT-2 fine-tuned on responses of the frozen fine-tuned model, weighted by a reward (Peng et al. 2019,\n"
        "arXiv:1910.00177). Columns named after PPO are this policy.",
    ),
}
LIMITS = """\
- It was trained to increase the score of one classifier. The judge, which was not used in training, shows how far that
  generalizes; both are classifiers, and no human rated the responses.
- It imitates the reviews of one web site: it invents films, people and opinions, and repeats what is offensive in its
  data. It is for learning how RLHF works, not for publishing its texts.
- It was evaluated only on English, with short prompts and short responses."""


def quote(text, width=400):
    """Return untrusted text on one line, escaped so that Markdown shows it as it is."""
    return "".join(f"&#{ord(c)};" if c in "<>&|\\`*_[]!#~$:@." else c for c in one_line(text, width))


def samples_markdown(samples):
    """Return the samples of evaluate.sample_responses as a Markdown table."""
    rows = [["prompt", "before PPO", "judge", "after PPO", "judge"]]
    for prompt, sides in samples:
        rows.append([quote(prompt), *(cell for text, p in sides for cell in (quote(text), f"{p:.2f}"))])
    return markdown(rows) + "\n"


def run_config(policy):
    """Return the run_config.json of the run that trained a policy as a dict, and its folder; {} if there is none.

    The policy in <out>/best belongs to the run in <out>.
    """
    folder = Path(policy).parent if Path(policy).name == BEST else Path(policy)
    file = folder / RUN_CONFIG
    return (read_json(file) if file.is_file() else {}), folder


def source(name, revisions):
    """Return a name for Markdown, with its commit if it was read from the hub."""
    return quote(name) + (f" (commit {quote(revisions[name])})" if name in revisions else "")


def policy_run(policy):
    """Return (config, lines of the log) of the run of ppo.py or dpo.py that trained a policy; (None, []) without one.

    Raise BadInput if its run_config.json does not fit PPOConfig or DPOConfig.
    """
    saved, folder = run_config(policy)
    if not {"kl_coef", "method"} & saved.keys():  # no run, or one of finetune_gpt2.py
        return None, []
    cls, metric = (PPOConfig, "score") if "kl_coef" in saved else (DPOConfig, "loss")
    saved = {"shaping_every": 0} | saved  # runs of earlier versions have none
    flags = [(f"--{f.name}", str(saved[f.name])) for f in fields(cls) if f.name in saved]
    try:
        run = parse(cls, [part for flag in flags for part in flag])
    except BadInput as error:
        raise BadInput(f"{folder / RUN_CONFIG}: {error}") from None
    return run, [line for line in read_lines(folder / "log.jsonl") if metric in line]  # without skipped rollouts


def method(run):
    """Return the name in METHODS of a run; a policy without a run counts as one of PPO."""
    return run.method if isinstance(run, DPOConfig) else "ppo"


def command(script, cfg):
    """Return the command line for cfg: its preset, and the flags that differ from it."""
    preset = parse(type(cfg), ["--preset", cfg.preset])
    same = vars(preset) | {name: getattr(cfg, name) for name in ("force", "resume") if hasattr(cfg, name)}
    flags = [f"--{name} {shlex.quote(str(value))}" for name, value in vars(cfg).items() if value != same[name]]
    return printable(" ".join([f"python {script} --preset {cfg.preset}", *flags]))


def base_model(policy):
    """Return the hub name of the initial policy, or of the model that it was fine-tuned from; None if there is none."""
    file = Path(policy, RUN_CONFIG)
    return on_hub(str(read_json(file).get("init_from", ""))) if file.is_file() else on_hub(policy)


def metadata(results, cfg, run):
    """Return the YAML of the card; see https://huggingface.co/docs/hub/model-cards."""
    dataset, name = on_hub(cfg.dataset), printable(Path(cfg.after).resolve().name)
    task = dict(task_type="text-generation", dataset_type=dataset or "reviews", dataset_split="evaluation")
    after = {name: results["after"][name]["value"] for name in CAPTIONS if name in results["after"]}
    task["dataset_name"] = dataset or printable(Path(cfg.dataset).name)
    entries = [
        EvalResult(metric_type=metric, metric_name=caption(metric, cfg.task), metric_value=round(value, 4), **task)
        for metric, value in after.items()
    ]
    return ModelCardData(
        language="en",
        license="mit",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", *METHODS[method(run)][0], "movie-reviews"],
        datasets=dataset and [dataset],
        base_model=base_model(run.policy) if run else None,
        model_name=name,
        eval_results=entries,
    ).to_yaml()


def training(run, log, revisions):
    """Return a Markdown table of how the policy was trained. revisions: {name: commit} of what came from the hub."""
    if not run:
        return f"The folder has no {RUN_CONFIG} of `ppo.py`, so how the policy was trained is not known."
    if isinstance(run, DPOConfig):
        return dpo_training(run, log, revisions)
    adaptive = f", adapted to a target of {run.kl_target} nats per response" if run.kl_target else ""
    lengths = f"{run.min_prompt_len} to {run.max_prompt_len} tokens"
    rows = {
        "initial policy and reference": source(run.policy, revisions),
        "reward": f"{source(run.reward, revisions)}, {run.reward_kind}",
        "judge during training": source(run.judge, revisions) or "none",
        "prompts": f"first {lengths} of reviews of {source(run.dataset, revisions)}",
        "episodes": f"{run.steps * run.batch_size:,}: {run.steps} rollouts of {run.batch_size}",
        "KL coefficient": f"{run.kl_coef} per nat{adaptive}",
        "learning rate": f"{run.lr}, {run.ppo_epochs} epochs per rollout, minibatches of {run.minibatch_size}",
    }
    if log:
        last = log[-1]
        rows["last rollout"] = (
            f"number {last['step'] + 1} after {last['seconds']:.0f} s: score {last['score']:.2f}, "
            f"KL {last['kl']:.2f} nats, KL coefficient {last['kl_coef']:.3f}"
        )
    return markdown([["", ""], *rows.items()])


def dpo_training(run, log, revisions):
    """Return the table of training for a run of dpo.py."""
    lengths, prompts = f"{run.min_prompt_len} to {run.max_prompt_len} tokens", run.batch_size // run.samples_per_prompt
    rows = {
        "initial policy and reference": source(run.policy, revisions),
        "reward": f"{source(run.reward, revisions)}, {run.reward_kind}",
        "prompts": f"first {lengths} of reviews of {source(run.dataset, revisions)}",
        "episodes": f"{run.steps * run.batch_size:,}, sampled from the reference: {run.steps} rollouts of "
        f"{run.samples_per_prompt} responses to each of {prompts} prompts",
        "beta": f"{run.beta} per nat",
        "learning rate": f"{run.lr}, {run.epochs} epochs per rollout, minibatches of {run.minibatch_size}",
    }
    if log:
        last = log[-1]
        shown = ", ".join(f"{name} {last[name]:.3f}" for name in DPO_SHOWN if name in last)
        rows["last rollout"] = f"number {last['step'] + 1} after {last['seconds']:.0f} s: {shown}"
    return markdown([["", ""], *rows.items()])


def card_text(results, samples, cfg, run, log):
    """Return the whole card. results, samples: from evaluate.py. run, log: from policy_run."""
    efficiency = f"\n{efficiency_text(results['kl_efficiency'])}.\n" if "kl_efficiency" in results else ""
    script = "dpo.py" if isinstance(run, DPOConfig) else "ppo.py"
    commands = ([command(script, run)] if run else []) + [command("evaluate.py", cfg)]
    return f"""---
{metadata(results, cfg, run)}
---

{CARD_MARK}

# {quote(Path(cfg.after).resolve().name)}

{METHODS[method(run)][1]} Trained with Mini-RLHF.

## Training

{training(run, log, run_config(cfg.after)[0].get("revisions", {}))}

## Evaluation

{results["prompts"]:,} prompts from held-out reviews of {source(cfg.dataset, REVISIONS)}, the same for both models;
responses of up to {cfg.response_len} tokens at temperature {cfg.temperature}. The score is given by
{source(cfg.reward, REVISIONS)}, the judge is {source(cfg.judge, REVISIONS)}. Intervals are
95 % bootstrap intervals; differences are paired by prompt.

{table_text(results)}

Perplexity after / before: {number(results["difference"]["perplexity_ratio"], 3)}.

{kl_text(results)}

{KL_NOTE}
{efficiency}
## Samples

Random prompts, responses at temperature {cfg.sample_temperature}, and the judge's {JUDGED[cfg.task]}.

{samples_markdown(samples)}
## Use

Replace USER/NAME with the name on the hub or the path of this folder:

```python
from transformers import pipeline
print(pipeline("text-generation", model="USER/NAME")("This film was", max_new_tokens={cfg.response_len}))
```

## Limits

{LIMITS}

## Reproduce

```bash
{chr(10).join(commands)}
```
"""


def write_card(folder, text):
    """Write README.md, or MODEL_CARD.md if there is a README.md that evaluate.py did not write. Return the path."""
    file = Path(folder, CARD)
    if file.exists() and not is_our_card(file):
        print(f"{file} was not written by evaluate.py and is kept; the card is {OTHER_CARD}")
        file = Path(folder, OTHER_CARD)
    write_text(file, text)
    return file
