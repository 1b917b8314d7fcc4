"""The evaluation: prompts, responses, samples, viewer.json, and whole runs."""

import copy
import html
import json
import re
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, LogitsMemory, message, nan_after_the_end, reviews_csv, write_balanced_bert, write_tuned

import evaluate
from analysis import responses
from analysis.limit import limit_curve
from analysis.responses import micro_batches, pieces, prompt_groups, respond
from analysis.tables import efficiency_text, kl_text, table_text
from config import EvaluateConfig, PPOConfig
from data import CONTROLS, decode, load_splits, prompt_pool
from evaluate import check_results, sample_responses, token_metrics, viewer
from model import GPT2
from ppo import gae, token_rewards
from reward import SentimentReward, load_rewards
from runtime import hub
from runtime.checkpoint import CARD_MARK, SAVING
from runtime.device import DTYPES
from runtime.errors import BadInput, Finished
from runtime.hub import load_policy, open_gpt2
from runtime.log import side_by_side

CFG = EvaluateConfig(prompts=16, max_prompt_len=4, response_len=12, batch_size=3, resamples=200, samples=3)
CPU = torch.device("cpu")


@pytest.mark.parametrize("prompts", [25, 16, 3, 1])
def test_every_prompt_is_in_one_group_and_all_prompts_of_a_group_have_one_length(prompts):
    """The lengths are equally frequent, and only the last group of a length may not be full."""
    cfg = EvaluateConfig(prompts=prompts, min_prompt_len=2, max_prompt_len=6, batch_size=3)
    pool = np.arange(prompts)[:, None] * 100 + np.arange(6)
    groups = list(prompt_groups(pool, cfg))
    rows = torch.cat([group[:, 0] for group in groups]) // 100
    assert rows.tolist() == list(range(prompts))
    assert max(len(group) for group in groups) <= 3
    assert all(np.array_equal(g, pool[(g[:, 0] // 100).tolist(), : g.shape[1]]) for g in groups)
    sizes = [[len(g) for g in groups if g.shape[1] == length] for length in range(2, 7)]
    assert sorted(map(sum, sizes)) == sorted(len(rows) for rows in np.array_split(range(prompts), 5))
    assert all(size == 3 for group_sizes in sizes for size in group_sizes[:-1])


# ---- samples


SAMPLES = [("A film", [("was dull " * 9, 0.2), ("was\033[2J great\n" * 5, 0.9)])]


def test_samples_are_printed_side_by_side_within_the_width():
    """With every word of both, and without control sequences."""
    text = side_by_side(SAMPLES, width=60)
    rows = text.splitlines()[3:]
    assert "\033" not in text and all(len(line) <= 60 for line in text.splitlines())
    assert " ".join(row[:28].strip() for row in rows).split() == ["(0.20)", *("was dull " * 9).split()]
    assert " ".join(row[28:].strip() for row in rows).split() == ["(0.90)", *("was [2J great " * 5).split()]


# ---- responses


@pytest.fixture(scope="module")
def opened(gpt2_folder):
    """(policy, another policy that differs in one bias, tokenizer)."""
    folder, config, tokenizer = open_gpt2(str(gpt2_folder))
    policy, other = (load_policy(folder, config, tokenizer).eval() for _ in range(2))
    with torch.no_grad():
        other.gpt2.ln_f.bias += 0.05 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    return policy, other, tokenizer


GROUPS = [torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]]), torch.tensor([[5, 6]])]


def test_a_policy_that_is_its_own_reference_has_a_kl_of_0_and_the_same_seed_gives_the_same_texts(opened):
    policy, _, tokenizer = opened
    first, second = (respond(policy, policy, tokenizer, GROUPS, CFG, CPU, "m") for _ in range(2))
    assert first == second
    assert all(set(first[name]) == {0} for name in ("kl", "kl_k3", "kl_exact"))
    assert all(len(values) == 4 for values in first.values())
    assert all(text.startswith(prompt) for text, prompt in zip(first["texts"], first["prompts"]))
    assert first["prompts"] == [tokenizer.decode(row) for group in GROUPS for row in group]


def test_another_seed_gives_other_texts_and_another_policy_a_kl(opened):
    policy, other, tokenizer = opened
    first = respond(policy, policy, tokenizer, GROUPS, CFG, CPU, "m")
    seeded = respond(policy, policy, tokenizer, GROUPS, replace(CFG, seed=1), CPU, "m")
    different = respond(other, policy, tokenizer, GROUPS, CFG, CPU, "m")
    assert seeded["texts"] != first["texts"]
    assert min(different["kl_exact"]) > 0
    assert min(different["kl_k3"]) > 0


def test_tokens_end_with_the_end_of_text_and_ref_nll_is_at_temperature_1(opened):
    """Compared with a computation of one response at a time."""
    policy, other, tokenizer = opened
    hot = replace(CFG, temperature=2.0, response_len=30)
    end = tokenizer.eos_token_id
    with torch.no_grad():
        other.gpt2.wte.weight[end] *= 3  # so that some responses end early
    out = respond(other, policy, tokenizer, GROUPS, hot, CPU, "m")
    prompts = [row for group in GROUPS for row in group]
    for prompt, tokens, nll, kl in zip(prompts, out["tokens"], out["ref_nll"], out["kl"]):
        assert end not in tokens[:-1]
        assert tokens[-1] == end or len(tokens) == 30
        whole = torch.cat([prompt, torch.tensor(tokens)])[None]
        positions, ids = slice(len(prompt) - 1, -1), torch.tensor(tokens)[:, None]
        cold, ref, own = (
            (model.gpt2(whole)[0, positions] / t).log_softmax(-1).gather(1, ids).sum().item()
            for model, t in ((policy, 1.0), (policy, 2.0), (other, 2.0))
        )
        assert nll == pytest.approx(-cold, rel=1e-4)
        assert kl == pytest.approx(own - ref, abs=1e-3)


def test_each_batch_has_its_own_random_numbers(opened):
    policy, _, tokenizer = opened
    texts = respond(policy, policy, tokenizer, [GROUPS[0], GROUPS[0]], CFG, CPU, "m")["texts"]
    assert len(set(texts)) == 6


def test_texts_are_exactly_those_of_the_tokens(opened):
    """Even if the tokenizer, by default, removes the spaces of "film , it 's" when it decodes."""
    policy, other, tokenizer = opened[0], opened[1], copy.deepcopy(opened[2])
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    text = "A film , it 's not good ."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) != text
    out = respond(other, policy, tokenizer, [torch.tensor([ids])], CFG, CPU, "m")
    assert out["prompts"] == [text] and out["texts"][0].startswith(text)
    assert "".join(pieces(tokenizer, ids[:2], ids[2:])) == text[len(tokenizer.decode(ids[:2])) :]


