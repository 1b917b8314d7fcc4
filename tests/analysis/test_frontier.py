"""The sweep: its runs, its resumption, and how a run is evaluated."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, message, reviews_csv, write_balanced_bert, write_tuned

from analysis import frontier
from analysis.frontier import (
    ABLATIONS,
    BEST_OF_N,
    FIRST_CONSTANTS,
    METHODS,
    Run,
    best_of_n_rows,
    check_sweep,
    runs_of,
    source_of,
    start_row,
    write_config,
)
from analysis.frontier_tables import START
from analysis.limit import sample_scores
from analysis.metrics import open_second_lm, second_nll
from analysis.responses import prompt_groups, respond
from analysis.tables import read_csv
from config import PRESETS, DPOConfig, FinetuneConfig, FrontierConfig, PPOConfig
from data import load_splits
from reward import SentimentReward
from runtime.cli import parse
from runtime.errors import BadInput
from runtime.hub import load_policy, open_gpt2

pytest.importorskip("sklearn", reason="scikit-learn is in requirements-dev.txt")

CFG = FrontierConfig(
    seeds=2, kl_coefs=(0.1, 0.3), first_kl_coefs=(0.05,), rloo_kl_coefs=(0.2, 0.4), grpo_kl_coefs=(0.3, 0.5),
    dpo_betas=(0.2,), weighted_betas=(0.2, 0.4), best_of=(1, 2), positive_epochs=(0.5,), prompts=8,
    limit_samples=32, device="cpu",
)  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_the_positive_only_baseline_starts_from_a_trained_model(preset):
    """Preset medium fine-tunes random weights by default."""
    starts = {
        parse(FinetuneConfig, ["--preset", preset, *map(str, run.flags)]).init_from
        for run in runs_of(replace(CFG, preset=preset))
        if run.script == "finetune_gpt2.py"
    }
    assert starts == {{"gpt2": "gpt2", "mini": "asset/mini/gpt2", "medium": "finetune_checkpoints/medium"}[preset]}


def test_every_method_has_a_run_for_every_coefficient_and_seed_with_the_same_settings():
    """With a fixed coefficient: with a controller, the runs of all coefficients would end at the same KL."""
    runs = runs_of(CFG)
    assert len({run.name for run in runs}) == len(runs) == 2 * (3 * 2 + 1 + 1 + 2 + 1 + len(ABLATIONS))
    keys = {(run.method, run.setting, run.seed) for run in runs}
    coefficients = {
        "PPO": ("0.1", "0.3"), FIRST_CONSTANTS: ("0.05",), "RLOO": ("0.2", "0.4"), "GRPO": ("0.3", "0.5"),
        "DPO": ("0.2",), "reward-weighted": ("0.2", "0.4"),
    }  # fmt: skip
    assert coefficients.keys() == METHODS.keys()
    assert {(m, s, seed) for m, settings in coefficients.items() for s in settings for seed in (0, 1)} <= keys
    offline = {"DPO": ("dpo", 4), "reward-weighted": ("weighted", 16)}
    for run in runs:
        if run.method in offline:
            cfg = parse(DPOConfig, [str(flag) for flag in run.flags])
            assert (cfg.method, cfg.samples_per_prompt, f"{cfg.beta:g}") == (*offline[run.method], run.setting)
            assert (cfg.steps, cfg.response_len, run.script) == (CFG.steps, CFG.response_len, "dpo.py")
        elif run.method in METHODS:
            cfg = parse(PPOConfig, [str(flag) for flag in run.flags])
            assert cfg.advantage == {"RLOO": "rloo", "GRPO": "grpo"}.get(run.method, "gae")
            assert (f"{cfg.kl_coef:g}", cfg.kl_target, cfg.score_clip) == (run.setting, 0, 0)  # as for the limit
            assert (cfg.steps, cfg.response_len, run.script) == (CFG.steps, CFG.response_len, "ppo.py")
        if run.method == frontier.POSITIVE_ONLY:
            cfg = parse(FinetuneConfig, [str(flag) for flag in run.flags])
            assert (cfg.reviews, f"{cfg.epochs:g}", cfg.weights) == ("positive", run.setting, "last")


def test_the_first_constants_are_those_of_preset_mini_before_shaping_and_preset_gpt2_has_no_such_line():
    """asset/experiments.md has them."""
    flags = next(run.flags for run in runs_of(CFG) if run.method == FIRST_CONSTANTS)
    cfg = parse(PPOConfig, ["--preset", "mini", *map(str, flags)])
    assert (cfg.shaping_every, cfg.lr, cfg.lr_end) == (0, 4e-4, 0.1)
    assert {run.method for run in runs_of(parse(FrontierConfig, []))} & set(METHODS) == set(METHODS) - {FIRST_CONSTANTS}


def test_a_run_is_trained_with_its_own_seed_and_the_preset_and_device_of_the_sweep(tmp_path, monkeypatch):
    """And with --resume, for stopped sweeps. Catches one seed for all runs, whose intervals would be 0."""
    commands = []

    def record(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(frontier.subprocess, "run", record)
    cfg = replace(CFG, preset="mini", out=str(tmp_path), dtype="fp32")
    for seed in (0, 5):
        run = Run("PPO", "0.1", seed, "ppo.py", ("--kl_coef", 0.1))
        assert frontier.train(run, cfg) == tmp_path / run.name
        python, script, *flags = map(str, commands[-1])
        actual, preset = parse(PPOConfig, flags), parse(PPOConfig, ["--preset", "mini"])
        expected = replace(preset, kl_coef=0.1, seed=seed, out=str(tmp_path / f"PPO-0.1-{seed}"), resume=True)
        assert actual == replace(expected, device="cpu", dtype="fp32", report_to="none")
        assert (python, script) == (sys.executable, str(ROOT / "ppo.py"))


@pytest.mark.parametrize("detail", [detail for detail, change in ABLATIONS.items() if change.startswith("--")])
def test_an_ablation_by_flags_changes_one_constant(detail):
    plain, changed = (parse(PPOConfig, ["--preset", "mini", *flags.split()]) for flags in ("", ABLATIONS[detail]))
    assert len([name for name, value in vars(plain).items() if vars(changed)[name] != value]) == 1


@pytest.mark.parametrize("detail", [detail for detail, change in ABLATIONS.items() if change.endswith(".patch")])
def test_an_ablation_by_patch_changes_one_line_of_a_copy(detail, tmp_path):
    """Catches a patch that no longer fits the source, and one that git skips silently."""
    before = {file.name: file.read_text() for file in ROOT.glob("*.py")}
    copy = source_of(ABLATIONS[detail], tmp_path)
    after = {file.name: file.read_text() for file in copy.glob("*.py")}
    (changed,) = [name for name in before if before[name] != after[name]]
    lines = list(zip(before[changed].splitlines(), after[changed].splitlines(), strict=True))
    assert sum(old != new for old, new in lines) == 1
    assert {file.name: file.read_text() for file in ROOT.glob("*.py")} == before
    subprocess.run([sys.executable, "-c", f"import {changed.removesuffix('.py')}"], cwd=copy, check=True)


@pytest.fixture
def overrides(tmp_path, monkeypatch, gpt2_folder, bert_folder, judge_folder):
    """The fields of EvaluateConfig that differ from preset mini in a sweep: tiny models and their data."""
    fields = dict(
        before=str(gpt2_folder), reward=str(bert_folder), judge=str(judge_folder), max_prompt_len=4, batch_size=4,
        dataset=str(reviews_csv(tmp_path / "reviews.csv")), positive_label="", self_check=False,
        limit_cache=str(tmp_path / "limit"),
    )  # fmt: skip
    monkeypatch.setattr(frontier, "parse", lambda cls, argv: replace(parse(cls, argv), **fields))
    return fields


@pytest.fixture
def sweep(tmp_path, monkeypatch, overrides, gpt2_folder):
    """(config, names of the trained runs) of a sweep on tiny models. Training writes another policy for each seed.

    The fifth run is interrupted the first time.
    """
    names = []

    def train(run, cfg):
        names.append(run.name)
        if len(names) == 5:
            raise KeyboardInterrupt
        return write_tuned(gpt2_folder, tmp_path / "sweep" / run.name, seed=run.seed)

    monkeypatch.setattr(frontier, "train", train)
    return replace(CFG, preset="mini", out=str(tmp_path / "sweep"), response_len=6), names


def rows_of(file):
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def test_a_stopped_sweep_is_resumed_and_trains_no_run_twice(sweep, tmp_path, capsys):
    cfg, names = sweep
    out = tmp_path / "sweep"
    with pytest.raises(KeyboardInterrupt):
        frontier.main(cfg)
    frontier.main(cfg)
    assert sorted(names) == sorted([run.name for run in runs_of(cfg)] + [names[4]])  # the fifth was interrupted
    rows, ablation = rows_of(out / "frontier.csv"), rows_of(out / "ablation.csv")
    assert rows[0]["method"] == START and float(rows[0]["kl_exact"]) == 0
    assert len(rows) == 1 + 2 * (6 + 1 + 1 + 2 + 1) + 2 and len(ablation) == 2 * len(ABLATIONS)
    for method in {row["method"] for row in rows[1:]} - {BEST_OF_N}:  # each seed has its own runs and random numbers
        scores = [[row["score"] for row in rows if (row["method"], row["seed"]) == (method, s)] for s in ("0", "1")]
        assert len(scores[0]) == len(scores[1]) > 0 and scores[0] != scores[1], method
    assert (out / "frontier.png").stat().st_size > 10_000
    assert_efficiencies([*read_csv(out / "frontier.csv")[1:], *read_csv(out / "ablation.csv")], rows[0], out)
    assert not list(out.glob("*/*.safetensors"))
    first = (out / "frontier.csv").read_text()
    frontier.main(cfg)  # everything is done
    assert (out / "frontier.csv").read_text() == first and len(names) == len(runs_of(cfg)) + 1
    assert "score above PPO's frontier" in capsys.readouterr().out


def test_the_score_of_the_fine_tuned_model_is_the_mean_of_all_responses_of_the_limit_and_other_measures_of_one(
    evaluator,
):
    """One response to each prompt would shift the gains of all runs together, which no interval over seeds shows."""
    scores, shares = evaluator.limit()
    row, one = start_row(evaluator, scores, shares), evaluator.measure(evaluator.respond(evaluator.reference, ""))
    assert scores.shape == (24, 32)  # all prompts of the sweep
    assert (
        (row["score"], row["positive_by_judge"])
        == (scores.mean(), shares.mean())
        != (one["score"], one["positive_by_judge"])
    )
    assert {**one, "method": START, "setting": "0", "seed": 0}.items() - row.items() == {
        (name, one[name]) for name in ("score", "positive_by_judge")
    }


def test_a_sweep_that_fails_leaves_the_tables_of_the_runs_before(sweep, tmp_path):
    cfg, _ = sweep
    with pytest.raises(KeyboardInterrupt):
        frontier.main(cfg)
    rows = rows_of(tmp_path / "sweep" / "frontier.csv")
    assert [row["method"] for row in rows] == [START, "PPO", "PPO", "PPO, first constants", "RLOO", *[BEST_OF_N] * 2]
    assert "RLOO, 0.2" in (tmp_path / "sweep" / "frontier.md").read_text()


@pytest.mark.parametrize("best_of, limit_samples", [((2, 64), 32), ((), 0), ((2,), 15)])
def test_a_limit_of_too_few_responses_is_refused(best_of, limit_samples):
    with pytest.raises(BadInput, match=f"limit_samples is {limit_samples}"):
        replace(CFG, best_of=best_of, limit_samples=limit_samples)


def assert_efficiencies(rows, start, out):
    """Of each run, from its score and KL and the curve in limit.csv."""
    limit = read_csv(out / "limit.csv")
    assert limit[0]["kl"] == limit[0]["gain"] == 0 and len(limit) > 10
    for row in rows:
        if row["kl_exact"]:
            curve = [[point[name] for point in limit] for name in ("gain", "kl")]
            needed = np.interp(row["score"] - float(start["score"]), *curve)
            assert row["kl_efficiency"] == pytest.approx(needed / row["kl_exact"])


@pytest.fixture
def evaluator(sweep, overrides, tmp_path):
    """An Evaluator with a reward and a judge that disagree on its responses."""
    cfg, _ = sweep
    first = frontier.Evaluator(cfg)
    texts = [text for i in range(4) for text in first.respond(first.reference, "", seed=i)["texts"]]
    overrides |= {
        name: str(write_balanced_bert(tmp_path / name, texts, seed)) for name, seed in (("reward", 0), ("judge", 2))
    }
    return frontier.Evaluator(replace(cfg, prompts=24))


def shares(texts, *classifiers):
    return [(classifier.log_odds(texts) > 0).double().mean().item() for classifier in classifiers]


def test_a_run_is_evaluated_with_its_own_policy_against_the_fine_tuned_model(evaluator, gpt2_folder, tmp_path):
    """Score by the reward, share positive by each classifier. Catches a swap of any two models."""
    folder = write_tuned(gpt2_folder, tmp_path / "run", seed=3)
    row, cfg = evaluator.evaluate(folder, "run"), evaluator.cfg
    policy, reference = (load_policy(*open_gpt2(str(f))).eval() for f in (folder, gpt2_folder))
    device = torch.device("cpu")
    responses = respond(policy, reference, evaluator.tokenizer, evaluator.groups, cfg, device, "run")
    reward, judge = (SentimentReward.load(name) for name in (cfg.reward, cfg.judge))
    by_reward, by_judge = shares(responses["texts"], reward, judge)
    assert abs(by_reward - by_judge) > 0.01
    expected = {
        "score": reward(responses["texts"]).mean().item(),
        "positive_by_reward": by_reward,
        "positive_by_judge": by_judge,
        "kl_exact": sum(responses["kl_exact"]) / 24,
        "perplexity": math.exp(sum(responses["ref_nll"]) / sum(map(len, responses["tokens"]))),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert row["kl_exact"] > 0.1


def test_the_limit_and_best_of_n_are_of_responses_of_the_fine_tuned_model_to_the_prompts_of_the_sweep(evaluator):
    """The reward and not the judge chooses: for n = 1 it is the mean, for n = N the highest score of each prompt."""
    evaluator.cfg = replace(evaluator.cfg, limit_prompts=8, limit_samples=32)
    scores, shares = evaluator.limit()
    again, _ = sample_scores(
        evaluator.reference, evaluator.tokenizer, evaluator.reward_fn, evaluator.judge,
        list(prompt_groups(evaluator.pool, replace(evaluator.cfg, prompts=8))), evaluator.cfg, torch.device("cpu"),
    )  # fmt: skip
    assert scores.shape == (8, 32) and np.array_equal(scores, again)
    one, two, every = best_of_n_rows(scores, shares, (1, 2, 32))
    assert (one["score"], one["positive_by_judge"]) == pytest.approx((scores.mean(), shares.mean())) and one["kl"] == 0
    rows = np.arange(8)
    assert every["score"] == pytest.approx(scores.max(1).mean())
    assert every["positive_by_judge"] == pytest.approx(shares[rows, scores.argmax(1)].mean())
    assert two["kl_exact"] == pytest.approx(math.log(2) - 1 / 2)
    pairs = [max(row[a], row[b]) for row in scores for a in range(32) for b in range(a)]
    assert two["score"] == pytest.approx(np.mean(pairs))


def test_the_share_positive_by_words_is_that_of_a_classifier_of_labels_that_no_other_model_saw(sweep, overrides):
    """Of the split prompts. The judge's labels are those of one of its teachers, the reward's those of its own."""
    parts, fit = [], frontier.sentiment_baseline
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontier, "sentiment_baseline", lambda *args: parts.append(args[0]) or fit(*args))
        evaluator = frontier.Evaluator(sweep[0])
    (((texts, labels),),) = parts
    expected = load_splits(overrides["dataset"])["prompts"]
    assert texts == expected.texts and labels.tolist() == expected.labels.tolist()
    responses = evaluator.respond(evaluator.reference, "")
    responses["texts"] = ["a good film, a great story"] * 6 + ["a bad film, a dull story"] * 2
    assert evaluator.measure(responses)["positive_by_words"] == 0.75


def test_bits_per_character_are_by_the_second_model(sweep, tmp_path, gpt2_folder):
    """Of all responses. Without a second model, there are none."""
    second = str(write_tuned(gpt2_folder, tmp_path / "second", seed=7))
    evaluator = frontier.Evaluator(replace(sweep[0], second_lm=second))

    def expected(responses):
        nll = second_nll(*open_second_lm(second, torch.device("cpu")), responses, evaluator.cfg)
        characters = [len(text) - len(prompt) for text, prompt in zip(responses["texts"], responses["prompts"])]
        return pytest.approx(sum(nll) / sum(characters) / math.log(2))

    responses = evaluator.respond(evaluator.reference, "")
    bits = evaluator.measure(responses)["bits_per_character"]
    assert bits == expected(responses)
    assert "bits_per_character" not in frontier.Evaluator(sweep[0]).measure(responses)


def test_a_wrong_input_ends_a_sweep_before_it_trains_and_its_folder_can_be_used(sweep, monkeypatch):
    """Catches a config that is written first: the same folder would refuse the right file."""
    cfg, names = sweep
    assert "./nowhere" in message(frontier.main, replace(cfg, second_lm="./nowhere"))
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    assert "pip install -r requirements-dev.txt" in message(frontier.main, cfg)
    assert not names and not (frontier.Path(cfg.out) / "run_config.json").exists()


def test_the_prompts_of_a_sweep_are_from_the_evaluation_split(sweep, overrides):
    """With prompts of 14 tokens, which identify a review. PPO was trained on those of the split prompts."""
    overrides |= dict(min_prompt_len=14, max_prompt_len=14)
    evaluator = frontier.Evaluator(sweep[0])
    prompts = [evaluator.tokenizer.decode(row) for group in evaluator.groups for row in group]
    counts = {
        name: [[text.startswith(prompt) for text in part.texts].count(True) for prompt in prompts]
        for name, part in load_splits(overrides["dataset"]).items()
    }
    assert counts == {name: [name == "evaluation"] * 8 for name in counts}


def test_a_sweep_of_other_sizes_is_refused(tmp_path):
    """More seeds or coefficients are allowed."""
    cfg = replace(CFG, out=str(tmp_path))
    for allowed in (cfg, replace(cfg, seeds=3, kl_coefs=(0.5,), dpo_betas=(0.7,))):
        check_sweep(allowed)
        write_config(allowed)
    assert "steps 200 -> 100" in message(check_sweep, replace(cfg, steps=100))
    assert "second_lm '' -> 'gpt2'" in message(check_sweep, replace(cfg, second_lm="gpt2"))
    assert json.loads((tmp_path / "run_config.json").read_text())["seeds"] == 3


def test_the_error_of_a_failed_run_names_its_log(tmp_path):
    cfg = replace(CFG, out=str(tmp_path))
    error = message(frontier.train, Run("PPO", "0.1", 0, "ppo.py", ("--steps", "0")), cfg)
    assert "failed with exit status 2" in error and "PPO-0.1-0.log" in error
    assert "steps is 0" in (tmp_path / "PPO-0.1-0.log").read_text()
