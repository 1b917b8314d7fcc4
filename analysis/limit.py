"""The limit: how much score a nat of KL can buy at most, and the KL efficiency of a policy.

The policy with the highest E[score] - beta KL(policy || reference) is known: pi*(y | x) is proportional to
reference(y | x) exp(score(x, y) / beta) (Ziegler et al. 2019, arXiv:1909.08593; Rafailov et al. 2023, arXiv:2305.18290,
Eq. 4). No policy has a higher score at the KL of pi*. With N responses of the reference to a prompt, weighted by
w = softmax(score / beta), the score of pi* is sum w score, and its KL is sum w log(N w).

The KL efficiency of a policy is the KL that pi* needs for the same score, divided by the KL of the policy: 1 at best.

Shapes: M prompts, N responses of the reference to each, K coefficients beta.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from analysis.responses import prompt_groups
from data import decode
from reward import SentimentReward, check_finite, reward_fingerprint, scored
from runtime import checkpoint
from runtime.checkpoint import fingerprint
from runtime.device import random_generator, release_memory
from runtime.hub import policy_fingerprint

# N responses show a KL of at most log N, and near it the curve is too low. For normally distributed scores and N = 128,
# the KL that it needs for a score is too high by 2 % at 1 nat, 6 % at 2, and 11 % at log N - MARGIN, where it ends. The
# same holds for the KL efficiency. With N = 512 it is 1 %, 3 % and 4 % at 1, 2 and 2.5 nats.
MARGIN = 2
OVERRUN = 0.5  # nats that the curve is continued, so that it can be resampled up to its end
BETAS = np.geomspace(100, 0.01, 161)  # in units of the standard deviation of the scores of a prompt's responses
POINTS = 30  # of the curve in limit.csv
ROWS = 256  # responses that are generated together
SEED = 6  # the random numbers differ from those of respond and of the bootstrap


def limit_curve(scores, shares=None):
    """Return (kl, gain), (K, M) each: nats of pi* and its score minus the reference's, for each prompt and each beta.

    scores: (M, N). The first row is the reference itself. beta falls until the mean KL is OVERRUN nats above the end of
    the curve, log N - MARGIN. With shares (M, N), of responses that the judge finds positive, also returns the share of
    pi*, (K, M).
    """
    scores = torch.as_tensor(scores, dtype=torch.float64)
    n, spread = scores.shape[1], scores.std(1).mean().item() or 1.0
    values = [scores] if shares is None else [scores, torch.as_tensor(shares, dtype=torch.float64)]
    rows = [[torch.zeros(len(scores)), *(value.mean(1) for value in values)]]  # of each: KL, score, share
    for beta in spread * BETAS:
        weights = (scores / beta).softmax(1)
        kl = torch.xlogy(weights, n * weights).sum(1)
        rows.append([kl, *((weights * value).sum(1) for value in values)])
        if kl.mean() >= math.log(n) - MARGIN + OVERRUN:
            break
    kl, score, *share = (torch.stack(column).numpy() for column in zip(*rows))
    return kl, score - score[0], *share


def kl_needed(gain, kl_curve, gain_curve):
    """Return the KL that pi* needs for a gain in score, nats: 0 for a loss, that of the last point beyond the curve.

    kl_curve, gain_curve: (K,), means over prompts. Linear between the points.
    """
    return float(np.interp(gain, gain_curve, kl_curve))


def curve_end(scores, kl_curve):
    """Return the KL at which the curve of scores (M, N) ends, or its largest KL (K,) if it does not reach this one."""
    return min(math.log(scores.shape[1]) - MARGIN, kl_curve[-1])


def kl_efficiency(scores, gains, kls, cfg):
    """Compare a policy with the limit: a dict for results.json, or None if the policy has no KL.

    scores: (M, N) of the reference's responses. gains, kls: the policy's score minus the reference's, and its KL, one
    number per evaluated prompt. value, low, high: the efficiency and its 95 % bootstrap interval; prompts are
    resampled, those of the limit and those of the policy. at_least is True if N responses cannot show a gain that high:
    then pi* needs more KL, the efficiency is higher, and there is no interval.
    """
    if kls.mean() <= 0:
        return None
    kl_curve, gain_curve = limit_curve(scores)
    kl, gain = kl_curve.mean(1), gain_curve.mean(1)
    end = curve_end(scores, kl)
    at_least = bool(gains.mean() > np.interp(end, kl, gain))
    needed = end if at_least else kl_needed(gains.mean(), kl, gain)
    rng, draws = np.random.default_rng([cfg.seed, 5]), []
    for _ in range(cfg.resamples):
        rows, prompts = (rng.integers(0, size, size) for size in (len(gains), len(scores)))
        curves = kl_curve[:, prompts].mean(1), gain_curve[:, prompts].mean(1)
        draws.append(kl_needed(gains[rows].mean(), *curves) / kls[rows].mean())
    interval = {} if at_least else dict(zip(("low", "high"), map(float, np.quantile(draws, (0.025, 0.975)))))
    return {
        "value": needed / float(kls.mean()),
        **interval,
        "at_least": at_least,
        "gain": float(gains.mean()),
        "kl": float(kls.mean()),
        "kl_needed": needed,
        "responses": list(np.shape(scores)),
    }


def limit_rows(scores, shares, cfg):
    """Return the curve as dicts, one per KL, for limit.csv.

    kl: nats. gain, low, high: of pi*, with its 95 % bootstrap interval over prompts. half: the gain with half of the
    responses, which shows the bias; nan beyond the end of its curve. positive_by_judge: of pi*.
    """
    kl, gain, share = limit_curve(scores, shares)
    parts = np.array_split(scores, 2, axis=1)
    halves = [[x.mean(1) for x in limit_curve(part)] for part in parts]
    half_end = min(curve_end(part, half[0]) for part, half in zip(parts, halves))
    grid = np.linspace(0, curve_end(scores, kl.mean(1)) ** 0.5, POINTS) ** 2
    rng, draws = np.random.default_rng([cfg.seed, 5]), []
    for _ in range(cfg.resamples):
        prompts = rng.integers(0, len(scores), len(scores))
        draws.append(np.interp(grid, kl[:, prompts].mean(1), gain[:, prompts].mean(1)))
    columns = {
        "kl": grid,
        "gain": np.interp(grid, kl.mean(1), gain.mean(1)),
        **dict(zip(("low", "high"), np.quantile(draws, (0.025, 0.975), axis=0))),
        "half": np.where(grid <= half_end, np.mean([np.interp(grid, *half) for half in halves], axis=0), np.nan),
        "positive_by_judge": np.interp(grid, kl.mean(1), share.mean(1)),
    }
    return [dict(zip(columns, map(float, row))) for row in zip(*columns.values())]


def best_of_n_weights(n, size):
    """Return the probability of each of `size` scores, in rising order, to be the highest of n of them: (size,).

    n are drawn without replacement, so the mean with these weights is the unbiased estimate of best-of-n.
    """
    return np.array([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)])


# ---- responses of the reference


@torch.no_grad()
def sample_scores(policy, tokenizer, reward_fn, judge, groups, cfg, device):
    """Return the scores of cfg.limit_samples responses of the policy to each prompt: (1, M, N) float64.

    With a judge, (2, M, N): the second row is 1 if the judge finds the response positive, else 0. groups: from
    prompt_groups.
    """
    scores, shares, eos_id = [], [], tokenizer.eos_token_id
    parts = [part for group in groups for part in group.repeat_interleave(cfg.limit_samples, 0).split(ROWS)]
    for i, prompts in enumerate(tqdm(parts, desc="responses for the limit", unit="batch", leave=None)):
        prompts, rng = prompts.to(device), random_generator(device, cfg.seed, SEED, i)
        texts = decode(policy.gpt2.generate(prompts, cfg.response_len, cfg.temperature, eos_id, rng), tokenizer)
        scores.append(scored(reward_fn, texts)[0].double())
        check_finite("score", scores[-1], texts)
        if judge:
            shares.append((judge.log_odds(texts) > 0).double())
        release_memory(torch.device(device))
    columns = [scores, shares] if judge else [scores]
    return np.stack([torch.cat(x).view(-1, cfg.limit_samples).cpu().numpy() for x in columns])


def reference_scores(policy, tokenizer, reward_fn, judge, pool, cfg, device):
    """Return the result of sample_scores for the first cfg.limit_prompts prompts of the pool, kept in cfg.limit_cache.

    So all policies with the same reference, reward and judge are compared with the same responses, and only the first
    evaluation takes the time to generate them. Nothing is kept for the reward of a user: its file may import others.
    """
    groups = list(prompt_groups(pool, replace(cfg, prompts=min(cfg.limit_prompts, cfg.prompts))))
    kept = isinstance(reward_fn, SentimentReward)
    models = [reward_fingerprint(classifier) for classifier in (reward_fn, judge) if classifier]
    options = cfg.limit_samples, cfg.response_len, cfg.temperature, cfg.seed, cfg.reward_kind, cfg.task
    key = fingerprint(
        policy_fingerprint(policy, tokenizer), *models, str(options), str([group.tolist() for group in groups])
    )
    file = Path(cfg.limit_cache, f"{key}.npy")
    if kept and file.is_file():
        try:
            return np.load(file)
        except (ValueError, EOFError):  # damaged
            pass
    scores = sample_scores(policy, tokenizer, reward_fn, judge, groups, cfg, device)
    if kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file.with_suffix(".tmp.npy"), scores)
        checkpoint.replace(file.with_suffix(".tmp.npy"), file)
    return scores