def test_a_pass_of_the_evaluation_has_as_many_rows_as_fit_in_the_memory_of_the_gpu(monkeypatch):
    """10 tokens x (16 x 64 x 2 + 2 x 500) x 4 bytes are 121,920 per row, and 6 rows fit in 0.8 of 1 MB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000_000, 8_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    gpt2 = SimpleNamespace(config=SimpleNamespace(n_embd=64, n_layer=2), n_tokens=500)
    sequences = SimpleNamespace(shape=(20, 10), device=torch.device("cuda"))
    assert [(part.start, part.stop) for part in micro_batches(SimpleNamespace(gpt2=gpt2), sequences)] == [
        (0, 6),
        (6, 12),
        (12, 18),
        (18, 24),
    ]


LONG = replace(CFG, prompts=200, min_prompt_len=4, response_len=30)
FIT = 2048 // (4 + 30)  # rows per pass on a CPU


def many_groups(cfg):
    return list(prompt_groups(np.random.default_rng(0).integers(1, 250, (cfg.prompts, 4)), cfg))


@pytest.mark.parametrize("batch_size", [200, 64, 7])
def test_the_logits_of_an_evaluation_take_the_memory_of_a_micro_batch_for_any_batch_size(opened, batch_size):
    """At most four tensors at a time, with at most as many rows as a pass of training."""
    policy, other, tokenizer = opened
    cfg = replace(LONG, batch_size=batch_size)
    vocabulary = policy.gpt2.n_tokens
    with LogitsMemory(vocabulary) as memory:
        respond(other, policy, tokenizer, many_groups(cfg), cfg, CPU, "m")
    rows = min(FIT, batch_size)
    assert memory.largest == rows * 30 * vocabulary
    assert memory.most <= 4 * rows * 30 * vocabulary


def test_the_logits_of_the_viewer_take_the_memory_of_a_micro_batch(opened):
    policy, other, tokenizer = opened
    cfg = replace(LONG, batch_size=200, viewer_samples=200)
    groups = many_groups(cfg)
    out = {"before": respond(other, policy, tokenizer, groups, cfg, CPU, "m")}
    values = {"before": {"score": np.zeros(200), "judge": np.zeros(200)}}
    with LogitsMemory(policy.gpt2.n_tokens) as memory:
        viewer({"before": policy, "after": other}, tokenizer, None, groups, out, values, PPOConfig(), cfg, CPU)
    assert 0 < memory.largest <= FIT * 30 * policy.gpt2.n_tokens
    assert memory.most <= 3 * FIT * 30 * policy.gpt2.n_tokens


@pytest.mark.parametrize("fit", [0, 1, 3])
def test_the_micro_batch_size_does_not_change_the_evaluation(opened, monkeypatch, fit):
    """Compared with one pass over all rows. If not even one row fits, one is tried."""
    policy, other, tokenizer = opened
    cfg, results = replace(LONG, prompts=8, batch_size=8, viewer_samples=8), []
    groups = many_groups(cfg)
    for rows in (10**9, fit):
        monkeypatch.setattr(responses, "rows_that_fit", lambda *_, rows=rows: rows)
        out = {name: respond(other, policy, tokenizer, groups, cfg, CPU, "m") for name in ("before", "after")}
        values = dict.fromkeys(out, {"score": np.arange(8.0), "judge": np.zeros(8)})
        shown = viewer({"before": policy, "after": other}, tokenizer, None, groups, out, values, PPOConfig(), cfg, CPU)
        results.append((out["after"], shown["samples"]))
    (whole, whole_shown), (parts, parts_shown) = results
    assert [parts[name] for name in ("texts", "tokens", "prompts")] == [
        whole[name] for name in ("texts", "tokens", "prompts")
    ]
    for name in ("kl", "kl_k3", "kl_exact", "ref_nll"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-4)
    for one, other in zip(parts_shown, whole_shown, strict=True):
        for name in ("kl", "ratio", "value", "advantage"):
            assert one["after"][name] == pytest.approx(other["after"][name], abs=1e-3)
        assert one["after"]["tokens"] == other["after"]["tokens"]


def test_nan_after_the_end_of_a_response_is_ignored(opened, monkeypatch):
    policy, other, tokenizer = (copy.deepcopy(part) for part in opened)
    end, forward, has_nan = tokenizer.eos_token_id, GPT2.forward, []
    with torch.no_grad():
        other.gpt2.wte.weight[end] *= 3  # so that some responses end early
    clean = respond(other, policy, tokenizer, GROUPS, CFG, CPU, "m")

    def with_nan(self, ids, first=0):
        logits = nan_after_the_end(forward(self, ids, first), ids, first, end)
        has_nan.append(logits.isnan().any().item())
        return logits

    monkeypatch.setattr(GPT2, "forward", with_nan)
    assert respond(other, policy, tokenizer, GROUPS, CFG, CPU, "m") == clean and any(has_nan)


@pytest.mark.parametrize("samples", [2, 50])
def test_the_samples_have_their_own_number_and_temperature_and_no_prompt(opened, samples):
    """Near temperature 0, the responses before and after are the greedy completions of the two policies."""
    before, after, tokenizer = opened
    batches = []

    class Judge:
        def log_odds(self, texts):
            batches.append(texts)
            return torch.tensor([float(len(text)) for text in texts]).log()  # its sigmoid: length / (length + 1)

    cfg = replace(CFG, samples=samples, sample_temperature=1e-4)
    rows = sample_responses({"before": before, "after": after}, tokenizer, Judge(), GROUPS, cfg, CPU)
    prompts = {tokenizer.decode(row): row for group in GROUPS for row in group}
    assert len(rows) == len({prompt for prompt, _ in rows}) == min(samples, 4)
    for i, (prompt, sides) in enumerate(rows):
        for policy, (response, probability), texts in zip((before, after), sides, batches):
            with torch.no_grad():
                ids = prompts[prompt]
                for _ in range(CFG.response_len):
                    ids = torch.cat([ids, policy.gpt2(ids[None])[0, -1].argmax()[None]])
            assert prompt + response == texts[i] == tokenizer.decode(ids, skip_special_tokens=True)
            assert probability == pytest.approx(len(texts[i]) / (len(texts[i]) + 1), rel=1e-4)


def test_the_prompts_of_the_samples_depend_on_the_seed(opened):
    policy, other, tokenizer = opened
    judge, groups = SimpleNamespace(log_odds=lambda texts: torch.zeros(len(texts))), many_groups(LONG)
    cfg = replace(LONG, response_len=1, samples=5)

    def prompts(seed):
        policies = {"before": policy, "after": other}
        rows = sample_responses(policies, tokenizer, judge, groups, replace(cfg, seed=seed), CPU)
        return [prompt for prompt, _ in rows]

    assert prompts(0) == prompts(0) != prompts(1)


# ---- token by token


def test_the_pieces_of_a_response_join_to_its_text_even_if_characters_have_several_tokens(opened):
    """Prompt and response may be cut inside a character, and bytes may not form a character."""
    _, _, tokenizer = opened
    end = tokenizer.eos_token_id
    whole = tokenizer("A great caf\u00e9 \U0001f600 film")["input_ids"]
    assert len(tokenizer("\U0001f600")["input_ids"]) == 4
    odd = tokenizer("\U0001f600")["input_ids"][:2] + tokenizer(" film")["input_ids"]
    for ids in (whole, odd * 3, whole[:-3]):
        for cut in range(1, len(ids)):
            prompt, text = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:cut], ids))
            assert "".join(pieces(tokenizer, ids[:cut], ids[cut:])) == text[len(prompt) :]
            ended = pieces(tokenizer, ids[:cut], [*ids[cut:], end])
            assert (len(ended), ended[-1]) == (len(ids) - cut + 1, "<|endoftext|>")
            assert "".join(ended[:-1]) == text[len(prompt) :]
    assert pieces(tokenizer, whole, [end]) == ["<|endoftext|>"]


def test_the_metrics_of_each_token_are_those_of_the_ppo_update():
    """Three responses of 2 tokens, computed by hand; two have no <|endoftext|> and scores clipped to 2.5 and -2.5."""
    logprobs, ref_logprobs = (
        torch.tensor([[-1.0, -2], [-1, -1], [-1, -1]]),
        torch.tensor([[-1.5, -1], [-1, -1], [-1, -1]]),
    )
    values, scores = torch.tensor([[0.5, 0.25], [0, 0], [0, 0]]), torch.tensor([2.0, 3.0, -9.0])
    policies = {"after": lambda *_: (logprobs, values), "before": lambda *_: (ref_logprobs, None)}
    ppo = PPOConfig(kl_coef=0.1, lam=0.5, gamma=1.0, score_clip=2.5, missing_eos_penalty=0.5)
    sequences = torch.tensor([[9, 5, 0], [9, 5, 6], [9, 5, 6]])
    metrics, mask = token_metrics(policies, sequences, 1, scores, ppo, 1.0, eos_id=0)
    assert mask.all()
    torch.testing.assert_close(metrics["kl"], torch.tensor([[0.5, -1], [0, 0], [0, 0]]))
    torch.testing.assert_close(metrics["ratio"], torch.tensor([[0.5, -1], [0, 0], [0, 0]]).exp())
    torch.testing.assert_close(metrics["advantage"], torch.tensor([[0.625, 1.85], [1, 2], [-1.5, -3]]))
    assert torch.equal(metrics["value"], values)


def test_the_ratio_of_a_token_that_the_reference_almost_excludes_is_finite():
    policies = {
        "after": lambda *_: (torch.tensor([[-1.0]]), None),
        "before": lambda *_: (torch.tensor([[-999.0]]), None),
    }
    metrics, _ = token_metrics(policies, torch.tensor([[9, 5]]), 1, None, None, 1.0, eos_id=0)
    assert metrics["kl"].item() == 998 and metrics["ratio"].item() == pytest.approx(np.exp(20))


def test_the_kl_of_each_token_is_at_the_temperature_of_the_responses(opened):
    policy, other, tokenizer = opened
    cfg = replace(CFG, temperature=2.0, viewer_samples=4, prompts=4)
    out = {"after": respond(other, policy, tokenizer, GROUPS, cfg, CPU, "m")}
    out["before"] = out["after"]
    values = dict.fromkeys(out, {"score": np.zeros(4), "judge": np.zeros(4)})
    shown = viewer({"before": policy, "after": other}, tokenizer, None, GROUPS, out, values, None, cfg, CPU)
    kls = [sum(sample["after"]["kl"]) for sample in shown["samples"]]
    assert kls == pytest.approx(out["after"]["kl"], abs=2e-3)


@pytest.mark.parametrize("changes", [dict(advantage="rloo"), dict(advantage="grpo"), dict(whiten_rewards=True), None])
def test_a_policy_whose_values_cannot_be_shown_has_no_value_and_no_advantage(opened, evaluated, changes):
    """RLOO and GRPO train no value head, and the unit of whitened rewards is that of a rollout. None: of no run."""
    policies, groups, out, values = evaluated
    ppo = PPOConfig(**changes, kl_coef=0.3) if changes else None
    shown = viewer(policies, opened[2], None, groups, out, values, ppo, CFG, CPU)
    with_gae = viewer(policies, opened[2], None, groups, out, values, PPOConfig(), CFG, CPU)
    assert set(shown) == {"samples"} and len(shown["samples"]) == 16
    for sample, full in zip(shown["samples"], with_gae["samples"]):
        for side in ("before", "after"):
            assert set(sample[side]) == {"tokens", "kl", "ratio", "score", "judge"}
            assert set(full[side]) == set(sample[side]) | {"value", "advantage"}
            assert sample[side].items() <= full[side].items()


def test_the_metrics_of_each_token_ignore_nan_after_the_end():
    dirty = torch.tensor([[-1.0, -2, torch.nan]])
    policies = {"after": lambda *_: (dirty, dirty), "before": lambda *_: (dirty + 0.5, None)}
    metrics, mask = token_metrics(policies, torch.tensor([[9, 5, 0, 0]]), 1, torch.tensor([2.0]), PPOConfig(), 1.0, 0)
    assert mask.tolist() == [[True, True, False]]
    assert all(metrics[name].isfinite().all() for name in ("kl", "ratio", "advantage"))


@pytest.fixture(scope="module")
def evaluated(opened):
    """Responses of two policies to 16 prompts of 2 to 4 tokens: (policies, groups, responses, values)."""
    before, after, tokenizer = opened
    with torch.no_grad():
        after.value_head.bias += 0.5
    policies = {"before": before, "after": after}
    groups = list(prompt_groups(np.random.default_rng(0).integers(1, 250, (16, 4)), CFG))
    out = {name: respond(p, before, tokenizer, groups, CFG, CPU, name) for name, p in policies.items()}
    values = {name: {"score": np.arange(16.0) + i, "judge": np.linspace(0, 1, 16)} for i, name in enumerate(policies)}
    return policies, groups, out, values


def test_viewer_json_has_the_metrics_of_each_token_of_both_responses(opened, evaluated):
    """kl sums to the KL of the response of the policy; the advantages are those of GAE with the rewards of PPO."""
    tokenizer, (policies, groups, out, values) = opened[2], evaluated
    ppo = PPOConfig(kl_coef=0.3, gamma=0.9, lam=0.8)
    page = json.loads(json.dumps(viewer(policies, tokenizer, None, groups, out, values, ppo, CFG, CPU)))
    assert page["kl_coef"] == 0.3
    assert len(page["samples"]) == 16
    for i, sample in enumerate(page["samples"]):
        assert sample["prompt"] == out["before"]["prompts"][i]
        for side in ("before", "after"):
            shown, tokens, text = sample[side], out[side]["tokens"][i], out[side]["texts"][i]
            ended = tokens[-1] == tokenizer.eos_token_id
            assert "".join(shown["tokens"][: len(tokens) - ended]) == text[len(sample["prompt"]) :]
            assert {len(shown[name]) for name in ("tokens", "kl", "ratio", "value", "advantage")} == {len(tokens)}
            assert (shown["score"], shown["judge"]) == (values[side]["score"][i], round(values[side]["judge"][i], 4))
            assert shown["ratio"] == pytest.approx(np.exp(shown["kl"]), rel=1e-3, abs=2e-4)
            assert set(shown["value"]) == {0.5}
            assert all(x == round(x, 4) for x in shown["kl"])  # more digits would double the size of the file
            kl, mask = torch.tensor([shown["kl"]]), torch.ones(1, len(tokens), dtype=torch.bool)
            rewards = token_rewards(torch.tensor([shown["score"]]), kl, mask, 0.3)
            advantages, _ = gae(rewards, torch.tensor([shown["value"]]), mask, 0.9, 0.8)
            assert shown["advantage"] == pytest.approx(advantages[0].tolist(), abs=2e-3)
        assert sum(sample["after"]["kl"]) == pytest.approx(out["after"]["kl"][i], abs=2e-3)
        assert any(x != 0 for x in sample["before"]["kl"])  # also these KLs are of the policy after PPO


def test_with_shaping_the_values_of_the_viewer_have_the_score_of_the_text_so_far(opened, evaluated):
    """Clipped, and the advantages follow from them."""
    tokenizer, (policies, groups, out, values) = opened[2], evaluated
    ppo = PPOConfig(kl_coef=0.3, gamma=0.9, lam=0.8, score_clip=1.0, shaping_every=2)

    def length(texts):
        return torch.tensor([len(text) / 20 for text in texts])

    page, prompts = viewer(policies, tokenizer, length, groups, out, values, ppo, CFG, CPU), [*chain(*groups)]
    for i, sample in enumerate(page["samples"]):
        shown, tokens = sample["after"], out["after"]["tokens"][i]
        prompt = prompts[i].tolist()
        parts = decode([prompt + tokens[: t // 2 * 2] for t in range(len(tokens))], tokenizer)
        potentials = length(parts).clamp(max=1)[None]
        assert shown["value"] == pytest.approx((0.5 + potentials[0]).tolist(), abs=1e-4)
        kl, mask = torch.tensor([shown["kl"]]), torch.ones(1, len(tokens), dtype=torch.bool)
        rewards = token_rewards(torch.tensor([shown["score"]]).clamp(-1, 1), kl, mask, 0.3)
        advantages, _ = gae(rewards, 0.5 + potentials, mask, 0.9, 0.8)
        assert shown["advantage"] == pytest.approx(advantages[0].tolist(), abs=2e-3)


def test_the_prompts_of_the_viewer_have_all_lengths(opened, evaluated):
    policies, groups, out, values = evaluated
    page = viewer(policies, opened[2], None, groups, out, values, PPOConfig(), replace(CFG, viewer_samples=4), CPU)
    prompts = out["before"]["prompts"]
    assert [sample["prompt"] for sample in page["samples"]] == [prompts[i] for i in (0, 5, 10, 15)]
    none = viewer(policies, opened[2], None, groups, out, values, PPOConfig(), replace(CFG, viewer_samples=0), CPU)
    assert none["samples"] == []


# ---- whole runs


@pytest.fixture
def run(tmp_path, monkeypatch, gpt2_folder, bert_folder, judge_folder):
    """A function that compares a model with itself, with some fields changed, and returns the folder of the policy."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gpt2_folder, "after")
    (tmp_path / "mine.py").write_text("def length(texts):\n    return [len(t) for t in texts]\n")

    def compare(**changes):
        cfg = EvaluateConfig(
            dataset=str(reviews_csv(tmp_path / "toy.csv")), before=str(gpt2_folder), after="after", positive_label="",
            reward=str(bert_folder), judge=str(judge_folder), prompts=16, max_prompt_len=4, batch_size=8, resamples=50,
            samples=3, viewer_samples=5, limit_prompts=8, limit_samples=16, self_check=False,
        )  # fmt: skip
        evaluate.main(replace(cfg, **changes))
        return tmp_path / "after"

    return compare


