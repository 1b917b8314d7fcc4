"""Compare the policy before and after PPO on the same held-out prompts: table, samples, model card, report page.

    python evaluate.py
    python evaluate.py --preset mini
    python evaluate.py --force --second_lm gpt2         # replace the results; bits per character by another model

Writes README.md (the model card), results.json, samples.md, viewer.json, report.html and figures into the folder of the
policy, ppo_checkpoints/<preset>/. Existing results are replaced only with --force. See analysis/ for the metrics, the
card, the report page, and the comparison of many policies (frontier.py).
"""

import json
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from analysis import report
from analysis.card import card_text, ppo_run, samples_markdown, write_card
from analysis.metrics import KL_NOTE, difference, kl_text, measure, open_second_lm, second_nll, table_text
from analysis.plot import example_results, learning_curves, save
from analysis.responses import micro_batches, pieces, prompt_groups, respond
from config import EvaluateConfig
from data import load_prompts
from ppo import gae, response_mask, token_rewards
from reward import load_rewards
from runtime.checkpoint import CARD, OTHER_CARD, RESULTS, VIEWER, check_finished, is_our_card, read_json, write_text
from runtime.cli import run
from runtime.device import pick_device
from runtime.errors import BadInput
from runtime.hub import load_policy, open_pair
from runtime.log import side_by_side


def sample_responses(policies, tokenizer, judge, groups, cfg, device):
    """Sample responses for display, at cfg.sample_temperature, to cfg.samples random prompts of the groups.

    policies: {"before", "after"}. Returns (prompt, [(response, judge's probability of POSITIVE) before, after]) each.
    """
    prompts = [prompt[None] for group in groups for prompt in group]  # (1, P) each
    chosen = sorted(np.random.default_rng([cfg.seed, 4]).permutation(len(prompts))[: cfg.samples].tolist())
    cfg, prompts, sides = replace(cfg, temperature=cfg.sample_temperature), [prompts[i] for i in chosen], []
    for name, policy in policies.items():
        answers = respond(policy, policies["before"], tokenizer, prompts, cfg, device, f"{name}, samples")
        responses = [text[len(prompt) :] for prompt, text in zip(answers["prompts"], answers["texts"])]
        sides.append(list(zip(responses, judge.log_odds(answers["texts"]).sigmoid().tolist())))
    return [(prompt, list(pair)) for prompt, *pair in zip(answers["prompts"], *sides)]


# ---- token by token


def trained_with_gae(ppo):
    """Return whether a policy has a trained value head. ppo: the config of its run, None if it is of no run."""
    return ppo is not None and ppo.advantage == "gae"


@torch.no_grad()
def token_metrics(policies, sequences, prompt_len, scores, ppo, temperature, eos_id):
    """Return ({name: (B, T)}, mask) of some responses for the policy after PPO.

    kl: its log-probability minus that of the policy before PPO, nats; ratio: e^kl. If ppo, the config of the run, uses
    GAE: value, of the value head; advantage, from the rewards of PPO with the initial kl_coef, not whitened. RLOO and
    GRPO train no value head, and their advantages need the other responses of a group.
    """
    responses = sequences[:, prompt_len:]
    mask = response_mask(responses, eos_id)
    logprobs, values = policies["after"](sequences, prompt_len, temperature)  # (B, T) each
    kl = (logprobs - policies["before"](sequences, prompt_len, temperature)[0]).where(mask, 0)
    metrics = {"kl": kl, "ratio": kl.clamp(max=20).exp()}
    if not trained_with_gae(ppo):
        return metrics, mask
    scores = scores.to(kl)
    scores = scores.clamp(-ppo.score_clip, ppo.score_clip) if ppo.score_clip else scores
    scores = scores - ppo.missing_eos_penalty * ~(responses == eos_id).any(1)
    advantages, _ = gae(token_rewards(scores, kl, mask, ppo.kl_coef), values, mask, ppo.gamma, ppo.lam)
    return metrics | {"value": values, "advantage": advantages}, mask


def by_token(policies, tokenizer, prompts, tokens, values, ppo, cfg):
    """Return the responses to prompts (B, P) for viewer.json: dicts of the tokens, their metrics, score and judge.

    tokens: the responses, B lists of ids. values: {"score", "judge"}, (B,) each.
    """
    eos_id, prompt_len = tokenizer.eos_token_id, prompts.shape[1]
    responses = pad_sequence([torch.tensor(ids) for ids in tokens], True, eos_id).to(prompts.device)
    sequences, scores = torch.cat([prompts, responses], dim=1), torch.from_numpy(values["score"])  # (B, P + T), (B,)
    parts = [
        token_metrics(policies, sequences[part], prompt_len, scores[part], ppo, cfg.temperature, eos_id)
        for part in micro_batches(policies["after"], sequences)
    ]
    metrics = {name: torch.cat([table[name] for table, _ in parts]) for name in parts[0][0]}
    mask = torch.cat([real for _, real in parts])
    rows = []
    for i, (prompt, ids) in enumerate(zip(prompts.tolist(), tokens)):
        lists = {name: [round(x, 4) for x in table[i][mask[i]].tolist()] for name, table in metrics.items()}
        whole = {name: round(float(numbers[i]), 4) for name, numbers in values.items()}
        rows.append({"tokens": pieces(tokenizer, prompt, ids)} | lists | whole)
    return rows


