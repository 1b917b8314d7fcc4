"""The metrics of responses: golden numbers, intervals, and a second language model."""

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
    bits_per_character,
    difference,
    distinct,
    interval,
    jackknife,
    kl_three_ways,
    leave_one_out,
    measure,
    open_second_lm,
    perplexity,
    repetition,
    second_nll,
)
from analysis.tables import CAPTIONS, KLS
from config import EvaluateConfig
from data import train_wordpiece
from runtime.hub import open_gpt2

CFG = EvaluateConfig(batch_size=2, resamples=400)
CPU = torch.device("cpu")


def width(bounds):
    return bounds[1] - bounds[0]


# ---- metrics of single responses


def test_the_three_estimators_of_the_kl_give_the_golden_numbers():
    """p = (1/2, 1/2) against (1/4, 3/4): k1 is ln 2 and ln 2/3, k3 ln 2 - 1/2 and ln 2/3 + 1/2, exact their mean."""
    logits, ref_logits = (torch.tensor(p).log().expand(2, 2, 2) for p in ([0.5, 0.5], [0.25, 0.75]))
    ids, mask = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[True, True], [True, False]])
    kl = kl_three_ways(logits, ref_logits, ids, mask)
    a, b = math.log(2), math.log(2 / 3)
    assert kl["kl"].tolist() == pytest.approx([a + b, b])
    assert kl["kl_k3"].tolist() == pytest.approx([a - 0.5 + b + 0.5, b + 0.5])
    assert kl["kl_exact"].tolist() == pytest.approx([a + b, (a + b) / 2])


def test_the_estimators_of_the_kl_ignore_nan_after_the_end():
    logits, ref_logits = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[True, False, False], [True, True, True]])
    expected = kl_three_ways(logits, ref_logits, ids, mask)
    logits, ref_logits = (x.masked_fill(~mask[..., None], torch.nan) for x in (logits, ref_logits))
    actual = kl_three_ways(logits, ref_logits, ids, mask)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_k3_is_never_negative_and_has_the_same_mean_as_k1():
    """For 20,000 tokens sampled from p; k1 of single tokens is often negative."""
    logits, ref_logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    ids = torch.multinomial(logits.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(1))[:, None]
    kl = kl_three_ways(logits.expand(20_000, 1, 8), ref_logits.expand(20_000, 1, 8), ids, torch.ones_like(ids).bool())
    assert kl["kl_k3"].min() >= 0 > kl["kl"].min()
    for name in ("kl", "kl_k3"):
        assert kl[name].mean().item() == pytest.approx(kl["kl_exact"][0].item(), rel=0.05)
    same = kl_three_ways(logits[None, None], logits[None, None] + 1e-7, ids[:1], torch.ones(1, 1).bool())
    assert 0 <= same["kl_k3"].item() < 1e-12


def test_repetition_is_the_share_of_repeated_ngrams():
    assert repetition([[1, 2, 3, 4, 5], [1] * 6, [1, 2], []]).tolist() == pytest.approx([0, 2 / 3, 0, 0])
    assert repetition([[1, 2, 1, 2]], 2).tolist() == pytest.approx([1 / 3])  # 12, 21, 12


# ---- metrics of all responses together


def test_the_jackknife_of_a_mean_gives_the_values_themselves():
    values = np.array([3.0, 1.0, 8.0])
    assert jackknife(*leave_one_out(values.sum(), values, np.ones(3))) == pytest.approx(values)


def test_perplexity_is_of_all_tokens_together():
    """2 tokens with NLL 1 and 18 with NLL 0: e^.1, not the mean over responses. The first alone has e, the second 1."""
    values = perplexity(np.array([2.0, 0.0]), np.array([2.0, 18.0]))
    assert values.mean() == pytest.approx(np.exp(0.1))
    assert values[0] - values[1] == pytest.approx(np.e - 1)


def test_distinct_is_the_share_of_different_ngrams():
    responses = [[1, 2, 1, 2], [1, 2], [], [3]]
    assert distinct(responses, 1).mean() == pytest.approx(3 / 7)
    assert distinct(responses, 2).mean() == pytest.approx(2 / 4)  # 12, 21, 12, 12: no n-gram spans two responses
    assert distinct([[1]], 2).tolist() == [0]


def test_leaving_out_the_only_ngram_does_not_divide_by_0():
    """1 of 1 is distinct. Of both responses 2 of 3 are, without the first 1 of 2, without the second 1 of 1."""
    assert distinct([[1]], 1).tolist() == [1]
    assert distinct([[1], [2, 2]], 1) == pytest.approx([2 / 3 + 1 / 4, 2 / 3 - 1 / 4])