@pytest.mark.parametrize("by", ["function", "classifier"])
def test_a_model_compared_with_itself_has_differences_of_0(run, capsys, gpt2_folder, bert_folder, by):
    out = run(reward="mine.py:length" if by == "function" else str(bert_folder), second_lm=str(gpt2_folder))
    results = json.loads((out / "results.json").read_text())
    ratio = results["difference"].pop("perplexity_ratio")
    assert results["before"] == results["after"]
    assert all(row == {"value": 0, "low": 0, "high": 0} for row in results["difference"].values())
    assert ratio == {"value": 1, "low": 1, "high": 1}
    assert set(results["difference"]) == set(results["before"])
    assert {"score", "kl", "kl_k3", "perplexity", "positive_by_judge", "repetition"} <= set(results["before"])
    assert ("positive_by_reward" in results["before"]) == (by == "classifier")
    assert results["before"]["kl"] == {"value": 0, "low": 0, "high": 0, "std": 0, "below_0": 0}
    assert results["before"]["bits_per_character"]["value"] > 0
    caption, *shown = (out / "samples.md").read_text().splitlines()
    assert caption.startswith("Samples at temperature 0.7") and len(shown) == 1 + 2 + 3
    assert [set(sample) for sample in results["samples"]] == 3 * [{"prompt", "before", "after"}]
    assert results["samples"][0]["before"] == results["samples"][0]["after"]
    assert set(results["samples"][0]["before"]) == {"text", "judge"}
    output = capsys.readouterr().out
    assert table_text(results) in output
    assert kl_text(results) in output
    written, publish = output.split("written:\n")[1].split("\nto publish it")
    files = [
        "results.json",
        "viewer.json",
        "samples.md",
        "example_results.png",
        "report.html",
        "README.md",
    ]  # without a log
    assert written.split() == [f"after/{file}" for file in files]
    assert publish.endswith("\n  hf upload USER/NAME after\n")
    assert all((out / file).stat().st_size > 0 for file in files)
    page = json.loads((out / "viewer.json").read_text())
    assert "kl_coef" not in page and len(page["samples"]) == 5  # a policy without a run


