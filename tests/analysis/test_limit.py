"""The limit against problems where it is known, and the KL efficiency of a policy."""

import copy
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import message

from analysis import limit
from analysis.limit import (
    best_of_n_weights,
    kl_efficiency,
    limit_curve,
    limit_rows,
    reference_scores,
    sample_scores,
)
from analysis.responses import prompt_groups
from analysis.tables import efficiency_text
from config import EvaluateConfig
from reward import SentimentReward, load_reward
from runtime.hub import load_policy, open_gpt2

CFG = EvaluateConfig(resamples=300)


def two_texts(share, n, prompts=1):
    """Scores of n responses to each prompt, of which a share has score 1 and the others 0."""
    return np.tile(np.arange(n) < share * n, (prompts, 1)).astype(float)


def normal_scores(prompts, n, seed=0):
    return np.random.default_rng(seed).standard_normal((prompts, n))


# ---- the curve


def test_the_curve_is_that_of_pi_star_where_all_responses_are_known():
    """A text of score 1 with probability p, else 0: pi* has q = p e^(1/beta) / (p e^(1/beta) + 1 - p) of it, and its KL
    is q log(q / p) + (1 - q) log((1 - q) / (1 - p)). With shares of exactly p the estimate is exact."""
    p = 0.25
    kl, gain = (x[:, 0] for x in limit_curve(two_texts(p, 4096)))
    q = gain + p
    assert len(q) > 50 and q[0] == p and q[-1] == pytest.approx(1)
    expected = q * np.log(q / p) + np.where(q < 1, (1 - q) * np.log(np.maximum(1 - q, 1e-300) / (1 - p)), 0)
    assert kl == pytest.approx(expected, abs=1e-9)
    assert kl[-1] == pytest.approx(math.log(4), abs=1e-6)


def test_for_normal_scores_the_gain_is_the_root_of_twice_the_kl():
    """pi* is then a normal distribution with its mean shifted by 1 / beta: KL 1 / (2 beta^2)."""
    kl, gain = (x.mean(1) for x in limit_curve(normal_scores(16, 100_000)))
    for nats in (0.1, 0.5, 1, 2):
        assert np.interp(nats, kl, gain) == pytest.approx(math.sqrt(2 * nats), rel=0.02)


@pytest.mark.parametrize(
    "n, nats, bias",
    [(128, 1, 0.02), (128, 2, 0.06), (128, 2.85, 0.11), (512, 1, 0.01), (512, 2, 0.03), (512, 2.5, 0.04)],
)
def test_few_responses_need_too_much_kl_by_the_share_that_margin_states(n, nats, bias):
    """Measured on normal scores, where a gain needs a KL of gain^2 / 2."""
    kl, gain = (x.mean(1) for x in limit_curve(normal_scores(1500, n)))
    assert nats / (np.interp(nats, kl, gain) ** 2 / 2) - 1 == pytest.approx(bias, abs=0.012)


def test_the_curve_is_continued_half_a_nat_beyond_log_n_minus_the_margin():
    for n in (64, 128):
        kl, end = limit_curve(normal_scores(32, n))[0].mean(1), math.log(n) - limit.MARGIN
        assert kl[-2] < end + limit.OVERRUN <= kl[-1] < end + limit.OVERRUN + 0.2 and (np.diff(kl) > 0).all()


def test_the_published_curve_ends_at_log_n_minus_the_margin_with_a_whole_interval():
    """Catches resampled curves that end before it, and then repeat their last gain: the interval would narrow."""
    scores = normal_scores(64, 128) * np.random.default_rng(1).uniform(0.5, 1.5, 64)[:, None]
    rows = limit_rows(scores, np.zeros_like(scores), replace(CFG, resamples=2000))
    assert (rows[-1]["kl"], len(rows)) == (pytest.approx(math.log(128) - limit.MARGIN), limit.POINTS)
    below, above = ([row["gain"] - row["low"] for row in rows], [row["high"] - row["gain"] for row in rows])
    for widths in (below, above):
        assert widths[-1] == pytest.approx(widths[-3], rel=0.1) and widths[-1] > widths[-8]


def test_equal_scores_have_a_limit_of_no_gain():
    kl, gain = limit_curve(np.full((3, 64), 0.7))
    assert abs(kl).max() < 1e-12 and abs(gain).max() < 1e-12


