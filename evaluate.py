"""Before and after PPO on the same held-out prompts: the table, side-by-side samples, and the model card.

    python evaluate.py
    python evaluate.py --preset mini
    python evaluate.py --force --second_lm gpt2         # again, and another language model reads the responses too
    python evaluate.py frontier --preset mini           # hours: many policies instead of two, see frontier.py

Writes README.md (the card), results.json, samples.md, viewer.json, report.html and figures into the folder of the
policy, ppo_checkpoints/<preset>/. Results that are there already are replaced only with --force. The measures are
in metrics.py, the card in card.py.
"""

import json
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import report
from card import card_text, ppo_run, samples_markdown, write_card
from checkpoint import CARD, OTHER_CARD, RESULTS, VIEWER, check_finished, is_our_card, read_json, write_text
from config import BadInput, EvaluateConfig, FrontierConfig, run
from data import check_context, load_splits, prompt_pool
from device import pick_device, random_generator, rows_that_fit
from hub import load_policy, open_pair
from log import side_by_side
from metrics import KL_NOTE, difference, kl_text, kl_three_ways, measure, open_second_lm, second_nll, table_text
from model import token_logprobs
from plot import example_results, learning_curves, save
from ppo import gae, response_mask, token_rewards
from reward import check_reward, load_judge, load_reward

DECODE = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def prompt_groups(pool, cfg):
    """cfg.prompts prompts as batches of one length each, (B, P) int64: the lengths share them evenly."""
    control_len = pool.shape[1] - cfg.max_prompt_len  # 0 where the task has no controls
    lengths = range(cfg.min_prompt_len, cfg.max_prompt_len + 1)
    for prompt_len, rows in zip(lengths, np.array_split(np.arange(cfg.prompts), len(lengths))):
        for batch in np.split(rows, range(cfg.batch_size, len(rows), cfg.batch_size)):
            if len(batch):
                yield torch.from_numpy(pool[batch, : control_len + prompt_len])


@torch.no_grad()
def respond(policy, ref_policy, tokenizer, groups, cfg, device, name):
    """Sample a response to every prompt. Returns dicts of arrays by response, and the texts.

    prompts, texts: str. tokens: ids up to <|endoftext|>. kl, kl_k3, kl_exact: nats, see metrics.kl_three_ways. ref_nll:
    nats of the response under the reference, at temperature 1. The random numbers depend on cfg.seed and the batch
    alone: both models get the same.
    """
    out = {name: [] for name in ("prompts", "texts", "tokens", "kl", "kl_k3", "kl_exact", "ref_nll")}
    eos_id = tokenizer.eos_token_id
    for i, prompts in enumerate(tqdm(groups, desc=f"answer by {name}", unit="batch", leave=None)):
        prompts, prompt_len = prompts.to(device), prompts.shape[1]
        generator = random_generator(device, cfg.seed, i)
        sequences = policy.gpt2.generate(prompts, cfg.response_len, cfg.temperature, eos_id, generator)
        responses = sequences[:, prompt_len:]
        mask = response_mask(responses, eos_id)
        for part in micro_batches(policy, sequences):
            for estimate, values in likelihoods(policy, ref_policy, sequences[part], mask[part], cfg).items():
                out[estimate] += values.tolist()
        out["tokens"] += [row[keep].tolist() for row, keep in zip(responses, mask)]
        out["prompts"] += tokenizer.batch_decode(prompts, **DECODE)
        out["texts"] += tokenizer.batch_decode(sequences, **DECODE)
    return out


def micro_batches(policy, sequences):
    """Slices of the rows of sequences (B, L), each as many rows as training would take in a pass, or one."""
    gpt2, (rows, tokens) = policy.gpt2, sequences.shape
    fit = rows_that_fit(tokens, gpt2.config.n_embd, gpt2.config.n_layer, gpt2.n_tokens, sequences.device)
    return [slice(start, start + max(1, fit)) for start in range(0, rows, max(1, fit))]


@torch.no_grad()
def likelihoods(policy, ref_policy, sequences, mask, cfg):
    """{"kl", "kl_k3", "kl_exact", "ref_nll"} of some responses, (B,) nats each: see respond.

    sequences: (B, P + T). mask: (B, T). Never has more than four tensors of the logits' size.
    """
    prompt_len = sequences.shape[1] - mask.shape[1]
    responses = sequences[:, prompt_len:]
    logits = policy.gpt2(sequences[:, :-1], first=prompt_len - 1)  # (B, T, V)
    ref_logits = logits if policy is ref_policy else ref_policy.gpt2(sequences[:, :-1], first=prompt_len - 1)
    ref_nll = (-token_logprobs(ref_logits, responses)).where(mask, 0).sum(1)
    for some in {logits, ref_logits}:  # one tensor where the two policies are one
        some.div_(cfg.temperature)
    return kl_three_ways(logits, ref_logits, responses, mask) | {"ref_nll": ref_nll}