def test_the_kl_efficiency_compares_the_gain_with_the_scores_of_the_reference(run, tmp_path, gpt2_folder, capsys):
    """In results.json, on the terminal, in the card and on the report page; the second evaluation reads the scores."""
    policy = write_tuned(gpt2_folder, tmp_path / "tuned")
    for file in policy.glob("*.safetensors"):
        shutil.copy(file, tmp_path / "after")
    out = run()
    results, output = json.loads((out / "results.json").read_text()), " ".join(capsys.readouterr().out.split())
    entry, (scores,) = results["kl_efficiency"], (tmp_path / ".cache" / "limit").iterdir()
    assert entry["responses"] == [8, 16] and np.load(scores).shape == (1, 8, 16)
    assert entry["gain"] == pytest.approx(results["difference"]["score"]["value"])
    assert entry["kl"] == results["after"]["kl_exact"]["value"] > 0
    curve = [x.mean(1) for x in limit_curve(np.load(scores)[0])]
    assert entry["value"] == np.interp(entry["gain"], *reversed(curve)) / entry["kl"]
    line = efficiency_text(entry)
    assert line in output and line in (out / "README.md").read_text()
    assert line in html.unescape((out / "report.html").read_text())
    changed = np.load(scores) * 2
    np.save(scores, changed)
    run(force=True)
    again = json.loads((out / "results.json").read_text())["kl_efficiency"]
    assert (
        again["value"]
        == np.interp(entry["gain"], *reversed([x.mean(1) for x in limit_curve(changed[0])])) / entry["kl"]
    )


