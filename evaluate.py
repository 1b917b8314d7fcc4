"""Before and after PPO on the same held-out prompts: the table, side-by-side samples, and the learning curves.

    python evaluate.py
    python evaluate.py --preset mini
    python evaluate.py frontier --preset mini    # hours: many policies instead of two, see frontier.py

Writes results.json, samples.md, example_results.png and learning_curves.png into the folder of the policy,
ppo_checkpoints/<preset>/.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import RESULTS, write_text
from config import BadInput, EvaluateConfig, FrontierConfig, run
from data import load_splits, prompt_pool
from hub import check_context, load_policy, open_pair
from log import one_line, side_by_side
from model import exact_kl, pick_device, random_generator
from plot import example_results, learning_curves, save
from ppo import response_mask
from reward import SentimentReward, as_scores, check_finite, check_reward, load_reward


def prompt_groups(pool, cfg):
    """cfg.prompts prompts as batches of one length each, (B, P) int64: the lengths share them evenly."""
    lengths = range(cfg.min_prompt_len, cfg.max_prompt_len + 1)
    for prompt_len, rows in zip(lengths, np.array_split(np.arange(cfg.prompts), len(lengths))):
        for batch in np.split(rows, range(cfg.batch_size, len(rows), cfg.batch_size)):
            if len(batch):
                yield torch.from_numpy(pool[batch, :prompt_len])


@torch.no_grad()
def respond(policy, ref_policy, tokenizer, groups, cfg, device, name):
    """Sample a response to every prompt. Returns dicts of arrays by response, and the texts.

    prompts, texts: str. tokens: ids up to <|endoftext|>. kl: nats, log-probability less the reference's; kl_exact: the
    same over the whole vocabulary, without the noise of the sampled token. ref_nll: nats of the response under the
    reference. The random numbers depend on cfg.seed and the batch alone: both models get the same.
    """
    out = {name: [] for name in ("prompts", "texts", "tokens", "kl", "kl_exact", "ref_nll")}
    eos_id = tokenizer.eos_token_id
    for i, prompts in enumerate(tqdm(groups, desc=f"answer by {name}", unit="batch")):
        prompts, prompt_len = prompts.to(device), prompts.shape[1]
        generator = random_generator(device, cfg.seed, i)
        sequences = policy.gpt2.generate(prompts, cfg.response_len, cfg.temperature, eos_id, generator)
        mask = response_mask(sequences[:, prompt_len:], eos_id)
        logprobs = policy(sequences, prompt_len, cfg.temperature)[0] * mask
        ref_logprobs = ref_policy(sequences, prompt_len, cfg.temperature)[0] * mask
        out["kl"] += (logprobs - ref_logprobs).sum(1).tolist()
        out["kl_exact"] += exact_kl(policy, ref_policy, sequences, mask, prompt_len, cfg.temperature).tolist()
        out["ref_nll"] += (-ref_policy(sequences, prompt_len)[0] * mask).sum(1).tolist()
        out["tokens"] += [row[keep].tolist() for row, keep in zip(sequences[:, prompt_len:], mask)]
        decode = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        out["prompts"] += tokenizer.batch_decode(prompts, **decode)
        out["texts"] += tokenizer.batch_decode(sequences, **decode)
    return out


def distinct(responses, n):
    """Distinct n-grams over all n-grams of the responses, lists of ids (Li et al. 2016): 1 says nothing twice."""
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def interval(values, cfg, statistic=None):
    """(low, high): the 95 % bootstrap interval of the mean of values (M,), or of statistic(resampled rows)."""
    rng = np.random.default_rng([cfg.seed, 3])
    statistic = statistic or (lambda rows: values[rows].mean())
    draws = [statistic(rng.integers(0, len(values), len(values))) for _ in range(cfg.resamples)]
    return tuple(float(x) for x in np.quantile(draws, (0.025, 0.975)))


def measure(answers, reward_fn, judge, cfg):
    """What the table tells of one model, {name: {"value", "low", "high"}}, and the values by response, {name: (M,)}."""
    texts, length = answers["texts"], np.array([len(ids) for ids in answers["tokens"]])
    scores = as_scores(reward_fn(texts), texts).double()
    check_finite("score", scores, texts)
    per_response = {"score": scores.numpy()}
    if isinstance(reward_fn, SentimentReward):
        per_response["positive_by_reward"] = (reward_fn.log_odds(texts) > 0).double().numpy()
    per_response["positive_by_judge"] = (judge.log_odds(texts) > 0).double().numpy()
    per_response["kl"] = np.array(answers["kl"])
    per_response["kl_exact"] = np.array(answers["kl_exact"])
    per_response["response_length"] = length.astype(float)
    table = {name: row(values.mean(), interval(values, cfg)) for name, values in per_response.items()}

    nll = np.array(answers["ref_nll"])

    def perplexity(rows):  # a ratio of sums: a mean over responses would weigh the tokens of short ones more
        return np.exp(nll[rows].sum() / length[rows].sum())

    table["perplexity"] = row(perplexity(np.arange(len(nll))), interval(nll, cfg, perplexity))
    table["distinct_1"] = row(distinct(answers["tokens"], 1))
    table["distinct_2"] = row(distinct(answers["tokens"], 2))
    return table, per_response


def row(value, bounds=None):
    """A number of the table as it stands in results.json."""
    return {"value": float(value)} | ({"low": bounds[0], "high": bounds[1]} if bounds else {})


CAPTIONS = {
    "score": "score",
    "positive_by_reward": "positive, by the reward",
    "positive_by_judge": "positive, by the judge",
    "kl": "KL, nats a response",
    "kl_exact": "KL over the whole vocabulary",
    "perplexity": "perplexity, fine-tuned model",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "response_length": "length, tokens",
}


def table_text(results):
    """The before/after table as Markdown: it reads well in a terminal too."""

    def cell(entry):
        spread = f" [{entry['low']:.2f}, {entry['high']:.2f}]" if "low" in entry else ""
        return f"{entry['value']:.2f}{spread}"

    cells = [("", "before PPO", "after PPO")]
    cells += [
        (label, cell(results["before"][name]), cell(results["after"][name]))
        for name, label in CAPTIONS.items()
        if name in results["before"]
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


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


def samples_markdown(samples):
    """What sample_answers returns as a Markdown table. Generated text is untrusted: nothing in it stays markup."""

    def quote(text):
        return "".join(f"&#{ord(c)};" if c in "<>&|\\`*_[]!#~$:@." else c for c in one_line(text, 400))

    lines = ["| prompt | before PPO | judge | after PPO | judge |", "|---|---|---|---|---|"]
    for prompt, sides in samples:
        cells = [cell for text, probability in sides for cell in (quote(text), f"{probability:.2f}")]
        lines.append("| " + " | ".join([quote(prompt), *cells]) + " |")
    return "\n".join(lines) + "\n"


def main(cfg):
    device, bf16 = pick_device(cfg)
    opened = open_pair(cfg.before, cfg.after)
    _, config, tokenizer = opened["before"]
    check_context(cfg, config)
    judge = SentimentReward.load(cfg.judge, device=device)
    reward_fn = load_reward(cfg, device)
    pool = prompt_pool(load_splits(cfg.dataset)["evaluation"].texts, tokenizer, cfg.max_prompt_len, cfg.prompts)
    if len(pool) < cfg.prompts:
        raise BadInput(f"prompts is {cfg.prompts}, and the held-out reviews give {len(pool)}")

    if cfg.self_check:
        print("self-check: reward:", check_reward(reward_fn), "| judge:", check_reward(judge, "judge"))

    policies = {name: load_policy(*parts, bf16).to(device).eval() for name, parts in opened.items()}
    groups = list(prompt_groups(pool, cfg))
    results, rows = {}, {}
    for name, policy in policies.items():
        answers = respond(policy, policies["before"], tokenizer, groups, cfg, device, name)
        results[name], rows[name] = measure(answers, reward_fn, judge, cfg)
    results["difference"] = {}
    for name in rows["before"]:  # paired: the same prompt and the same random numbers on both sides
        paired = rows["after"][name] - rows["before"][name]
        results["difference"][name] = row(paired.mean(), interval(paired, cfg))
    results["prompts"], told = cfg.prompts, ("before", "after", "seed", "temperature", "sample_temperature")
    results["config"] = {name: getattr(cfg, name) for name in told}
    samples = sample_answers(policies, tokenizer, judge, groups, cfg, device)
    results["samples"] = [
        {"prompt": prompt} | {name: {"text": text, "judge": p} for name, (text, p) in zip(policies, sides)}
        for prompt, sides in samples
    ]

    out = Path(cfg.after)
    write_text(out / RESULTS, json.dumps(results, indent=1))
    caption = f"Samples at temperature {cfg.sample_temperature}, beside each the judge's probability of POSITIVE"
    write_text(out / "samples.md", f"{caption}.\n\n{samples_markdown(samples)}")
    print(f"\n{cfg.prompts} held-out prompts, the same for both; 95 % bootstrap intervals\n\n{table_text(results)}\n")
    print(f"{caption}\n\n{side_by_side(samples)}")
    written = [out / RESULTS, out / "samples.md", save(example_results(out), out / "example_results.png")]
    if (out / "log.jsonl").is_file():  # not where the policy is somebody else's
        written.append(learning_curves(out))
    print("\nwritten:", *written, sep="\n  ")


if __name__ == "__main__":
    if sys.argv[1:2] == ["frontier"]:
        import frontier  # which imports this file

        del sys.argv[1]
        run(frontier.main, FrontierConfig)
    else:
        run(main, EvaluateConfig)