def test_the_scale_and_the_mean_of_the_scores_do_not_change_the_kl():
    scores = normal_scores(8, 64)
    (kl, gain), (other_kl, other_gain) = limit_curve(scores), limit_curve(1000 * scores - 5)
    assert other_kl == pytest.approx(kl) and other_gain == pytest.approx(1000 * gain)


def test_best_of_n_is_the_mean_of_the_highest_score_over_all_choices():
    """Compared with every choice of n of 6 scores, and with the expectation of a maximum of uniform numbers."""
    scores = np.sort(normal_scores(1, 6)[0])
    for n in (1, 2, 4, 6):
        expected = np.mean([max(chosen) for chosen in combinations(scores, n)])
        assert best_of_n_weights(n, 6) @ scores == pytest.approx(expected)
    grid = (np.arange(1000) + 0.5) / 1000
    assert best_of_n_weights(4, 1000) @ grid == pytest.approx(4 / 5, abs=1e-3)


# ---- KL efficiency


def test_pi_star_has_an_efficiency_of_1_and_half_of_it_at_twice_the_kl():
    scores = normal_scores(64, 128)
    kl, gain = (x[60] for x in limit_curve(scores))
    best, wasteful = (kl_efficiency(scores, gain, kls, CFG) for kls in (kl, 2 * kl))
    assert best["value"] == pytest.approx(1) and wasteful["value"] == pytest.approx(0.5)
    assert best["gain"] == pytest.approx(gain.mean()) and best["kl"] == best["kl_needed"] == pytest.approx(kl.mean())
    assert best["low"] < 1 < best["high"] < 1.5
    assert not best["at_least"] and best["responses"] == [64, 128]


def test_a_gain_beyond_the_curve_is_marked_and_has_the_kl_of_its_end():
    scores = normal_scores(64, 128)
    entry = kl_efficiency(scores, np.full(10, 100.0), np.full(10, 50.0), CFG)
    assert entry["at_least"] and entry["kl_needed"] == math.log(128) - limit.MARGIN
    assert entry.keys().isdisjoint({"low", "high"})  # a bound of the efficiency has no interval
    assert efficiency_text(entry).startswith("KL efficiency >= 0.06: ") and "or more for this" in efficiency_text(entry)


def test_a_lower_score_than_the_reference_has_an_efficiency_of_0_and_no_kl_has_none():
    scores = normal_scores(64, 128)
    assert kl_efficiency(scores, np.full(10, -0.5), np.full(10, 2.0), CFG)["value"] == 0
    assert kl_efficiency(scores, np.zeros(10), np.zeros(10), CFG) is None
    assert "not defined" in efficiency_text(None)


def test_the_interval_contains_the_spread_of_both_prompts_and_responses():
    """It is wider with fewer prompts of the limit, and with fewer prompts of the policy."""
    rng = np.random.default_rng(0)
    scores = normal_scores(256, 64) * np.linspace(0.2, 2, 256)[:, None]
    gains, kls = 0.7 + rng.standard_normal(256), rng.exponential(1.0, 256)

    def width(prompts, responses):
        entry = kl_efficiency(scores[::prompts], gains[::responses], kls[::responses], CFG)
        return entry["high"] - entry["low"]

    assert width(1, 1) < width(32, 1) and width(1, 1) < width(1, 8)
    assert kl_efficiency(scores, gains, kls, CFG) == kl_efficiency(scores, gains, kls, CFG)


def test_the_efficiency_is_printed_as_one_sentence():
    scores = two_texts(0.25, 64, prompts=4)
    kl, gain = (x[5] for x in limit_curve(scores))
    text = efficiency_text(kl_efficiency(scores, gain, 2 * kl, CFG))
    assert text.startswith("KL efficiency 0.50 [0.50, 0.50]: the score is ")
    assert f"is {2 * kl.mean():.2f} nats; the best possible policy needs {kl.mean():.2f} for this score" in text


# ---- responses of the reference


@pytest.fixture(scope="module")
def models(gpt2_folder, bert_folder, judge_folder):
    folder, config, tokenizer = open_gpt2(str(gpt2_folder))
    policy = load_policy(folder, config, tokenizer).eval()
    return policy, tokenizer, SentimentReward.load(str(bert_folder)), SentimentReward.load(str(judge_folder))


SMALL = replace(CFG, prompts=8, limit_prompts=6, limit_samples=16, min_prompt_len=2, max_prompt_len=4, response_len=6)
POOL = np.arange(32, dtype=np.int64).reshape(8, 4) + 5
CPU = torch.device("cpu")