def test_without_samples_of_the_reference_there_is_no_kl_efficiency(run, tmp_path):
    out = run(limit_samples=0)
    assert "kl_efficiency" not in json.loads((out / "results.json").read_text())
    assert all("KL efficiency" not in (out / name).read_text() for name in ("README.md", "report.html"))
    assert not (tmp_path / ".cache").exists()


def test_viewer_and_card_use_the_config_of_the_run(run, tmp_path, capsys, bert_folder):
    ppo = PPOConfig(kl_coef=0.75, policy="gpt2-medium", steps=3, reward=str(bert_folder))
    (tmp_path / "after" / "run_config.json").write_text(json.dumps(vars(ppo)))
    log = shutil.copy(ROOT / "asset" / "log.jsonl", tmp_path / "after")
    out = run()
    card = (out / "README.md").read_text()
    output, warnings = capsys.readouterr()
    assert "  after/learning_curves.png\n" in output and (out / "learning_curves.png").is_file()
    assert "warning: after was trained with gpt2-medium, and is measured with --before /" in warnings
    assert "--reward" not in warnings  # the same as that of the run
    assert re.search(rf"\| last rollout +\| number {len(Path(log).read_text().splitlines())} after ", card)
    assert json.loads((out / "viewer.json").read_text())["kl_coef"] == 0.75
    assert "base_model: gpt2-medium" in card
    assert "384: 3 rollouts of 128" in card
    assert "--kl_coef 0.75" in card


