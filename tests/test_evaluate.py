"""The comparison before and after PPO: its numbers, its tables, and a run from start to end."""

import html
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import reviews_csv

import evaluate
from config import EvaluateConfig
from evaluate import (
    CAPTIONS,
    distinct,
    interval,
    measure,
    prompt_groups,
    respond,
    sample_answers,
    samples_markdown,
    table_text,
)
from hub import load_policy, open_gpt2
from log import side_by_side

CFG = EvaluateConfig(prompts=16, max_prompt_len=4, response_len=12, batch_size=3, resamples=200, samples=3)
CPU = torch.device("cpu")


def test_distinct_is_the_share_of_ngrams_that_differ():
    responses = [[1, 2, 1, 2], [1, 2], [], [3]]
    assert distinct(responses, 1) == 3 / 7
    assert distinct(responses, 2) == 2 / 4  # 12, 21, 12, 12: none across two responses
    assert distinct([[1]], 2) == 0


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


@pytest.mark.parametrize("prompts", [16, 3, 1])
def test_every_prompt_is_in_one_group_and_a_group_has_one_length(prompts):
    cfg = EvaluateConfig(prompts=prompts, min_prompt_len=2, max_prompt_len=6, batch_size=3)
    pool = np.arange(prompts)[:, None] * 100 + np.arange(6)
    groups = list(prompt_groups(pool, cfg))
    rows = torch.cat([group[:, 0] for group in groups]) // 100
    assert rows.tolist() == list(range(prompts))
    assert max(len(group) for group in groups) <= 3
    assert all(np.array_equal(g, pool[(g[:, 0] // 100).tolist(), : g.shape[1]]) for g in groups)
    assert len({group.shape[1] for group in groups}) == min(5, prompts)


# ---- tables


def test_generated_text_cannot_become_markup_in_the_samples():
    """Nothing but letters of it is left, and a reader sees the text as it was."""
    nasty = "<script>alert('a')</script> | `code` **bold** [x](y) ![i](j) $m$ a\nb\r\u2028c @you www.x.org"
    header, rule, line = samples_markdown([("A film", [(nasty, 0.5), (nasty, 0.5)])]).splitlines()
    cells = line.split("|")[1:-1]
    assert header.count("|") == rule.count("|") == line.count("|") == 6
    assert not re.search(r"[<>`*\[\]!$@]|www\.|&(?!#\d+;|\w+;)", line)
    assert html.unescape(cells[1]).strip() == " ".join(nasty.split())


SAMPLES = [("A film", [("was dull " * 9, 0.2), ("was\033[2J great\n" * 5, 0.9)])]


def test_samples_stand_side_by_side_within_the_width():
    """Every word of both, in two columns; what the model wrote reaches no terminal as a control sequence."""
    text = side_by_side(SAMPLES, width=60)
    rows = text.splitlines()[3:]
    assert "\033" not in text and all(len(line) <= 60 for line in text.splitlines())
    assert " ".join(row[:28].strip() for row in rows).split() == ["(0.20)", *("was dull " * 9).split()]
    assert " ".join(row[28:].strip() for row in rows).split() == ["(0.90)", *("was [2J great " * 5).split()]


@pytest.mark.parametrize("no_color", [False, True])
def test_what_the_judge_finds_positive_is_green_and_the_rest_red(monkeypatch, no_color):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    text = side_by_side(SAMPLES, width=60)
    assert ("\033[31m(0.20)" in text and "\033[32m(0.90)" in text) != no_color


def test_the_table_is_rectangular_and_shows_each_value_with_its_interval():
    one = {name: {"value": i, "low": i - 0.5, "high": i + 100} for i, name in enumerate(CAPTIONS)}
    one["distinct_1"] = {"value": 0.25}
    lines = table_text({"before": one, "after": one}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert {line.count("|") for line in lines} == {4}
    assert len(lines) == 2 + len(CAPTIONS)
    assert "| 3.00 [2.50, 103.00] " in lines[2 + list(CAPTIONS).index("kl")]
    assert re.search(r"distinct-1 +\| 0.25 +\| 0.25 +\|", "\n".join(lines))


# ---- answers


@pytest.fixture(scope="module")
def opened(gpt2_folder):
    """(policy, another policy, tokenizer); the two differ in one bias."""
    folder, config, tokenizer = open_gpt2(str(gpt2_folder))
    policy, other = (load_policy(folder, config, tokenizer).eval() for _ in range(2))
    with torch.no_grad():
        other.gpt2.ln_f.bias += 0.05 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    return policy, other, tokenizer


GROUPS = [torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]]), torch.tensor([[5, 6]])]


def test_a_policy_that_is_its_own_reference_has_no_kl_and_the_same_seed_gives_the_same_texts(opened):
    policy, _, tokenizer = opened
    first, second = (respond(policy, policy, tokenizer, GROUPS, CFG, CPU, "m") for _ in range(2))
    assert first == second
    assert np.abs(first["kl"]).max() == 0
    assert np.abs(first["kl_exact"]).max() < 1e-6
    assert all(len(values) == 4 for values in first.values())
    assert all(text.startswith(prompt) for text, prompt in zip(first["texts"], first["prompts"]))
    assert first["prompts"] == [tokenizer.decode(row) for group in GROUPS for row in group]


def test_another_seed_gives_other_texts_and_another_policy_a_kl(opened):
    policy, other, tokenizer = opened
    first = respond(policy, policy, tokenizer, GROUPS, CFG, CPU, "m")
    seeded = respond(policy, policy, tokenizer, GROUPS, EvaluateConfig(**{**vars(CFG), "seed": 1}), CPU, "m")
    apart = respond(other, policy, tokenizer, GROUPS, CFG, CPU, "m")
    assert seeded["texts"] != first["texts"]
    assert min(apart["kl_exact"]) > 0


def test_tokens_end_with_the_end_of_text_and_ref_nll_is_of_these_tokens_at_temperature_1(opened):
    """Worked out one response at a time."""
    policy, other, tokenizer = opened
    hot = EvaluateConfig(**{**vars(CFG), "temperature": 2.0, "response_len": 30})
    end = tokenizer.eos_token_id
    with torch.no_grad():
        other.gpt2.wte.weight[end] *= 3  # so that some responses end early
    answers = respond(other, policy, tokenizer, GROUPS, hot, CPU, "m")
    prompts = [row for group in GROUPS for row in group]
    for prompt, tokens, nll, kl in zip(prompts, answers["tokens"], answers["ref_nll"], answers["kl"]):
        assert end not in tokens[:-1]
        assert tokens[-1] == end or len(tokens) == 30
        whole = torch.cat([prompt, torch.tensor(tokens)])[None]
        places, ids = slice(len(prompt) - 1, -1), torch.tensor(tokens)[:, None]
        cold, ref, mine = (
            (model.gpt2(whole)[0, places] / t).log_softmax(-1).gather(1, ids).sum().item()
            for model, t in ((policy, 1.0), (policy, 2.0), (other, 2.0))
        )
        assert nll == pytest.approx(-cold, rel=1e-4)
        assert kl == pytest.approx(mine - ref, abs=1e-3)


@pytest.mark.parametrize("samples", [2, 50])
def test_the_samples_are_as_many_as_wanted_at_their_own_temperature_with_the_prompt_cut_off(opened, samples):
    """At a temperature near 0 each token is the likeliest: before and after are two policies' greedy continuations."""
    before, after, tokenizer = opened
    asked = []

    class Judge:
        def log_odds(self, texts):
            asked.append(texts)
            return torch.tensor([float(len(text)) for text in texts]).log()  # its sigmoid: length / (length + 1)

    cfg = replace(CFG, samples=samples, sample_temperature=1e-4)
    found = sample_answers({"before": before, "after": after}, tokenizer, Judge(), GROUPS, cfg, CPU)
    prompts = {tokenizer.decode(row): row for group in GROUPS for row in group}
    assert len(found) == len({prompt for prompt, _ in found}) == min(samples, 4)
    for i, (prompt, sides) in enumerate(found):
        for policy, (response, probability), texts in zip((before, after), sides, asked):
            with torch.no_grad():
                ids = prompts[prompt]
                for _ in range(CFG.response_len):
                    ids = torch.cat([ids, policy.gpt2(ids[None])[0, -1].argmax()[None]])
            assert prompt + response == texts[i] == tokenizer.decode(ids, skip_special_tokens=True)
            assert probability == pytest.approx(len(texts[i]) / (len(texts[i]) + 1), rel=1e-4)


def test_perplexity_is_of_all_tokens_together(opened):
    """2 tokens at NLL 1 and 18 at 0: e^.1, not the mean over responses."""

    class Judge:
        def log_odds(self, texts):
            return torch.tensor([1.0, -1.0])

    answers = {"texts": ["a", "b"], "tokens": [[1, 2], [3] * 18], "kl": [0.0, 2.0], "kl_exact": [0.0, 1.0]}
    table, per_response = measure(answers | {"ref_nll": [2.0, 0.0]}, lambda texts: [1.0, 2.0], Judge(), CFG)
    assert table["perplexity"]["value"] == pytest.approx(np.exp(0.1))
    assert table["positive_by_judge"]["value"] == 0.5
    assert table["score"]["value"] == 1.5
    assert table["response_length"]["value"] == 10
    assert table["distinct_1"] == {"value": 3 / 20}
    assert per_response["kl"].tolist() == [0.0, 2.0]


# ---- whole runs


@pytest.mark.parametrize("by", ["function", "classifier"])
def test_a_model_compared_with_itself_differs_in_nothing(tmp_path, monkeypatch, capsys, gpt2_folder, bert_folder, by):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gpt2_folder, "after")
    (tmp_path / "mine.py").write_text("def length(texts):\n    return [len(t) for t in texts]\n")
    cfg = EvaluateConfig(
        dataset=str(reviews_csv(tmp_path / "toy.csv")), before=str(gpt2_folder), after="after", positive_label="",
        reward="mine.py:length" if by == "function" else str(bert_folder), judge=str(bert_folder), prompts=16,
        max_prompt_len=4, batch_size=8, resamples=50, samples=3, self_check=False,
    )  # fmt: skip
    evaluate.main(cfg)
    results = json.loads((tmp_path / "after" / "results.json").read_text())
    assert results["before"] == results["after"]
    assert all(row == {"value": 0, "low": 0, "high": 0} for row in results["difference"].values())
    assert {"score", "kl", "perplexity", "positive_by_judge"} <= set(results["before"])
    assert ("positive_by_reward" in results["before"]) == (by == "classifier")
    assert results["before"]["kl"]["value"] == 0
    assert len((tmp_path / "after" / "samples.md").read_text().splitlines()) == 2 + 2 + 3
    assert [set(sample) for sample in results["samples"]] == 3 * [{"prompt", "before", "after"}]
    assert results["samples"][0]["before"] == results["samples"][0]["after"]
    assert set(results["samples"][0]["before"]) == {"text", "judge"}
    shown = capsys.readouterr().out
    assert table_text(results) in shown
    written = shown.split("written:\n")[1].split()
    assert written == ["after/results.json", "after/samples.md", "after/example_results.png"]  # no log, no curves
    assert all((tmp_path / path).stat().st_size > 0 for path in written)