def test_bits_per_character_count_only_the_response():
    """8 and 2 bits for 4 and 1 characters after their prompts."""
    values = bits_per_character(np.array([8.0, 2.0]) * math.log(2), ["ab cd", "abc!"], ["a", "abc"])
    assert values.mean() == pytest.approx(2)


# ---- intervals


def test_an_interval_contains_the_mean_and_shrinks_with_more_data():
    values = np.random.default_rng(0).normal(3, 2, 1600)
    (low, high), (narrow_low, narrow_high) = interval(values[:100], CFG), interval(values, CFG)
    assert low < values[:100].mean() < high
    assert narrow_low < values.mean() < narrow_high
    assert high - low == pytest.approx(2 * 1.96 * 2 / 10, rel=0.3)  # the normal approximation
    assert (high - low) / (narrow_high - narrow_low) == pytest.approx(4, rel=0.3)


def test_an_interval_has_a_level_of_95_percent():
    """1.96 standard errors on either side; the quantiles 5 and 95 % would give 1.64, a level of 90 %."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    error = values.std() / 20
    low, high = interval(values, replace(CFG, resamples=20_000))
    assert (values.mean() - low, high - values.mean()) == pytest.approx((1.96 * error, 1.96 * error), rel=0.05)


def test_an_interval_depends_on_the_seed_and_not_on_the_model():
    """The same rows for two models, other rows with another seed."""
    values = np.random.default_rng(0).normal(3, 2, 50)
    low, high = interval(values, CFG)
    assert interval(values + 1, CFG) == pytest.approx((low + 1, high + 1))
    assert interval(values, replace(CFG, seed=1)) != (low, high)


def test_an_interval_of_a_constant_or_of_a_constant_statistic_has_no_width():
    assert interval(np.full(20, 7.0), CFG) == (7.0, 7.0)
    assert interval(np.arange(5.0), CFG, lambda rows: len(rows)) == (5.0, 5.0)


def random_responses(rng, prompts=200):
    """Responses of 10 to 30 tokens, frequent and rare ones, so that distinct-1 and -2 are well inside (0, 1)."""
    return [(rng.zipf(1.4, rng.integers(10, 31)) % 500).tolist() for _ in range(prompts)]


@pytest.mark.parametrize("n", [1, 2])
def test_the_interval_of_distinct_is_as_wide_as_the_spread_of_new_responses(n):
    """Compared with 200 new samples. Resampling whole responses would give an interval below the value."""
    rng = np.random.default_rng(0)
    truth = np.array([distinct(random_responses(rng), n).mean() for _ in range(200)])
    values = distinct(random_responses(rng), n)
    low, high = interval(values, CFG)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * truth.std(), rel=0.35)


class Judge:
    """A judge for which long texts are positive."""

    def log_odds(self, texts):
        return torch.tensor([(len(text) - 20.0) / 4 for text in texts])


def responses(rng, shift):
    """Responses to 300 prompts, some of which are harder than others for every model: correlated numbers."""
    rng_prompts = np.random.default_rng(7)
    hard, tokens = rng_prompts.normal(0, 10, 300), random_responses(rng_prompts, 300)
    tokens = [ids + ids[: rng.integers(0, 3)] for ids in tokens]  # nearly the same for both models
    lengths = np.array([len(ids) for ids in tokens])
    texts = ["x" * n for n in lengths]
    noise = rng.normal(0, 0.5, (5, 300))
    kls = {name: (hard + noise[i] + shift).tolist() for i, name in enumerate(KLS)}
    nll = (80 + hard + noise[3]) / 20 * lengths + shift * lengths
    return kls | {"texts": texts, "prompts": [""] * 300, "tokens": tokens, "ref_nll": nll, "second_nll": nll}


def test_every_difference_is_paired_and_has_a_narrower_interval_than_two_independent_samples():
    """With independent resampling, the variance of the prompts would count twice. Holds for every metric."""
    rng = np.random.default_rng(0)
    sides = (measure(responses(rng, shift), lambda texts: [len(x) for x in texts], Judge(), CFG) for shift in (0, 0.1))
    (before, b), (after, a) = sides
    change = difference(b, a, CFG)
    assert (
        set(change)
        == {*before, "perplexity_ratio"}
        >= set(CAPTIONS) - {"positive_by_reward", "agrees_negative", "agrees_positive"}
    )
    for name in before:
        independent = math.hypot(*(width((side[name]["low"], side[name]["high"])) for side in (before, after)))
        paired = width((change[name]["low"], change[name]["high"]))
        assert paired < independent * 0.5 or independent == 0, name
        assert change[name]["value"] == pytest.approx(after[name]["value"] - before[name]["value"])
        assert change[name]["low"] <= change[name]["value"] <= change[name]["high"]


def test_the_ratio_of_perplexities_is_paired_too():
    """A tenth of a nat more per token: e^.1 for any prompts."""
    rng, lengths = np.random.default_rng(0), np.full(300, 20.0)
    nll = rng.normal(80, 20, 300)
    before, after = ({"perplexity": perplexity(nll + x * lengths, lengths)} for x in (0, 0.1))
    ratio = difference(before, after, CFG)["perplexity_ratio"]
    assert ratio["value"] == pytest.approx(np.exp(0.1))
    assert width((ratio["low"], ratio["high"])) < 1e-9 < width(interval(before["perplexity"], CFG))


def test_measure_gives_value_interval_and_spread():
    """The standard deviation over responses, divided by M, and the share below 0."""
    batch = {"texts": ["a", "bb", "c" * 90], "prompts": ["", "", ""], "tokens": [[1, 2], [3] * 18, [4]]}
    kls = {"kl": [-1.0, 1.0, 3.0], "kl_k3": [1.0, 1.0, 1.0], "kl_exact": [0.0, 0.0, 3.0]}
    table, values = measure(batch | kls | {"ref_nll": [2.0, 0.0, 0.1]}, lambda texts: [1.0, 2.0, 6.0], Judge(), CFG)
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
    assert "bits_per_character" not in table  # without a second model
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in table.values())
    assert values["kl"].tolist() == kls["kl"]


def test_a_text_is_positive_if_its_log_odds_are_above_0():
    """The log-odds are -1/4, 0 and 1/4 here."""
    batch = {"texts": ["x" * n for n in (19, 20, 21)], "prompts": [""] * 3, "tokens": [[1]] * 3, "ref_nll": [1.0] * 3}
    _, values = measure(batch | dict.fromkeys(KLS, [0.0] * 3), lambda texts: [0.0] * 3, Judge(), CFG)
    assert values["positive_by_judge"].tolist() == [0, 0, 1]


def test_a_score_that_is_not_finite_is_reported_with_its_text():
    batch = {"texts": ["a", "bb"], "prompts": [""] * 2, "tokens": [[1]] * 2, "ref_nll": [1.0] * 2}
    error = message(measure, batch | dict.fromkeys(KLS, [0.0] * 2), lambda texts: [1.0, math.nan], Judge(), CFG)
    assert re.match("score of text 1 is nan: 'bb'", error)


def test_a_controlled_task_is_measured_for_each_control():
    """One share for both would hide a policy that follows only one of the controls."""
    prompts = ["[negative] A", "[positive] A", "[positive] B"]
    batch = {"texts": ["x" * 30, "x" * 10, "x" * 30], "prompts": prompts, "tokens": [[1]] * 3, "ref_nll": [1.0] * 3}
    kls = {name: [0.0] * 3 for name in KLS}
    table, _ = measure(batch | kls, lambda texts: [0.0] * 3, Judge(), replace(CFG, task="controlled"))
    assert [table[f"agrees_{control}"]["value"] for control in ("negative", "positive")] == [1, 0.5]


# ---- a second language model


TEXTS = [("I loved this", " movie, it was"), ("A great film", " with a boring story and no end."), ("A gre", "at film")]


def test_the_second_model_gives_the_loss_of_transformers(gpt2_folder):
    """Compared with the loss of one text at a time by transformers; the prompt is context, with the label -100."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    model, tokenizer = open_second_lm(str(gpt2_folder), CPU)
    batch = {"prompts": [p for p, _ in TEXTS], "texts": [p + r for p, r in TEXTS]}
    for (prompt, response), nll in zip(TEXTS, second_nll(model, tokenizer, batch, CFG), strict=True):
        ids = tokenizer(prompt + response)["input_ids"]
        context = sum(len(tokenizer.decode(ids[: n + 1])) <= len(prompt) for n in range(len(ids)))
        labels = torch.tensor([[-100] * (1 + context) + ids[context:]])
        with torch.no_grad():
            loss = reference(torch.tensor([[tokenizer.bos_token_id, *ids]]), labels=labels).loss.item()
        assert 0 < context < len(ids)
        assert nll == pytest.approx(loss * (len(ids) - context), rel=1e-4)


