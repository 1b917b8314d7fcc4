"""What is measured of the answers: golden numbers, intervals, tables, and a second model that reads them."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LogitsMemory, message

from analysis import metrics
from analysis.metrics import (
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
from config import EvaluateConfig
from data import train_wordpiece
from runtime.hub import open_gpt2

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


def test_leaving_out_the_only_ngram_divides_by_no_0():
    """1 of 1 is distinct. Of 1 and 2, 2 there are 2 of 3; without the first 1 of 2, without the second 1 of 1."""
    assert distinct([[1]], 1).tolist() == [1]
    assert distinct([[1], [2, 2]], 1) == pytest.approx([2 / 3 + 1 / 4, 2 / 3 - 1 / 4])


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


def test_an_interval_is_that_of_95_percent():
    """1.96 standard errors to either side; quantiles of 5 and 95 % would be 1.64, and 90 %."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    error = values.std() / 20
    low, high = interval(values, replace(CFG, resamples=20_000))
    assert (values.mean() - low, high - values.mean()) == pytest.approx((1.96 * error, 1.96 * error), rel=0.05)


def test_an_interval_depends_on_the_seed_and_not_on_the_model():
    """The same rows for two models; another seed draws others."""
    values = np.random.default_rng(0).normal(3, 2, 50)
    low, high = interval(values, CFG)
    assert interval(values + 1, CFG) == pytest.approx((low + 1, high + 1))
    assert interval(values, replace(CFG, seed=1)) != (low, high)


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
    assert table["distinct_2"]["value"] == pytest.approx(2 / 18)
    assert table["repetition"]["value"] == pytest.approx((0 + 14 / 15 + 0) / 3)
    assert (table["kl"]["std"], table["kl"]["below_0"]) == pytest.approx((math.sqrt(8 / 3), 1 / 3))
    assert (table["kl_k3"]["std"], table["kl_k3"]["below_0"], table["kl_exact"]["below_0"]) == (0, 0, 0)
    assert "bits_per_character" not in table  # nobody else read them
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in table.values())
    assert values["kl"].tolist() == kls["kl"]


def test_a_text_is_positive_where_its_log_odds_are_above_0():
    """Those of Judge are -1/4, 0 and 1/4 here."""
    some = {"texts": ["x" * n for n in (19, 20, 21)], "prompts": [""] * 3, "tokens": [[1]] * 3, "ref_nll": [1.0] * 3}
    _, values = measure(some | dict.fromkeys(KLS, [0.0] * 3), lambda texts: [0.0] * 3, Judge(), CFG)
    assert values["positive_by_judge"].tolist() == [0, 0, 1]


def test_a_score_that_is_not_finite_is_named_with_its_text():
    some = {"texts": ["a", "bb"], "prompts": [""] * 2, "tokens": [[1]] * 2, "ref_nll": [1.0] * 2}
    found = message(measure, some | dict.fromkeys(KLS, [0.0] * 2), lambda texts: [1.0, math.nan], Judge(), CFG)
    assert re.match("score of text 1 is nan: 'bb'", found)


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
    assert re.fullmatch(r"\| nats a response +\| mean +\| standard deviation +\| share below 0 +\|", lines[0])
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


