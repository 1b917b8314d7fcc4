"""Compare the policy before and after PPO on the same held-out prompts: table, samples, model card, report page.

    python evaluate.py
    python evaluate.py --preset mini
    python evaluate.py --force --second_lm gpt2         # replace the results; bits per character by another model
    python evaluate.py --force --second_lm MODEL.gguf   # the same with a GGUF file: pip install gguf accelerate

Writes README.md (the model card), results.json, samples.md, viewer.json, report.html and figures into the folder of the
policy, ppo_checkpoints/<preset>/. Existing results are replaced only with --force; --resume replaces them if the
evaluation was interrupted. See analysis/ for the metrics, the card, the report page, and the comparison of many
policies (frontier.py).
"""

import runtime  # isort: skip  # noqa: F401 - first, since it refuses a Python older than 3.11
import json
import math
import shlex
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from analysis import report
from analysis.card import card_text, policy_run, samples_markdown, write_card
from analysis.limit import kl_efficiency, reference_scores
from analysis.metrics import difference, measure, open_second_lm, second_nll
from analysis.plot import example_results, learning_curves, save
from analysis.responses import micro_batches, pieces, prompt_groups, respond
from analysis.tables import JUDGED, KL_NOTE, efficiency_text, kl_text, table_text
from config import EvaluateConfig, PPOConfig
from data import load_prompts
from ppo import gae, response_mask, token_rewards
from reward import load_rewards, scores_so_far
from runtime.checkpoint import (
    RESULTS,
    VIEWER,
    check_finished,
    evaluation_files,
    is_finished,
    read_json,
    remove_leftovers,
    write_text,
)
from runtime.cli import run
from runtime.device import pick_device, warn
from runtime.distributed import refuse_processes
from runtime.errors import BadInput, Finished, printable
from runtime.hub import load_policy, open_pair
from runtime.log import side_by_side


def sample_responses(policies, tokenizer, judge, groups, cfg, device):
    """Sample responses for display, at cfg.sample_temperature, to cfg.samples random prompts of the groups.

    policies: {"before": Policy, "after": Policy}. Returns a list of (prompt, [before, after]), each of the two a
    (response, judge's probability, see JUDGED).
    """
    prompts = [prompt[None] for group in groups for prompt in group]  # (1, P) each
    chosen = sorted(np.random.default_rng([cfg.seed, 4]).permutation(len(prompts))[: cfg.samples].tolist())
    cfg, prompts, sides = replace(cfg, temperature=cfg.sample_temperature), [prompts[i] for i in chosen], []
    for name, policy in policies.items():
        out = respond(policy, policies["before"], tokenizer, prompts, cfg, device, f"{name}, samples")
        texts = [text[len(prompt) :] for prompt, text in zip(out["prompts"], out["texts"])]
        sides.append(zip(texts, judge.log_odds(out["texts"]).sigmoid().tolist()))
    return [(prompt, list(pair)) for prompt, *pair in zip(out["prompts"], *sides)]


# ---- token by token


@torch.no_grad()
def token_metrics(policies, sequences, prompt_len, scores, ppo, temperature, eos_id, so_far=0):
    """Return ({name: (B, T)}, mask): metrics of the response tokens for the policy after PPO.

    kl: its log-probability minus that of the policy before PPO, nats; ratio: e^kl. With ppo, the config of the run that
    trained it, see values_of, also its value, and the advantage from PPO's rewards with the initial kl_coef, not
    whitened. so_far: with reward shaping, the scores before each token (B, T), from reward.scores_so_far.
    """
    responses = sequences[:, prompt_len:]
    mask = response_mask(responses, eos_id)
    logprobs, values = policies["after"](sequences, prompt_len, temperature)  # (B, T) each
    kl = (logprobs - policies["before"](sequences, prompt_len, temperature)[0]).where(mask, 0)
    metrics = {"kl": kl, "ratio": kl.clamp(max=20).exp()}
    if ppo is None:
        return metrics, mask
    scores = scores.to(kl)
    clip = ppo.score_clip or math.inf
    scores = scores.clamp(-clip, clip) - ppo.missing_eos_penalty * ~(responses == eos_id).any(1)
    values = values + torch.as_tensor(so_far).clamp(-clip, clip)
    advantages, _ = gae(token_rewards(scores, kl, mask, ppo.kl_coef), values, mask, ppo.gamma, ppo.lam)
    return metrics | {"value": values, "advantage": advantages}, mask