def test_each_prompt_has_its_own_responses_in_its_row(models, monkeypatch):
    """Compared with a sampling prompt by prompt, with the texts that were scored."""
    policy, tokenizer, reward_fn, judge = models
    monkeypatch.setattr(limit, "ROWS", 40)  # a batch ends inside the responses to a prompt
    texts = []
    monkeypatch.setattr(
        limit, "decode", lambda ids, t, plain=limit.decode: texts.extend(plain(ids, t)) or texts[-len(ids) :]
    )
    groups = list(prompt_groups(POOL, replace(SMALL, prompts=6)))
    scores, shares = sample_scores(policy, tokenizer, reward_fn, judge, groups, SMALL, CPU)
    assert scores.shape == shares.shape == (6, 16) and scores.dtype == np.float64
    assert scores.ravel() == pytest.approx(reward_fn(texts).numpy(), abs=1e-5)
    assert shares.ravel().tolist() == (judge.log_odds(texts) > 0).float().tolist()
    prompts = [tokenizer.decode(row) for group in groups for row in group]
    assert all(text.startswith(prompts[i // 16]) for i, text in enumerate(texts))
    assert len(set(texts)) > 60


def test_the_second_call_reads_the_scores_and_another_reference_reward_or_option_does_not(
    models, tmp_path, monkeypatch
):
    policy, tokenizer, reward_fn, judge = models
    cfg = replace(SMALL, limit_cache=str(tmp_path / "cache"))
    calls = []
    monkeypatch.setattr(limit, "sample_scores", lambda *a, plain=sample_scores: calls.append(a) or plain(*a))

    def scores(policy=policy, reward_fn=reward_fn, judge=judge, pool=POOL, cfg=cfg):
        calls.clear()
        return *reference_scores(policy, tokenizer, reward_fn, judge, pool, cfg, CPU), len(calls)

    first, shares, sampled = scores()
    assert sampled == 1 and first.shape == (6, 16)
    again, same_shares, sampled = scores()
    assert sampled == 0 and np.array_equal(again, first) and np.array_equal(same_shares, shares)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.gpt2.ln_f.bias += 0.1
    assert scores(policy=other)[-1] == 1
    assert scores(reward_fn=judge)[-1] == 1 and scores(judge=reward_fn)[-1] == 1 and scores(pool=POOL + 1)[-1] == 1
    for name, value in dict(limit_samples=20, response_len=5, temperature=0.5, seed=1, limit_prompts=5).items():
        assert scores(cfg=replace(cfg, **{name: value}))[-1] == 1
    assert scores()[-1] == 0


def test_a_damaged_file_in_the_cache_is_replaced(models, tmp_path):
    policy, tokenizer, reward_fn, judge = models
    cfg = replace(SMALL, limit_cache=str(tmp_path))
    first = reference_scores(policy, tokenizer, reward_fn, judge, POOL, cfg, CPU)
    (file,) = tmp_path.iterdir()
    for content in (b"", b"not numbers", file.read_bytes()[:-8]):
        file.write_bytes(content)
        assert np.array_equal(reference_scores(policy, tokenizer, reward_fn, judge, POOL, cfg, CPU), first)
    assert np.load(file).shape == (2, 6, 16)
    (scores,) = reference_scores(policy, tokenizer, reward_fn, None, POOL, cfg, CPU)  # without a judge
    assert np.array_equal(scores, first[0]) and len(list(tmp_path.iterdir())) == 2


def test_the_scores_of_a_users_function_are_not_kept(models, tmp_path):
    """Two functions of one file would be taken for each other, and a change in what the file imports is not seen."""
    policy, tokenizer, _, judge = models
    (tmp_path / "mine.py").write_text(
        "def f(texts):\n    return [1] * len(texts)\ng = lambda texts: [2] * len(texts)\n"
    )
    cfg = replace(SMALL, limit_cache=str(tmp_path / "cache"))
    for name, score in (("f", 1), ("g", 2)):
        reward_fn = load_reward(replace(CFG, reward=f"{tmp_path}/mine.py:{name}"), CPU)
        scores, _ = reference_scores(policy, tokenizer, reward_fn, judge, POOL, cfg, CPU)
        assert (scores == score).all() and not (tmp_path / "cache").exists()


def test_too_few_responses_for_a_limit_are_refused():
    assert "limit_samples is 15: it must be at least 16, or 0" in message(EvaluateConfig, limit_samples=15)
    assert EvaluateConfig(limit_samples=0).limit_samples == 0