def sample_answers(policies, tokenizer, judge, groups, cfg, device):
    """Answers for the eye, at cfg.sample_temperature, to a random few of the prompts in groups.

    policies: {"before", "after"}. Returns (prompt, [(response, judge's probability of POSITIVE) before, after]) each.
    """
    prompts = [prompt[None] for group in groups for prompt in group]  # (1, P) each
    few = sorted(np.random.default_rng([cfg.seed, 4]).permutation(len(prompts))[: cfg.samples].tolist())
    cfg, prompts, sides = replace(cfg, temperature=cfg.sample_temperature), [prompts[i] for i in few], []
    for name, policy in policies.items():
        answers = respond(policy, policies["before"], tokenizer, prompts, cfg, device, f"{name}, samples")
        responses = [text[len(prompt) :] for prompt, text in zip(answers["prompts"], answers["texts"])]
        sides.append(list(zip(responses, judge.log_odds(answers["texts"]).sigmoid().tolist())))
    return [(prompt, list(pair)) for prompt, *pair in zip(answers["prompts"], *sides)]


# ---- token by token


def pieces(tokenizer, prompt, tokens):
    """The text that each token of a response adds to the prompt, a str each: joined they are the response's text.

    prompt, tokens: lists of ids. Where a token ends inside a letter it adds "", and the letter comes with a later one.
    <|endoftext|> stands as itself.
    """
    words = tokens[:-1] if tokens[-1] == tokenizer.eos_token_id else tokens
    shown, *texts = tokenizer.batch_decode([[*prompt, *words[:n]] for n in range(len(words) + 1)], **DECODE)
    seen, added = len(shown), []
    for i, text in enumerate(texts):
        whole = i == len(texts) - 1 or not text.endswith("\ufffd")  # that is how half a letter is decoded
        added.append(text[seen:] if whole else "")
        seen = len(text) if whole else seen
    return added + [tokenizer.eos_token] * (len(tokens) - len(words))


def trained_with_gae(ppo):
    """Whether a policy has a trained value head. ppo: the config of its run, None where it is of no run."""
    return ppo is not None and ppo.advantage == "gae"


@torch.no_grad()
def token_numbers(policies, sequences, prompt_len, scores, ppo, temperature, eos_id):
    """What each token of some responses, whoever sampled them, is to the policy after PPO: ({name: (B, T)}, mask).

    kl: its log-probability there less that before PPO, nats; ratio: e^kl. Where ppo, the config of the run, is of GAE:
    value, of the value head; advantage, from the rewards of PPO with the coefficient that it began with, not whitened.
    RLOO and GRPO train no value head, and an advantage needs the other responses of a group.
    """
    responses = sequences[:, prompt_len:]
    mask = response_mask(responses, eos_id)
    logprobs, values = policies["after"](sequences, prompt_len, temperature)  # (B, T) each
    kl = (logprobs - policies["before"](sequences, prompt_len, temperature)[0]).where(mask, 0)
    numbers = {"kl": kl, "ratio": kl.clamp(max=20).exp()}
    if not trained_with_gae(ppo):
        return numbers, mask
    scores = scores.to(kl)
    scores = scores.clamp(-ppo.score_clip, ppo.score_clip) if ppo.score_clip else scores
    scores = scores - ppo.missing_eos_penalty * ~(responses == eos_id).any(1)
    advantages, _ = gae(token_rewards(scores, kl, mask, ppo.kl_coef), values, mask, ppo.gamma, ppo.lam)
    return numbers | {"value": values, "advantage": advantages}, mask


def by_token(policies, tokenizer, prompts, tokens, values, ppo, cfg):
    """The responses to prompts (B, P) as viewer.json tells them: a dict each, of lists by token, score and judge.

    tokens: the responses, B lists of ids. values: {"score", "judge"}, (B,) each.
    """
    eos_id, prompt_len = tokenizer.eos_token_id, prompts.shape[1]
    responses = pad_sequence([torch.tensor(ids) for ids in tokens], True, eos_id).to(prompts.device)
    sequences, scores = torch.cat([prompts, responses], dim=1), torch.from_numpy(values["score"])  # (B, P + T), (B,)
    found = [
        token_numbers(policies, sequences[part], prompt_len, scores[part], ppo, cfg.temperature, eos_id)
        for part in micro_batches(policies["after"], sequences)
    ]
    numbers = {name: torch.cat([table[name] for table, _ in found]) for name in found[0][0]}
    mask = torch.cat([real for _, real in found])
    told = []
    for i, (prompt, ids) in enumerate(zip(prompts.tolist(), tokens)):
        lists = {name: [round(x, 4) for x in table[i][mask[i]].tolist()] for name, table in numbers.items()}
        whole = {name: round(float(numbers[i]), 4) for name, numbers in values.items()}
        told.append({"tokens": pieces(tokenizer, prompt, ids)} | lists | whole)
    return told