def viewer(policies, tokenizer, groups, answers, values, ppo, cfg, device):
    """Return viewer.json: responses token by token to cfg.viewer_samples evenly spaced prompts.

    answers, values: {"before", "after"}, as respond and measure return them for all prompts. ppo: the config of the
    run, None if the policy is of no run.
    """
    chosen = np.linspace(0, cfg.prompts - 1, min(cfg.viewer_samples, cfg.prompts)).astype(int)
    samples, start = {i: {"prompt": answers["before"]["prompts"][i]} for i in chosen}, 0
    for prompts in groups:
        rows = chosen[(start <= chosen) & (chosen < start + len(prompts))]
        for name in answers if len(rows) else ():
            tokens = [answers[name]["tokens"][i] for i in rows]
            some = {key: values[name][key][rows] for key in ("score", "judge")}
            responses = by_token(policies, tokenizer, prompts[rows - start].to(device), tokens, some, ppo, cfg)
            for i, response in zip(rows, responses):
                samples[i][name] = response
        start += len(prompts)
    coefficient = {"kl_coef": ppo.kl_coef} if trained_with_gae(ppo) else {}  # used for the advantages
    return coefficient | {"samples": list(samples.values())}


def check_results(cfg):
    """Raise BadInput if cfg.after has an unfinished run, results of another script, or results and no cfg.force."""
    check_finished(cfg.after)
    old = Path(cfg.after, RESULTS)
    if old.is_file() and "difference" not in read_json(old):
        raise BadInput(f"{old} is not of evaluate.py, which would replace it: evaluate a copy of {cfg.after}")
    files = [Path(cfg.after, name) for name in (RESULTS, VIEWER, "samples.md", "example_results.png", report.PAGE)]
    cards = [file for file in (Path(cfg.after, CARD), Path(cfg.after, OTHER_CARD)) if is_our_card(file)]
    found = [file for file in files if file.exists()] + cards
    if found and not cfg.force:
        raise BadInput(f"{found[0]} is there already, of an earlier evaluation: --force replaces them")


def write(out, results, samples, tokens, card):
    """Write everything to the folder of the policy; return the paths. samples, card: Markdown. tokens: of viewer."""
    write_text(out / RESULTS, json.dumps(results, indent=1))
    write_text(out / "samples.md", samples)
    write_text(out / VIEWER, json.dumps(tokens))
    written = [out / RESULTS, out / "samples.md", out / VIEWER, write_card(out, card)]
    written.append(save(example_results(out), out / "example_results.png"))
    if (out / "log.jsonl").is_file():  # not for a policy of a third party
        written.append(learning_curves(out))
    return [*written, report.write(out)]


def main(cfg):
    check_results(cfg)
    device, bf16 = pick_device(cfg)
    opened = open_pair(cfg.before, cfg.after)
    _, config, tokenizer = opened["before"]
    if not Path(cfg.after).is_dir():
        raise BadInput(f"after is {cfg.after!r}, no folder here: results are written beside the policy, so download it")
    ppo, log = ppo_run(cfg.after)
    second = open_second_lm(cfg.second_lm, device) if cfg.second_lm else None
    pool = load_prompts(cfg, "evaluation", config, tokenizer, cfg.prompts)
    reward_fn, judge = load_rewards(cfg, device)

    policies = {name: load_policy(*parts, bf16).to(device).eval() for name, parts in opened.items()}
    groups = list(prompt_groups(pool, cfg))
    results, answers, values = {}, {}, {}
    for name, policy in policies.items():
        answers[name] = respond(policy, policies["before"], tokenizer, groups, cfg, device, name)
        if second:
            answers[name]["second_nll"] = second_nll(*second, answers[name], cfg)
        results[name], values[name] = measure(answers[name], reward_fn, judge, cfg)
    results["difference"] = difference(values["before"], values["after"], cfg)
    names = ("before", "after", "task", "reward", "judge", "second_lm", "seed", "temperature", "sample_temperature")
    results |= {"prompts": cfg.prompts, "config": {name: getattr(cfg, name) for name in names}}
    samples = sample_responses(policies, tokenizer, judge, groups, cfg, device)
    results["samples"] = [
        {"prompt": prompt} | {name: {"text": text, "judge": p} for name, (text, p) in zip(policies, sides)}
        for prompt, sides in samples
    ]

    tokens = viewer(policies, tokenizer, groups, answers, values, ppo, cfg, device)
    card = card_text(results, samples, cfg, ppo, log)

    caption = f"Samples at temperature {cfg.sample_temperature}, beside each the judge's probability of POSITIVE"
    print(f"\n{cfg.prompts} held-out prompts, the same for both; 95 % bootstrap intervals\n\n{table_text(results)}\n")
    print(f"{kl_text(results)}\n\n{textwrap.fill(KL_NOTE, 118)}\n")
    print(f"{caption}\n\n{side_by_side(samples)}")
    written = write(Path(cfg.after), results, f"{caption}.\n\n{samples_markdown(samples)}", tokens, card)
    print("\nwritten:", *written, sep="\n  ")


if __name__ == "__main__":
    run(main, EvaluateConfig)