def values_of(run):
    """Return the config of a run if values and advantages can be shown for its policy, otherwise None.

    RLOO, GRPO and dpo.py train no value head, and the advantages of RLOO and GRPO need all responses of a group. With
    whitened rewards, the unit of the values is that of a rollout.
    """
    shown = isinstance(run, PPOConfig) and run.advantage == "gae" and not run.whiten_rewards
    return run if shown else None


def by_token(policies, tokenizer, reward_fn, prompts, tokens, values, ppo, cfg):
    """Return the responses to prompts (B, P) for viewer.json: dicts of the tokens, their metrics, score and judge.

    tokens: the responses, B lists of ids. values: {"score", "judge"}, (B,) each.
    """
    eos_id, prompt_len = tokenizer.eos_token_id, prompts.shape[1]
    responses = pad_sequence([torch.tensor(ids) for ids in tokens], True, eos_id).to(prompts.device)
    sequences, scores, rows = torch.cat([prompts, responses], dim=1), torch.from_numpy(values["score"]), []
    so_far = torch.zeros(responses.shape, device=prompts.device)
    if ppo and ppo.shaping_every:
        so_far = scores_so_far(reward_fn, sequences.cpu(), prompt_len, tokenizer, ppo).to(so_far)
    for part in micro_batches(policies["after"], sequences):
        rest = scores[part], ppo, cfg.temperature, eos_id, so_far[part]
        metrics, mask = token_metrics(policies, sequences[part], prompt_len, *rest)
        for i, real in enumerate(mask):
            rows.append({name: [round(x, 4) for x in table[i][real].tolist()] for name, table in metrics.items()})
    for i, (prompt, ids) in enumerate(zip(prompts.tolist(), tokens)):
        scalars = {name: round(float(column[i]), 4) for name, column in values.items()}
        rows[i] = {"tokens": pieces(tokenizer, prompt, ids)} | rows[i] | scalars
    return rows


def viewer(policies, tokenizer, reward_fn, groups, responses, values, ppo, cfg, device):
    """Return the content of viewer.json: responses token by token to cfg.viewer_samples evenly spaced prompts.

    responses, values: {"before", "after"}, returned by respond and measure, for all prompts. ppo: the config of the run
    that trained the policy, of ppo.py or dpo.py, or None.
    """
    ppo = values_of(ppo)
    chosen = np.linspace(0, cfg.prompts - 1, min(cfg.viewer_samples, cfg.prompts)).astype(int)
    samples, start = {i: {"prompt": responses["before"]["prompts"][i]} for i in chosen}, 0
    for prompts in groups:
        rows = chosen[(start <= chosen) & (chosen < start + len(prompts))]
        for name in responses if len(rows) else ():
            tokens = [responses[name]["tokens"][i] for i in rows]
            columns = {key: values[name][key][rows] for key in ("score", "judge")}
            prompts_shown = prompts[rows - start].to(device)
            shown = by_token(policies, tokenizer, reward_fn, prompts_shown, tokens, columns, ppo, cfg)
            for i, response in zip(rows, shown):
                samples[i][name] = response
        start += len(prompts)
    coefficient = {"kl_coef": ppo.kl_coef} if ppo else {}  # used for the advantages
    return coefficient | {"samples": list(samples.values())}


# ---- files


def check_results(cfg):
    """Raise BadInput if cfg.after has an unfinished run, results of another script, or an evaluation.

    cfg.force allows replacing an evaluation. With cfg.resume, a complete one raises Finished, another one is replaced.
    """
    check_finished(cfg.after)
    results = Path(cfg.after, RESULTS)
    if results.is_file() and "difference" not in read_json(results):
        raise BadInput(
            f"{results} was not written by evaluate.py, which would replace it: evaluate a copy of {cfg.after} without "
            "this file"
        )
    if cfg.resume and not cfg.force and is_finished(cfg.after, RESULTS, report.PAGE):
        raise Finished(f"{cfg.after} is already evaluated: --force evaluates it again\n{written(cfg.after)}")
    existing = [file for file in evaluation_files(Path(cfg.after)) if file.name != "learning_curves.png"]
    if existing and not (cfg.force or cfg.resume and results.is_file()):
        raise BadInput(f"{existing[0]} already exists, from an earlier evaluation: --force replaces it")


