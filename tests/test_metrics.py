"""What is measured of the answers: golden numbers, intervals, tables, and a second model that reads them."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import message

from config import EvaluateConfig
from hub import open_gpt2
from metrics import (
    CAPTIONS,
    KLS,
    bits_per_character,
    difference,
    distinct,
    interval,
    jackknife,
    kl_text,
    kl_three_ways,
    leave_one_out,
    measure,
    open_second_lm,
    perplexity,
    repetition,
    second_nll,
    table_text,
)

CFG = EvaluateConfig(batch_size=2, resamples=400)
CPU = torch.device("cpu")


def width(bounds):
    return bounds[1] - bounds[0]


# ---- of one response


def test_the_kl_three_ways_gives_the_golden_numbers():
    """p = (1/2, 1/2) against (1/4, 3/4): k1 is ln 2 and ln 2/3, k3 ln 2 - 1/2 and ln 2/3 + 1/2, exact their mean."""
    logits, ref_logits = (torch.tensor(p).log().expand(2, 2, 2) for p in ([0.5, 0.5], [0.25, 0.75]))
    ids, mask = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[True, True], [True, False]])
    found = kl_three_ways(logits, ref_logits, ids, mask)
    a, b = math.log(2), math.log(2 / 3)
    assert found["kl"].tolist() == pytest.approx([a + b, b])
    assert found["kl_k3"].tolist() == pytest.approx([a - 0.5 + b + 0.5, b + 0.5])
    assert found["kl_exact"].tolist() == pytest.approx([a + b, (a + b) / 2])


def test_the_kl_three_ways_ignores_nan_after_the_end():
    logits, ref_logits = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[True, False, False], [True, True, True]])
    expected = kl_three_ways(logits, ref_logits, ids, mask)
    logits, ref_logits = (x.masked_fill(~mask[..., None], torch.nan) for x in (logits, ref_logits))
    found = kl_three_ways(logits, ref_logits, ids, mask)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_k3_is_never_negative_and_means_the_same_as_k1():
    """Over 20,000 tokens sampled from p; k1 of single tokens is below 0 often."""
    logits, ref_logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    ids = torch.multinomial(logits.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(1))[:, None]
    found = kl_three_ways(
        logits.expand(20_000, 1, 8), ref_logits.expand(20_000, 1, 8), ids, torch.ones_like(ids).bool()
    )
    assert found["kl_k3"].min() >= 0 > found["kl"].min()
    for name in ("kl", "kl_k3"):
        assert found[name].mean().item() == pytest.approx(found["kl_exact"][0].item(), rel=0.05)
    same = kl_three_ways(logits[None, None], logits[None, None] + 1e-7, ids[:1], torch.ones(1, 1).bool())
    assert 0 <= same["kl_k3"].item() < 1e-12


def test_repetition_is_the_share_of_ngrams_that_were_there_before():
    assert repetition([[1, 2, 3, 4, 5], [1] * 6, [1, 2], []]).tolist() == pytest.approx([0, 2 / 3, 0, 0])
    assert repetition([[1, 2, 1, 2]], 2).tolist() == pytest.approx([1 / 3])  # 12, 21, 12


# ---- of all responses together


def test_the_values_of_a_mean_are_the_values_themselves():
    values = np.array([3.0, 1.0, 8.0])
    assert jackknife(*leave_one_out(values.sum(), values, np.ones(3))) == pytest.approx(values)


def test_perplexity_is_of_all_tokens_together():
    """2 tokens at NLL 1 and 18 at 0: e^.1, not the mean over responses; without the first 1, without the second e."""
    values = perplexity(np.array([2.0, 0.0]), np.array([2.0, 18.0]))
    assert values.mean() == pytest.approx(np.exp(0.1))
    assert values[0] - values[1] == pytest.approx(np.e - 1)


def test_distinct_is_the_share_of_ngrams_that_differ():
    responses = [[1, 2, 1, 2], [1, 2], [], [3]]
    assert distinct(responses, 1).mean() == pytest.approx(3 / 7)
    assert distinct(responses, 2).mean() == pytest.approx(2 / 4)  # 12, 21, 12, 12: none across two responses
    assert distinct([[1]], 2).tolist() == [0]


def test_bits_per_character_count_the_response_alone():
    """8 and 2 bits for 4 and 1 characters behind their prompts."""
    values = bits_per_character(np.array([8.0, 2.0]) * math.log(2), ["ab cd", "abc!"], ["a", "abc"])
    assert values.mean() == pytest.approx(2)


# ---- intervals


def test_an_interval_holds_the_mean_and_shrinks_with_more_data():
    values = np.random.default_rng(0).normal(3, 2, 1600)
    (low, high), (narrow_low, narrow_high) = interval(values[:100], CFG), interval(values, CFG)
    assert low < values[:100].mean() < high
    assert narrow_low < values.mean() < narrow_high
    assert high - low == pytest.approx(2 * 1.96 * 2 / 10, rel=0.3)  # the normal approximation
    assert (high - low) / (narrow_high - narrow_low) == pytest.approx(4, rel=0.3)


def test_an_interval_of_a_constant_has_no_width_and_it_takes_any_statistic():
    assert interval(np.full(20, 7.0), CFG) == (7.0, 7.0)
    assert interval(np.arange(5.0), CFG, lambda rows: len(rows)) == (5.0, 5.0)


def some_responses(rng, prompts=200):
    """Responses of 10 to 30 words, frequent and rare ones, so that distinct-1 and -2 lie well inside (0, 1)."""
    return [(rng.zipf(1.4, rng.integers(10, 31)) % 500).tolist() for _ in range(prompts)]


@pytest.mark.parametrize("n", [1, 2])
def test_the_interval_of_distinct_is_as_wide_as_new_responses_would_scatter(n):
    """Against 200 fresh samples. Drawn as it is, with responses twice, the interval would lie below the value."""
    rng = np.random.default_rng(0)
    truth = np.array([distinct(some_responses(rng), n).mean() for _ in range(200)])
    values = distinct(some_responses(rng), n)
    low, high = interval(values, CFG)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * truth.std(), rel=0.35)


class Judge:
    """Finds long texts positive."""

    def log_odds(self, texts):
        return torch.tensor([(len(text) - 20.0) / 4 for text in texts])


def answers(rng, shift):
    """Answers of 300 prompts, of which some are harder than others, whatever model answers: numbers that correlate."""
    rng_prompts = np.random.default_rng(7)
    hard, tokens = rng_prompts.normal(0, 10, 300), some_responses(rng_prompts, 300)
    tokens = [ids + ids[: rng.integers(0, 3)] for ids in tokens]  # nearly the same on both sides
    lengths = np.array([len(ids) for ids in tokens])
    texts = ["x" * n for n in lengths]
    noise = rng.normal(0, 0.5, (5, 300))
    found = {name: (hard + noise[i] + shift).tolist() for i, name in enumerate(KLS)}
    nll = (80 + hard + noise[3]) / 20 * lengths + shift * lengths
    return found | {"texts": texts, "prompts": [""] * 300, "tokens": tokens, "ref_nll": nll, "second_nll": nll}


def test_every_difference_is_paired_and_has_a_narrower_interval_than_two_samples_apart():
    """Resampled apart, the scatter of the prompts would count twice: this holds for every number of the table."""
    rng = np.random.default_rng(0)
    sides = (measure(answers(rng, shift), lambda texts: [len(x) for x in texts], Judge(), CFG) for shift in (0, 0.1))
    (before, b), (after, a) = sides
    found = difference(b, a, CFG)
    assert (
        set(found)
        == {*before, "perplexity_ratio"}
        >= set(CAPTIONS) - {"positive_by_reward", "agrees_negative", "agrees_positive"}
    )
    for name in before:
        apart = math.hypot(*(width((side[name]["low"], side[name]["high"])) for side in (before, after)))
        paired = width((found[name]["low"], found[name]["high"]))
        assert paired < apart * 0.5 or apart == 0, name
        assert found[name]["value"] == pytest.approx(after[name]["value"] - before[name]["value"])
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]


def test_the_ratio_of_perplexities_is_paired_too():
    """A tenth of a nat more for every token: e^.1 whatever the prompts were."""
    rng, lengths = np.random.default_rng(0), np.full(300, 20.0)
    nll = rng.normal(80, 20, 300)
    before, after = ({"perplexity": perplexity(nll + x * lengths, lengths)} for x in (0, 0.1))
    ratio = difference(before, after, CFG)["perplexity_ratio"]
    assert ratio["value"] == pytest.approx(np.exp(0.1))
    assert width((ratio["low"], ratio["high"])) < 1e-9 < width(interval(before["perplexity"], CFG))


def test_measure_tells_value_interval_and_spread():
    """std over responses, divided by M, and the share below 0."""
    some = {"texts": ["a", "bb", "c" * 90], "prompts": ["", "", ""], "tokens": [[1, 2], [3] * 18, [4]]}
    kls = {"kl": [-1.0, 1.0, 3.0], "kl_k3": [1.0, 1.0, 1.0], "kl_exact": [0.0, 0.0, 3.0]}
    table, values = measure(some | kls | {"ref_nll": [2.0, 0.0, 0.1]}, lambda texts: [1.0, 2.0, 6.0], Judge(), CFG)
    assert table["perplexity"]["value"] == pytest.approx(np.exp(0.1))
    assert table["positive_by_judge"]["value"] == pytest.approx(1 / 3)
    assert values["judge"] == pytest.approx(1 / (1 + np.exp([19 / 4, 18 / 4, -70 / 4])))
    assert table["score"]["value"] == 3
    assert table["response_length"]["value"] == 7
    assert table["distinct_1"]["value"] == pytest.approx(4 / 21)
    assert table["repetition"]["value"] == pytest.approx((0 + 14 / 15 + 0) / 3)
    assert (table["kl"]["std"], table["kl"]["below_0"]) == pytest.approx((math.sqrt(8 / 3), 1 / 3))
    assert (table["kl_k3"]["std"], table["kl_k3"]["below_0"], table["kl_exact"]["below_0"]) == (0, 0, 0)
    assert "bits_per_character" not in table  # nobody else read them
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in table.values())
    assert values["kl"].tolist() == kls["kl"]


def test_a_controlled_task_is_measured_behind_each_control():
    """One share for both would hide a policy that writes what is asked behind one control alone."""
    asked = ["[negative] A", "[positive] A", "[positive] B"]
    some = {"texts": ["x" * 30, "x" * 10, "x" * 30], "prompts": asked, "tokens": [[1]] * 3, "ref_nll": [1.0] * 3}
    kls = {name: [0.0] * 3 for name in KLS}
    table, _ = measure(some | kls, lambda texts: [0.0] * 3, Judge(), replace(CFG, task="controlled"))
    assert [table[f"agrees_{control}"]["value"] for control in ("negative", "positive")] == [1, 0.5]
    results = {"before": table, "after": table, "config": {"task": "controlled"}}
    assert "behind [negative], by the judge" in table_text(results) and "as asked, by the judge" in table_text(results)


# ---- tables


def test_the_table_is_rectangular_and_shows_each_value_with_its_interval():
    one = {name: {"value": i, "low": i - 0.5, "high": i + 100} for i, name in enumerate(CAPTIONS)}
    one["distinct_1"] = {"value": 0.25}
    lines = table_text({"before": one, "after": one}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert {line.count("|") for line in lines} == {4}
    assert len(lines) == 2 + len(CAPTIONS)
    place = list(CAPTIONS).index("kl")
    assert f"| {place}.00 [{place - 0.5:.2f}, {place + 100}.00] " in lines[2 + place]
    assert re.search(r"distinct-1 +\| 0.25 +\| 0.25 +\|", "\n".join(lines))


def test_the_difference_is_a_column_where_every_number_has_one():
    one = {"score": {"value": 1}, "kl": {"value": 2}}
    whole = {"before": one, "after": one, "difference": {"score": {"value": 3}, "kl": {"value": 4}, "more": {}}}
    part = whole | {"difference": {"score": {"value": 3}}}
    assert re.search(r"^\| score +\| 1.00 +\| 1.00 +\| 3.00 +\|$", table_text(whole), re.MULTILINE)
    assert {line.count("|") for line in table_text(part).splitlines()} == {4}


def test_the_kl_table_has_a_row_an_estimator_of_the_policy_after_ppo():
    entry = {"value": 4, "low": 3, "high": 5, "std": 2.5, "below_0": 0.125}
    lines = kl_text({"after": dict.fromkeys(KLS, entry)}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[1] for line in lines[2:]] == list(KLS)
    assert all(re.search(r"\| 4.00 \[3.00, 5.00\] +\| 2.50 +\| 0.12 +\|", line) for line in lines[2:])


# ---- a second language model


TEXTS = [("I loved this", " movie, it was"), ("A great film", " with a boring story and no end."), ("A gre", "at film")]


def test_the_second_model_reads_each_response_as_transformers_does(gpt2_folder):
    """Against the loss that transformers computes of one text at a time; the prompt is context, its labels are -100."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    model, tokenizer = open_second_lm(str(gpt2_folder), CPU)
    some = {"prompts": [p for p, _ in TEXTS], "texts": [p + r for p, r in TEXTS]}
    for (prompt, response), found in zip(TEXTS, second_nll(model, tokenizer, some, CFG), strict=True):
        ids = tokenizer(prompt + response)["input_ids"]
        context = sum(len(tokenizer.decode(ids[: n + 1])) <= len(prompt) for n in range(len(ids)))
        labels = torch.tensor([[-100] * (1 + context) + ids[context:]])
        with torch.no_grad():
            loss = reference(torch.tensor([[tokenizer.bos_token_id, *ids]]), labels=labels).loss.item()
        assert 0 < context < len(ids)
        assert found == pytest.approx(loss * (len(ids) - context), rel=1e-4)