def viewer(policies, tokenizer, groups, answers, values, ppo, cfg, device):
    """viewer.json: answers token by token to cfg.viewer_samples prompts, evenly spread, so that all lengths are there.

    answers, values: {"before", "after"}, as respond and measure return them of all prompts. ppo: the config of the run,
    None where the policy is of no run.
    """
    chosen = np.linspace(0, cfg.prompts - 1, min(cfg.viewer_samples, cfg.prompts)).astype(int)
    samples, start = {i: {"prompt": answers["before"]["prompts"][i]} for i in chosen}, 0
    for prompts in groups:
        rows = chosen[(start <= chosen) & (chosen < start + len(prompts))]
        for name in answers if len(rows) else ():
            tokens = [answers[name]["tokens"][i] for i in rows]
            some = {key: values[name][key][rows] for key in ("score", "judge")}
            told = by_token(policies, tokenizer, prompts[rows - start].to(device), tokens, some, ppo, cfg)
            for i, response in zip(rows, told):
                samples[i][name] = response
        start += len(prompts)
    coefficient = {"kl_coef": ppo.kl_coef} if trained_with_gae(ppo) else {}  # that of the advantages
    return coefficient | {"samples": list(samples.values())}


def check_results(cfg):
    """BadInput where cfg.after holds an unfinished run, or results: of another script, or ours without cfg.force."""
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
    """Put everything into the folder of the policy; returns the paths. samples, card: Markdown. tokens: of viewer."""
    write_text(out / RESULTS, json.dumps(results, indent=1))
    write_text(out / "samples.md", samples)
    write_text(out / VIEWER, json.dumps(tokens))
    written = [out / RESULTS, out / "samples.md", out / VIEWER, write_card(out, card)]
    written.append(save(example_results(out), out / "example_results.png"))
    if (out / "log.jsonl").is_file():  # not where the policy is somebody else's
        written.append(learning_curves(out))
    return [*written, report.write(out)]


def main(cfg):
    check_results(cfg)
    device, bf16 = pick_device(cfg)
    opened = open_pair(cfg.before, cfg.after)
    _, config, tokenizer = opened["before"]
    check_context(cfg, config, tokenizer)
    if not Path(cfg.after).is_dir():
        raise BadInput(f"after is {cfg.after!r}, no folder here: results are written beside the policy, so download it")
    ppo, log = ppo_run(cfg.after)
    second = open_second_lm(cfg.second_lm, device) if cfg.second_lm else None
    judge, reward_fn = load_judge(cfg, device), load_reward(cfg, device)
    reviews = load_splits(cfg.dataset, cfg.text_column, cfg.label_column)["evaluation"].texts
    pool = prompt_pool(reviews, tokenizer, cfg.max_prompt_len, cfg.prompts, cfg.task)
    if len(pool) < cfg.prompts:
        raise BadInput(f"prompts is {cfg.prompts}, and the held-out reviews give {len(pool)}")

    if cfg.self_check:
        print("self-check: reward:", check_reward(reward_fn), "| judge:", check_reward(judge, "judge"))

    policies = {name: load_policy(*parts, bf16).to(device).eval() for name, parts in opened.items()}
    groups = list(prompt_groups(pool, cfg))
    results, answers, values = {}, {}, {}
    for name, policy in policies.items():
        answers[name] = respond(policy, policies["before"], tokenizer, groups, cfg, device, name)
        if second:
            answers[name]["second_nll"] = second_nll(*second, answers[name], cfg)
        results[name], values[name] = measure(answers[name], reward_fn, judge, cfg)
    results["difference"] = difference(values["before"], values["after"], cfg)
    told = ("before", "after", "task", "reward", "judge", "second_lm", "seed", "temperature", "sample_temperature")
    results |= {"prompts": cfg.prompts, "config": {name: getattr(cfg, name) for name in told}}
    samples = sample_answers(policies, tokenizer, judge, groups, cfg, device)
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
    if sys.argv[1:2] == ["frontier"]:
        import frontier  # which imports this file

        del sys.argv[1]
        run(frontier.main, FrontierConfig)
    else:
        run(main, EvaluateConfig)