def test_the_task_and_the_columns_of_the_dataset_are_those_of_the_config(run, tmp_path):
    """Each prompt of the controlled task is a control and the beginning of a review."""
    csv = reviews_csv(tmp_path / "toy.csv").read_text().replace("text,label", "words,mood", 1)
    (tmp_path / "columns.csv").write_text(csv)
    dataset = {"dataset": "columns.csv", "text_column": "words", "label_column": "mood"}
    out = run(task="controlled", **dataset, viewer_samples=16)
    prompts = [sample["prompt"] for sample in json.loads((out / "viewer.json").read_text())["samples"]]
    assert len(prompts) == 16
    assert all(prompt.startswith(f"{CONTROLS[i % 2]} R") for i, prompt in enumerate(prompts))


def test_the_results_of_the_controlled_task_name_agreement_and_not_sentiment(run, capsys):
    """The judge's probability is then that a text agrees with its control. Catches a caption of the other task."""
    out = run(task="controlled", samples=2)
    files = ("samples.md", "README.md", "report.html")
    for text in (capsys.readouterr().out, *((out / name).read_text(encoding="utf-8") for name in files)):
        assert "probability that the text agrees with its control" in text
        assert not re.search("of POSITIVE|positive, by", text)


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_all_models_compute_in_the_dtype_of_the_config(run, monkeypatch, name, dtype):
    policies, rewards = [], []
    monkeypatch.setattr(evaluate, "load_rewards", lambda *args: rewards.extend(load_rewards(*args)) or rewards)
    monkeypatch.setattr(evaluate, "load_policy", lambda *args: policies.append(load_policy(*args)) or policies[-1])
    monkeypatch.setattr(evaluate, "prompt_groups", None)  # the run ends here
    with pytest.raises(TypeError):
        run(dtype=name, device="cpu")
    assert [policy.gpt2.dtype for policy in policies] == [reward.dtype for reward in rewards] == [dtype, dtype]