def test_a_response_without_a_text_costs_the_second_model_nothing(gpt2_folder):
    some = {"prompts": ["A film", "A film"], "texts": ["A film", "A film."]}
    empty, full = second_nll(*open_second_lm(str(gpt2_folder), CPU), some, CFG)
    assert empty == 0 < full


def test_nan_after_the_end_of_a_text_does_not_count(gpt2_folder, monkeypatch):
    """The texts of a batch are padded to one length."""
    model, tokenizer = open_second_lm(str(gpt2_folder), CPU)
    some = {"prompts": [p for p, _ in TEXTS], "texts": [p + r for p, r in TEXTS]}
    expected, forward, padded = second_nll(model, tokenizer, some, CFG), model.forward, []

    def with_nan(sequences):
        output = forward(sequences)
        padding = sequences == tokenizer.bos_token_id
        padding[:, 0] = False
        padded.append(padding.any().item())
        output.logits[padding] = torch.nan
        return output

    monkeypatch.setattr(model, "forward", with_nan)
    assert second_nll(model, tokenizer, some, CFG) == expected and any(padded)


def test_a_second_model_is_read_from_safetensors_alone_and_runs_no_code(gpt2_folder, tmp_path):
    from transformers import AutoTokenizer

    _, _, tokenizer = open_gpt2(str(gpt2_folder))
    marker, config = tmp_path / "ran", json.loads((gpt2_folder / "config.json").read_text())
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({}, folder / "pytorch_model.bin")
    assert "safetensors" in message(open_second_lm, str(folder), CPU)
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    assert "second_lm" in message(open_second_lm, str(folder), CPU)
    assert not marker.exists()


def test_an_answer_too_long_for_the_second_model_is_said(gpt2_folder):
    some = {"prompts": ["x"], "texts": ["x" * 60]}
    found = message(second_nll, *open_second_lm(str(gpt2_folder), CPU), some, replace(CFG, batch_size=1))
    assert "48" in found
    assert "61" in found
