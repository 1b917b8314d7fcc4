"""The comparison before and after PPO: prompts, answers, what viewer.json tells of them, a run from start to end."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import nan_after_the_end, reviews_csv

import evaluate
import hub
from config import BadInput, EvaluateConfig, PPOConfig
from evaluate import pieces, prompt_groups, respond, sample_answers, token_numbers, viewer
from hub import load_policy, open_gpt2
from log import side_by_side
from metrics import kl_text, table_text
from model import GPT2
from ppo import gae, token_rewards

CFG = EvaluateConfig(prompts=16, max_prompt_len=4, response_len=12, batch_size=3, resamples=200, samples=3)
CPU = torch.device("cpu")


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


# ---- samples


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
    assert all(set(first[name]) == {0} for name in ("kl", "kl_k3", "kl_exact"))
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
    assert min(apart["kl_k3"]) > 0


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


def test_nan_after_the_end_of_a_response_is_in_none_of_its_numbers(opened, monkeypatch):
    policy, other, tokenizer = (copy.deepcopy(part) for part in opened)
    end, forward, seen = tokenizer.eos_token_id, GPT2.forward, []
    with torch.no_grad():
        other.gpt2.wte.weight[end] *= 3  # so that some responses end early
    clean = respond(other, policy, tokenizer, GROUPS, CFG, CPU, "m")

    def with_nan(self, ids, first=0):
        logits = nan_after_the_end(forward(self, ids, first), ids, first, end)
        seen.append(logits.isnan().any().item())
        return logits

    monkeypatch.setattr(GPT2, "forward", with_nan)
    assert respond(other, policy, tokenizer, GROUPS, CFG, CPU, "m") == clean and any(seen)


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


# ---- token by token


def test_the_pieces_of_a_response_join_to_its_text_even_where_letters_have_several_tokens(opened):
    """Prompt and response may be cut inside a letter, and bytes may be no letter at all."""
    _, _, tokenizer = opened
    end = tokenizer.eos_token_id
    whole = tokenizer("A great caf\u00e9 \U0001f600 film")["input_ids"]
    assert len(tokenizer("\U0001f600")["input_ids"]) == 4
    odd = tokenizer("\U0001f600")["input_ids"][:2] + tokenizer(" film")["input_ids"]
    for ids in (whole, odd * 3, whole[:-3]):
        for cut in range(1, len(ids)):
            prompt, text = (tokenizer.decode(some, skip_special_tokens=True) for some in (ids[:cut], ids))
            assert "".join(pieces(tokenizer, ids[:cut], ids[cut:])) == text[len(prompt) :]
            ended = pieces(tokenizer, ids[:cut], [*ids[cut:], end])
            assert (len(ended), ended[-1]) == (len(ids) - cut + 1, "<|endoftext|>")
            assert "".join(ended[:-1]) == text[len(prompt) :]
    assert pieces(tokenizer, whole, [end]) == ["<|endoftext|>"]


def test_the_numbers_of_each_token_are_those_that_ppo_would_have_learned_from():
    """Two responses of 2 tokens worked out by hand; the second one has no end, and its score is cut to 2.5."""
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2], [-1, -1]]), torch.tensor([[-1.5, -1], [-1, -1]])
    values, scores = torch.tensor([[0.5, 0.25], [0, 0]]), torch.tensor([2.0, 3.0])
    policies = {"after": lambda *_: (logprobs, values), "before": lambda *_: (ref_logprobs, None)}
    ppo = PPOConfig(kl_coef=0.1, lam=0.5, gamma=1.0, score_clip=2.5, missing_eos_penalty=0.5)
    sequences = torch.tensor([[9, 5, 0], [9, 5, 6]])
    found, mask = token_numbers(policies, sequences, 1, scores, ppo, 1.0, eos_id=0)
    assert mask.all()
    torch.testing.assert_close(found["kl"], torch.tensor([[0.5, -1], [0, 0]]))
    torch.testing.assert_close(found["ratio"], torch.tensor([[0.5, -1], [0, 0]]).exp())
    torch.testing.assert_close(found["advantage"], torch.tensor([[0.625, 1.85], [1, 2]]))
    assert found["value"] is values


def test_the_numbers_of_each_token_ignore_nan_after_the_end():
    dirty = torch.tensor([[-1.0, -2, torch.nan]])
    policies = {"after": lambda *_: (dirty, dirty), "before": lambda *_: (dirty + 0.5, None)}
    found, mask = token_numbers(policies, torch.tensor([[9, 5, 0, 0]]), 1, torch.tensor([2.0]), PPOConfig(), 1.0, 0)
    assert mask.tolist() == [[True, True, False]]
    assert all(found[name].isfinite().all() for name in ("kl", "ratio", "advantage"))


@pytest.fixture(scope="module")
def answered(opened):
    """Two policies' answers to 16 prompts of 2 to 4 tokens: (policies, groups, answers, values)."""
    before, after, tokenizer = opened
    with torch.no_grad():
        after.value_head.bias += 0.5
    policies = {"before": before, "after": after}
    groups = list(prompt_groups(np.random.default_rng(0).integers(1, 250, (16, 4)), CFG))
    answers = {name: respond(p, before, tokenizer, groups, CFG, CPU, name) for name, p in policies.items()}
    values = {name: {"score": np.arange(16.0) + i, "judge": np.linspace(0, 1, 16)} for i, name in enumerate(policies)}
    return policies, groups, answers, values