def share(odds):
    return (odds > 0).double().mean().item()


def test_each_metric_is_of_its_own_model_and_classifier(run, tmp_path, gpt2_folder):
    """With two different models and classifiers. Catches a swap of two of them, and differences with a wrong sign."""
    folders = {"before": gpt2_folder, "after": write_tuned(gpt2_folder, tmp_path / "after")}
    opened = {name: open_gpt2(str(folder)) for name, folder in folders.items()}
    policies, tokenizer = {name: load_policy(*parts).eval() for name, parts in opened.items()}, opened["before"][2]
    cfg = EvaluateConfig(prompts=16, max_prompt_len=4, batch_size=8)
    reviews = load_splits(str(reviews_csv(tmp_path / "toy.csv")))["evaluation"].texts
    groups = list(prompt_groups(prompt_pool(reviews, tokenizer, 4, 16), cfg))
    out = {name: respond(p, policies["before"], tokenizer, groups, cfg, CPU, name) for name, p in policies.items()}
    texts = out["before"]["texts"] + out["after"]["texts"]
    classifiers = [str(write_balanced_bert(tmp_path / f"bert{seed}", texts, seed)) for seed in (0, 2)]
    reward, judge = map(SentimentReward.load, classifiers)

    folder = run(reward=classifiers[0], judge=classifiers[1], viewer_samples=16)
    results, shown = (json.loads((folder / name).read_text()) for name in ("results.json", "viewer.json"))
    expected = {
        name: {
            "score": reward(side["texts"]).double().mean().item(),
            "positive_by_reward": share(reward.log_odds(side["texts"])),
            "positive_by_judge": share(judge.log_odds(side["texts"])),
            "judge": judge.log_odds(side["texts"]).sigmoid().mean().item(),
            "kl_exact": np.mean(side["kl_exact"]),
            "perplexity": np.exp(sum(side["ref_nll"]) / sum(map(len, side["tokens"]))),
        }
        for name, side in out.items()
    }
    before, after = expected["before"], expected["after"]
    expected["difference"] = {metric: after[metric] - before[metric] for metric in before}
    for name, metrics in expected.items():
        values = {metric: results[name][metric]["value"] for metric in metrics}
        assert values == pytest.approx(metrics, rel=1e-4, abs=1e-5), name
    for name, side in out.items():
        for i, sample in enumerate(shown["samples"]):
            assert (sample["prompt"], sample[name]["score"], sample[name]["judge"]) == (
                side["prompts"][i],
                pytest.approx(reward(side["texts"][i : i + 1]).item(), abs=1e-3),
                pytest.approx(judge.log_odds(side["texts"][i : i + 1]).sigmoid().item(), abs=1e-3),
            )
        for sample in results["samples"]:
            p = judge.log_odds([sample["prompt"] + sample[name]["text"]]).sigmoid().item()
            assert sample[name]["judge"] == pytest.approx(p, abs=1e-4)
    assert [results["config"][name] for name in ("reward", "judge")] == classifiers
    # a swap has an effect only if the two differ
    assert all(abs(expected["difference"][name]) > 1e-3 for name in ("score", "judge", "kl_exact", "perplexity"))
    assert any(side["positive_by_reward"] != side["positive_by_judge"] for side in (before, after))


def test_the_prompts_are_from_the_evaluation_split(run):
    """With prompts of 14 tokens, which identify a review. PPO is trained on those of the split prompts."""
    out = run(min_prompt_len=14, max_prompt_len=14, viewer_samples=16)
    prompts = [sample["prompt"] for sample in json.loads((out / "viewer.json").read_text())["samples"]]
    counts = {
        name: [[text.startswith(prompt) for text in part.texts].count(True) for prompt in prompts]
        for name, part in load_splits("toy.csv").items()
    }
    assert counts == {name: [name == "evaluation"] * 16 for name in counts}