def written(out):
    """Return the last lines of the script: where the files of an evaluation are, and how to publish the policy."""
    upload = f"to publish it, after hf auth login:\n  hf upload USER/NAME {shlex.quote(Path(out).as_posix())}"
    return "\n  ".join(["written:", *map(str, evaluation_files(Path(out)))]) + f"\n{upload}"


def write(out, results, samples, tokens, card):
    """Write everything to the folder of the policy. samples, card: Markdown. tokens: from viewer."""
    remove_leftovers(out)  # such as checkpoints that a run was deleting when it was killed
    (out / report.PAGE).unlink(missing_ok=True)  # written last: with it, an evaluation is complete
    write_text(out / RESULTS, json.dumps(results, indent=1))
    write_text(out / "samples.md", samples)
    write_text(out / VIEWER, json.dumps(tokens))
    write_card(out, card)
    save(example_results(out), out / "example_results.png")
    if (out / "log.jsonl").is_file():  # a policy of a third party has none
        learning_curves(out)
    report.write(out)


def main(cfg):
    refuse_processes("evaluate.py")
    check_results(cfg)
    device, dtype = pick_device(cfg)
    opened = open_pair(cfg.before, cfg.after)
    _, config, tokenizer = opened["before"]
    if not Path(cfg.after).is_dir():
        raise BadInput(f"after is {cfg.after!r}, which is not a local folder: download it, to write the results there")
    trained, log = policy_run(cfg.after)
    for flag, used in {"before": trained.policy, "reward": trained.reward}.items() if trained else ():
        if Path(used) != Path(getattr(cfg, flag)):
            warn(printable(f"{cfg.after} was trained with {used}, and is measured with --{flag} {getattr(cfg, flag)}"))
    second = open_second_lm(cfg.second_lm, device) if cfg.second_lm else None
    pool = load_prompts(cfg, "evaluation", config, tokenizer, cfg.prompts)
    reward_fn, judge = load_rewards(cfg, device, dtype)

    policies = {name: load_policy(*parts, dtype).to(device).eval() for name, parts in opened.items()}
    groups = list(prompt_groups(pool, cfg))
    results, responses, values = {}, {}, {}
    for name, policy in policies.items():
        responses[name] = respond(policy, policies["before"], tokenizer, groups, cfg, device, name)
        if second:
            responses[name]["second_nll"] = second_nll(*second, responses[name], cfg)
        results[name], values[name] = measure(responses[name], reward_fn, judge, cfg)
    results["difference"] = difference(values["before"], values["after"], cfg)
    if cfg.limit_samples:
        (scores,) = reference_scores(policies["before"], tokenizer, reward_fn, None, pool, cfg, device)
        gains = values["after"]["score"] - values["before"]["score"]
        results["kl_efficiency"] = kl_efficiency(scores, gains, values["after"]["kl_exact"], cfg)
    names = ("before", "after", "task", "reward", "judge", "second_lm", "seed", "temperature", "sample_temperature")
    results |= {"prompts": cfg.prompts, "config": {name: getattr(cfg, name) for name in names}}
    samples = sample_responses(policies, tokenizer, judge, groups, cfg, device)
    results["samples"] = [
        {"prompt": prompt} | {name: {"text": text, "judge": p} for name, (text, p) in zip(policies, sides)}
        for prompt, sides in samples
    ]
    tokens = viewer(policies, tokenizer, reward_fn, groups, responses, values, trained, cfg, device)
    card = card_text(results, samples, cfg, trained, log)

    caption = f"Samples at temperature {cfg.sample_temperature}, with the judge's {JUDGED[cfg.task]}"
    print(f"\n{cfg.prompts} held-out prompts, the same for both; 95 % bootstrap intervals\n\n{table_text(results)}\n")
    print(f"{kl_text(results)}\n\n{textwrap.fill(KL_NOTE, 118)}\n")
    if "kl_efficiency" in results:
        print(f"{textwrap.fill(efficiency_text(results['kl_efficiency']), 118)}\n")
    print(f"{caption}\n\n{side_by_side(samples)}")
    write(Path(cfg.after), results, f"{caption}.\n\n{samples_markdown(samples)}", tokens, card)
    print(f"\n{written(Path(cfg.after))}")


if __name__ == "__main__":
    run(main, EvaluateConfig)