def test_viewer_json_tells_each_token_of_both_answers(opened, answered):
    """The kl of the policy's own answer sums to its KL; the advantages are GAE's of the rewards of PPO."""
    tokenizer, (policies, groups, answers, values) = opened[2], answered
    ppo = PPOConfig(kl_coef=0.3, gamma=0.9, lam=0.8)
    found = json.loads(json.dumps(viewer(policies, tokenizer, groups, answers, values, ppo, CFG, CPU)))
    assert found["kl_coef"] == 0.3
    assert len(found["samples"]) == 16
    for i, sample in enumerate(found["samples"]):
        assert sample["prompt"] == answers["before"]["prompts"][i]
        for side in ("before", "after"):
            told, tokens, text = sample[side], answers[side]["tokens"][i], answers[side]["texts"][i]
            ended = tokens[-1] == tokenizer.eos_token_id
            assert "".join(told["tokens"][: len(tokens) - ended]) == text[len(sample["prompt"]) :]
            assert {len(told[name]) for name in ("tokens", "kl", "ratio", "value", "advantage")} == {len(tokens)}
            assert (told["score"], told["judge"]) == (values[side]["score"][i], round(values[side]["judge"][i], 4))
            assert told["ratio"] == pytest.approx(np.exp(told["kl"]), rel=1e-3, abs=2e-4)
            assert set(told["value"]) == {0.5}
            kl, mask = torch.tensor([told["kl"]]), torch.ones(1, len(tokens), dtype=torch.bool)
            rewards = token_rewards(torch.tensor([told["score"]]), kl, mask, 0.3)
            advantages, _ = gae(rewards, torch.tensor([told["value"]]), mask, 0.9, 0.8)
            assert told["advantage"] == pytest.approx(advantages[0].tolist(), abs=2e-3)
        assert sum(sample["after"]["kl"]) == pytest.approx(answers["after"]["kl"][i], abs=2e-3)
        assert any(x != 0 for x in sample["before"]["kl"])  # of the policy after PPO, whoever sampled them


def test_the_prompts_of_the_viewer_are_spread_over_all_lengths(opened, answered):
    policies, groups, answers, values = answered
    found = viewer(policies, opened[2], groups, answers, values, PPOConfig(), replace(CFG, viewer_samples=4), CPU)
    prompts = answers["before"]["prompts"]
    assert [sample["prompt"] for sample in found["samples"]] == [prompts[i] for i in (0, 5, 10, 15)]
    none = viewer(policies, opened[2], groups, answers, values, PPOConfig(), replace(CFG, viewer_samples=0), CPU)
    assert none["samples"] == []


# ---- whole runs


@pytest.fixture
def run(tmp_path, monkeypatch, gpt2_folder, bert_folder):
    """Compare a model with itself in an empty folder, with some fields changed; returns the folder of the policy."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gpt2_folder, "after")
    (tmp_path / "mine.py").write_text("def length(texts):\n    return [len(t) for t in texts]\n")

    def compare(**changes):
        cfg = EvaluateConfig(
            dataset=str(reviews_csv(tmp_path / "toy.csv")), before=str(gpt2_folder), after="after", positive_label="",
            reward=str(bert_folder), judge=str(bert_folder), prompts=16, max_prompt_len=4, batch_size=8, resamples=50,
            samples=3, viewer_samples=5, self_check=False,
        )  # fmt: skip
        evaluate.main(replace(cfg, **changes))
        return tmp_path / "after"

    return compare


@pytest.mark.parametrize("by", ["function", "classifier"])
def test_a_model_compared_with_itself_differs_in_nothing(run, capsys, gpt2_folder, bert_folder, by):
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
    assert len((out / "samples.md").read_text().splitlines()) == 2 + 2 + 3
    assert [set(sample) for sample in results["samples"]] == 3 * [{"prompt", "before", "after"}]
    assert results["samples"][0]["before"] == results["samples"][0]["after"]
    assert set(results["samples"][0]["before"]) == {"text", "judge"}
    shown = capsys.readouterr().out
    assert table_text(results) in shown
    assert kl_text(results) in shown
    written = shown.split("written:\n")[1].split()
    files = ["results.json", "samples.md", "viewer.json", "README.md", "example_results.png", "report.html"]  # no log
    assert written == [f"after/{file}" for file in files]
    assert all((out / file).stat().st_size > 0 for file in files)
    told = json.loads((out / "viewer.json").read_text())
    assert (told["kl_coef"], len(told["samples"])) == (PPOConfig().kl_coef, 5)


def test_the_kl_coefficient_of_the_viewer_is_that_of_the_run_and_the_card_tells_of_it(run, tmp_path):
    ppo = PPOConfig(kl_coef=0.75, policy="gpt2-medium", steps=3)
    (tmp_path / "after" / "run_config.json").write_text(json.dumps(vars(ppo)))
    out = run()
    card = (out / "README.md").read_text()
    assert json.loads((out / "viewer.json").read_text())["kl_coef"] == 0.75
    assert "base_model: gpt2-medium" in card
    assert "384: 3 rollouts of 128" in card
    assert "--kl_coef 0.75" in card


def test_results_need_a_folder_to_be_written_to(run, monkeypatch):
    """Catches a policy of the hub that is compared for minutes and has no place for what was found."""
    monkeypatch.setattr(hub, "open_gpt2", lambda name: open_gpt2(name if name != "user/name" else "after"))
    monkeypatch.setattr(evaluate, "respond", None)
    with pytest.raises(BadInput, match="user/name"):
        run(after="user/name")