def test_another_seed_gives_other_responses_samples_and_intervals(run):
    results = [json.loads((run(seed=seed, force=True) / "results.json").read_text()) for seed in (0, 0, 1)]
    assert results[0] == results[1]
    assert results[0]["before"]["kl"] == results[2]["before"]["kl"]  # a model against itself: 0
    for name in ("score", "perplexity"):
        assert results[0]["before"][name] != results[2]["before"][name]
    assert [s["prompt"] for s in results[0]["samples"]] != [s["prompt"] for s in results[2]["samples"]]


OUTPUTS = ("results.json", "samples.md", "viewer.json", "README.md", "example_results.png", "report.html")


@pytest.mark.parametrize("name", [*OUTPUTS, "MODEL_CARD.md"])
def test_any_file_of_an_earlier_evaluation_prevents_another_one(tmp_path, monkeypatch, name):
    """A file in the working directory does not."""
    after, current = tmp_path / "after", tmp_path / "current"
    for folder in (after, current):
        folder.mkdir()
    text = {"results.json": '{"difference": {}}'}.get(name, f"\n{CARD_MARK}\n")
    (current / name).write_text(text)
    monkeypatch.chdir(current)
    cfg = EvaluateConfig(after=str(after))
    assert check_results(cfg) is None
    (after / name).write_text(text)
    assert message(check_results, cfg).startswith(f"{after / name} already exists, ")
    assert check_results(replace(cfg, force=True)) is None


def test_with_resume_an_interrupted_evaluation_is_replaced_and_a_complete_one_is_kept(tmp_path):
    """It is complete if it has its page, which is written last, and the files of another origin are never replaced."""
    cfg = EvaluateConfig(after=str(tmp_path), resume=True)
    (tmp_path / "samples.md").write_text("mine")
    assert "samples.md already exists" in message(check_results, cfg)
    (tmp_path / "results.json").write_text('{"difference": {}}')
    assert check_results(cfg) is None
    (tmp_path / "report.html").touch()
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "MODEL_CARD.md").write_text(f"\n{CARD_MARK}\n")
    with pytest.raises(Finished) as finished:
        check_results(cfg)
    files = [str(tmp_path / name) for name in ("results.json", "samples.md", "report.html", "MODEL_CARD.md")]
    assert "\n  ".join(["written:", *files, ""]).rstrip(" ") in f"{finished.value}\n"
    assert str(finished.value).endswith(f"\n  hf upload USER/NAME {tmp_path}")
    assert check_results(replace(cfg, force=True)) is None
    (tmp_path / "checkpoints").mkdir()
    assert "unfinished run" in message(check_results, cfg)


def test_results_that_are_replaced_lose_their_page_first(run, monkeypatch):
    """Otherwise the page of the earlier results would show an interrupted evaluation as complete."""
    out = run()
    (out / f"{SAVING}x").mkdir()  # left by a kill, and not to be published
    monkeypatch.setattr(evaluate, "write_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(force=True)
    assert (out / "results.json").is_file() and not (out / "report.html").is_file()
    assert not list(out.glob(f"{SAVING}*"))


def test_results_of_another_script_are_not_replaced_even_with_force(tmp_path):
    (tmp_path / "results.json").write_text('{"accuracy": 0.9}')
    text = message(check_results, EvaluateConfig(after=str(tmp_path), force=True))
    assert text.startswith(f"{tmp_path / 'results.json'} was not written by evaluate.py")


def test_results_are_replaced_only_with_force(run, monkeypatch):
    """Refused before anything is loaded, for any of the files."""
    out = run()
    texts = {name: (out / name).read_bytes() for name in OUTPUTS}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "pick_device", None)
        for name in OUTPUTS:
            for other in OUTPUTS:
                (out / other).unlink(missing_ok=True)
            (out / name).write_bytes(texts[name])
            error = message(run, seed=1)
            assert f"after/{name} already exists" in error and "--force replaces it" in error
            assert (out / name).read_bytes() == texts[name]
    run(seed=1, force=True)
    assert all((out / name).is_file() for name in OUTPUTS)
    assert json.loads((out / "results.json").read_text())["config"]["seed"] == 1


def test_a_readme_of_the_user_is_not_an_earlier_result(run, tmp_path):
    (tmp_path / "after" / "README.md").write_text("mine")
    out = run()
    (out / "results.json").unlink()
    for name in set(OUTPUTS) - {"README.md"}:
        (out / name).unlink(missing_ok=True)
    assert "MODEL_CARD.md already exists" in message(run)  # the model card
    (out / "MODEL_CARD.md").unlink()
    run()
    assert (out / "README.md").read_text() == "mine"


def test_results_need_a_folder_to_be_written_to(run, monkeypatch):
    """Catches a policy on the hub that is evaluated for minutes before writing the results fails."""
    monkeypatch.setattr(hub, "open_gpt2", lambda name: open_gpt2(name if name != "user/name" else "after"))
    monkeypatch.setattr(evaluate, "respond", None)
    with pytest.raises(BadInput, match="user/name"):
        run(after="user/name")