@pytest.mark.parametrize("batch_size", [100, 7])
def test_the_logits_of_the_second_model_take_the_memory_of_a_micro_batch(gpt2_folder, monkeypatch, batch_size):
    """2,048 tokens on a CPU. The number of rows per pass does not change the result."""
    model, tokenizer = open_second_lm(str(gpt2_folder), CPU)
    prompts = ["A film"] * 90
    batch = {"prompts": prompts, "texts": [f"{prompt} was {i % 9}, {'x' * 30}" for i, prompt in enumerate(prompts)]}
    longest = 1 + max(len(tokenizer(text)["input_ids"]) for text in batch["texts"])
    cfg, vocabulary = replace(CFG, batch_size=batch_size), len(tokenizer)
    with LogitsMemory(vocabulary) as memory:
        nll = second_nll(model, tokenizer, batch, cfg)
    rows = min(2048 // longest, batch_size)
    assert rows < 90 and memory.largest == rows * longest * vocabulary
    assert memory.most <= 2 * memory.largest
    monkeypatch.setattr(metrics, "rows_that_fit", lambda *_: 0)
    assert second_nll(model, tokenizer, batch, cfg) == pytest.approx(nll, rel=1e-5)


def test_an_empty_response_has_no_nats_under_the_second_model(gpt2_folder):
    batch = {"prompts": ["A film", "A film"], "texts": ["A film", "A film."]}
    empty, full = second_nll(*open_second_lm(str(gpt2_folder), CPU), batch, CFG)
    assert empty == 0 < full


class Reader:
    """A second model that gives every token the same probability, and records its inputs."""

    device = CPU

    def __init__(self, **sizes):
        shape = SimpleNamespace(hidden_size=8, num_hidden_layers=1, vocab_size=300)
        self.config, self.sequences, self.rows = SimpleNamespace(get_text_config=lambda: shape, **sizes), [], []

    def __call__(self, sequences):
        self.sequences += sequences.tolist()
        self.rows.append(len(sequences))
        return SimpleNamespace(logits=torch.zeros(*sequences.shape, 300))


@pytest.mark.parametrize(("bos", "eos", "start"), [(5, None, 5), (None, 6, 6), (5, 6, 5)])
def test_a_text_follows_the_bos_token_of_the_second_model_or_otherwise_its_eos_token(bos, eos, start):
    """Without other special tokens, although this tokenizer adds [CLS] and [SEP] by default."""
    model, tokenizer = Reader(), train_wordpiece([text for pair in TEXTS for text in pair], 200)
    words = tokenizer.convert_ids_to_tokens
    tokenizer.bos_token, tokenizer.eos_token = (id if id is None else words(id) for id in (bos, eos))
    ids = tokenizer("A great film", add_special_tokens=False)["input_ids"]
    assert ids != tokenizer("A great film")["input_ids"]
    (nll,) = second_nll(model, tokenizer, {"prompts": ["A great"], "texts": ["A great film"]}, CFG)
    assert model.sequences == [[start, *ids]]
    assert nll == pytest.approx(math.log(300) * len(tokenizer(" film", add_special_tokens=False)["input_ids"]))


@pytest.mark.parametrize(("fit", "rows"), [(0, [1, 1, 1]), (2, [2, 1]), (9, [2, 1])])
def test_a_pass_of_the_second_model_has_as_many_rows_of_a_batch_as_fit(gpt2_folder, monkeypatch, fit, rows):
    """And one row if none fits. The number is computed from the sizes of the second model."""
    model, tokenizer, calls = Reader(), open_second_lm(str(gpt2_folder), CPU)[1], []
    monkeypatch.setattr(metrics, "rows_that_fit", lambda *sizes: calls.append(sizes) or fit)
    second_nll(model, tokenizer, {"prompts": ["A"] * 3, "texts": ["A film"] * 3}, replace(CFG, batch_size=2))
    assert model.rows == rows
    assert calls == [(len(model.sequences[0]), 8, 1, 300, CPU)]


@pytest.mark.parametrize(
    ("fast", "bos", "eos", "fits"),
    [(True, 1, None, True), (True, None, 1, True), (True, 0, 0, True), (True, None, None, False), (False, 1, 1, False)],
)
def test_the_tokenizer_of_a_second_model_needs_offsets_and_a_bos_or_eos_token(
    gpt2_folder, monkeypatch, fast, bos, eos, fits
):
    tokenizer = SimpleNamespace(is_fast=fast, bos_token_id=bos, eos_token_id=eos)
    monkeypatch.setattr(metrics, "load_tokenizer", lambda folder: tokenizer)
    if fits:
        assert open_second_lm(str(gpt2_folder), CPU)[1] is tokenizer
    else:
        assert "offsets" in message(open_second_lm, str(gpt2_folder), CPU)


def test_a_second_model_computes_in_float32_on_its_device_for_any_saved_dtype(gpt2_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=torch.float16).save_pretrained(tmp_path)
    open_gpt2(str(gpt2_folder))[2].save_pretrained(tmp_path)
    for device in (CPU, torch.device("meta")):
        parameters = list(open_second_lm(str(tmp_path), device)[0].parameters())
        assert {(p.dtype, p.device) for p in parameters} == {(torch.float32, device)}


def test_a_second_model_is_only_read_from_safetensors_and_runs_no_code(gpt2_folder, tmp_path, monkeypatch):
    """Nor does it ask for permission on the terminal, as transformers does without trust_remote_code."""
    from transformers import AutoTokenizer

    questions = []
    monkeypatch.setattr("builtins.input", lambda *_: questions.append(1) or "n")
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
    assert not questions


def test_a_response_too_long_for_the_second_model_is_refused(gpt2_folder):
    batch = {"prompts": ["x"], "texts": ["x" * 60]}
    error = message(second_nll, *open_second_lm(str(gpt2_folder), CPU), batch, replace(CFG, batch_size=1))
    assert "48" in error
    assert "61" in error
    _, tokenizer = open_second_lm(str(gpt2_folder), CPU)
    cfg, limited, unlimited = replace(CFG, batch_size=1), Reader(max_position_embeddings=61), Reader()
    for model in (limited, unlimited):  # not every architecture has a limit
        assert second_nll(model, tokenizer, batch, cfg)[0] > 0


def write_gguf(file, tokenizer):
    """Write a tiny Llama and a byte-level BPE to a GGUF file, as llama.cpp does; return the model.

    With two numbers per head, llama.cpp's order of the rows of queries and keys is that of transformers.
    """
    gguf = pytest.importorskip("gguf", reason="gguf is in requirements-dev.txt")
    pytest.importorskip("accelerate", reason="accelerate is in requirements-dev.txt")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, initializer_range=1.0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)).eval()
    writer, names = gguf.GGUFWriter(file, "llama"), gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for add, value in {
        writer.add_context_length: 64,
        writer.add_embedding_length: 8,
        writer.add_feed_forward_length: 16,
        writer.add_block_count: 1,
        writer.add_head_count: 4,
        writer.add_head_count_kv: 4,
        writer.add_rope_dimension_count: 2,
        writer.add_layer_norm_rms_eps: model.config.rms_norm_eps,
        writer.add_vocab_size: len(tokenizer),
        writer.add_tokenizer_model: "gpt2",
        writer.add_token_list: tokenizer.convert_ids_to_tokens(range(len(tokenizer))),
        writer.add_token_merges: [
            " ".join(m) for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        ],
        writer.add_bos_token_id: 0,
        writer.add_eos_token_id: 0,
    }.items():
        add(value)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_second_model_in_a_gguf_file_is_that_of_transformers(tmp_path, tokenizer, monkeypatch):
    """Catches random weights, and a tokenizer other than the one in the file."""
    reference = write_gguf(tmp_path / "tiny.gguf", tokenizer)
    batch = {"prompts": [p for p, _ in TEXTS], "texts": [p + r for p, r in TEXTS]}
    for folder, name in ((tmp_path, "tiny.gguf"), (tmp_path.parent, f"{tmp_path.name}/tiny.gguf")):
        monkeypatch.chdir(folder)
        model, theirs = open_second_lm(name, CPU)
        assert theirs(batch["texts"])["input_ids"] == tokenizer(batch["texts"])["input_ids"]
        nll = second_nll(model, theirs, batch, CFG)
        assert nll == pytest.approx(second_nll(reference, tokenizer, batch, CFG), rel=1e-4)
        assert min(nll) > 1 and {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_gguf_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    file = tmp_path / "damaged.gguf"
    assert "no such file" in message(open_second_lm, str(file), CPU)
    file.write_bytes(b"GGUF" + bytes(100))
    assert "damaged.gguf cannot be read" in message(open_second_lm, str(file), CPU)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None if name == "accelerate" else "installed")
    assert "pip install accelerate" in message(open_second_lm, str(file), CPU)