@pytest.mark.parametrize("batch_size", [100, 7])
def test_the_second_model_s_logits_are_those_of_a_micro_batch(gpt2_folder, monkeypatch, batch_size):
    """2,048 tokens on a CPU; how many rows a pass has changes no number."""
    model, tokenizer = open_second_lm(str(gpt2_folder), CPU)
    prompts = ["A film"] * 90
    some = {"prompts": prompts, "texts": [f"{prompt} was {i % 9}, {'x' * 30}" for i, prompt in enumerate(prompts)]}
    longest = 1 + max(len(tokenizer(text)["input_ids"]) for text in some["texts"])
    cfg, vocabulary = replace(CFG, batch_size=batch_size), len(tokenizer)
    with LogitsMemory(vocabulary) as memory:
        found = second_nll(model, tokenizer, some, cfg)
    rows = min(2048 // longest, batch_size)
    assert rows < 90 and memory.largest == rows * longest * vocabulary
    assert memory.most <= 2 * memory.largest
    monkeypatch.setattr(metrics, "rows_that_fit", lambda *_: 0)
    assert second_nll(model, tokenizer, some, cfg) == pytest.approx(found, rel=1e-5)


def test_a_response_without_a_text_costs_the_second_model_nothing(gpt2_folder):
    some = {"prompts": ["A film", "A film"], "texts": ["A film", "A film."]}
    empty, full = second_nll(*open_second_lm(str(gpt2_folder), CPU), some, CFG)
    assert empty == 0 < full


class Reader:
    """A second model that gives every token the same probability, and keeps what it reads."""

    device = CPU

    def __init__(self, **sizes):
        shape = SimpleNamespace(hidden_size=8, num_hidden_layers=1, vocab_size=300)
        self.config, self.read, self.rows = SimpleNamespace(get_text_config=lambda: shape, **sizes), [], []

    def __call__(self, sequences):
        self.read += sequences.tolist()
        self.rows.append(len(sequences))
        return SimpleNamespace(logits=torch.zeros(*sequences.shape, 300))


@pytest.mark.parametrize(("bos", "eos", "start"), [(5, None, 5), (None, 6, 6), (5, 6, 5)])
def test_the_second_model_reads_a_text_after_its_bos_token_or_else_its_eos_token(bos, eos, start):
    """And no other special token, although this tokenizer puts [CLS] and [SEP] around a text by itself."""
    model, tokenizer = Reader(), train_wordpiece([text for pair in TEXTS for text in pair], 200)
    words = tokenizer.convert_ids_to_tokens
    tokenizer.bos_token, tokenizer.eos_token = (id if id is None else words(id) for id in (bos, eos))
    ids = tokenizer("A great film", add_special_tokens=False)["input_ids"]
    assert ids != tokenizer("A great film")["input_ids"]
    (nll,) = second_nll(model, tokenizer, {"prompts": ["A great"], "texts": ["A great film"]}, CFG)
    assert model.read == [[start, *ids]]
    assert nll == pytest.approx(math.log(300) * len(tokenizer(" film", add_special_tokens=False)["input_ids"]))


@pytest.mark.parametrize(("fit", "rows"), [(0, [1, 1, 1]), (2, [2, 1]), (9, [2, 1])])
def test_a_pass_of_the_second_model_has_the_rows_that_fit_of_a_batch(gpt2_folder, monkeypatch, fit, rows):
    """And one where none does. What fits is asked of the model's own sizes."""
    model, tokenizer, asked = Reader(), open_second_lm(str(gpt2_folder), CPU)[1], []
    monkeypatch.setattr(metrics, "rows_that_fit", lambda *sizes: asked.append(sizes) or fit)
    second_nll(model, tokenizer, {"prompts": ["A"] * 3, "texts": ["A film"] * 3}, replace(CFG, batch_size=2))
    assert model.rows == rows
    assert asked == [(len(model.read[0]), 8, 1, 300, CPU)]


@pytest.mark.parametrize(
    ("fast", "bos", "eos", "fits"),
    [(True, 1, None, True), (True, None, 1, True), (True, 0, 0, True), (True, None, None, False), (False, 1, 1, False)],
)
def test_the_tokenizer_of_a_second_model_has_offsets_and_a_first_token(gpt2_folder, monkeypatch, fast, bos, eos, fits):
    tokenizer = SimpleNamespace(is_fast=fast, bos_token_id=bos, eos_token_id=eos)
    monkeypatch.setattr(metrics, "load_tokenizer", lambda folder: tokenizer)
    if fits:
        assert open_second_lm(str(gpt2_folder), CPU)[1] is tokenizer
    else:
        assert "offsets" in message(open_second_lm, str(gpt2_folder), CPU)


def test_a_second_model_computes_in_float32_on_its_device_whatever_it_was_saved_in(gpt2_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=torch.float16).save_pretrained(tmp_path)
    open_gpt2(str(gpt2_folder))[2].save_pretrained(tmp_path)
    for device in (CPU, torch.device("meta")):
        parameters = list(open_second_lm(str(tmp_path), device)[0].parameters())
        assert {(p.dtype, p.device) for p in parameters} == {(torch.float32, device)}


def test_a_second_model_is_read_from_safetensors_alone_and_runs_no_code(gpt2_folder, tmp_path, monkeypatch):
    """Nor does it ask on the terminal whether it may run some, as transformers does without trust_remote_code."""
    from transformers import AutoTokenizer

    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "n")
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
    assert not asked


def test_an_answer_too_long_for_the_second_model_is_said(gpt2_folder):
    some = {"prompts": ["x"], "texts": ["x" * 60]}
    found = message(second_nll, *open_second_lm(str(gpt2_folder), CPU), some, replace(CFG, batch_size=1))
    assert "48" in found
    assert "61" in found
    _, tokenizer = open_second_lm(str(gpt2_folder), CPU)
    cfg, limited, unlimited = replace(CFG, batch_size=1), Reader(max_position_embeddings=61), Reader()
    for model in (limited, unlimited):  # not every architecture has a limit
        assert second_nll(model, tokenizer, some, cfg)[0] > 0
