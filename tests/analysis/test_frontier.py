"""The sweep: which runs it makes, that it goes on where it was stopped, and what it says of its rows."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, message, reviews_csv, write_opinion, write_tuned

from analysis import frontier, plot
from analysis.frontier import (
    ABLATIONS,
    MEASURES,
    METHODS,
    PRESET,
    START,
    Run,
    ablation_table,
    at_equal_kl,
    check_sweep,
    methods_table,
    runs_of,
    runs_table,
    source_of,
    summary,
)
from analysis.responses import respond
from config import PRESETS, EvaluateConfig, FinetuneConfig, FrontierConfig, PPOConfig
from data import load_splits
from reward import SentimentReward
from runtime.cli import parse
from runtime.hub import load_policy, open_gpt2

CFG = FrontierConfig(seeds=2, kl_coefs=(0.1, 0.3), best_of=(1, 2), positive_epochs=(0.5,), prompts=8, device="cpu")


def test_every_method_has_every_coefficient_and_seed_on_the_same_terms():
    """A fixed coefficient: with a controller the runs of all coefficients would end at one KL."""
    runs = runs_of(CFG)
    assert len({run.name for run in runs}) == len(runs) == 2 * (3 * 2 + 1 + len(ABLATIONS))
    made = {(run.method, run.setting, run.seed) for run in runs}
    assert {(m, s, seed) for m in METHODS for s in ("0.1", "0.3") for seed in (0, 1)} <= made
    for run in runs:
        if run.method in METHODS:
            cfg = parse(PPOConfig, [str(flag) for flag in run.flags])
            assert (cfg.advantage, f"{cfg.kl_coef:g}", cfg.kl_target) == (METHODS[run.method], run.setting, 0)
            assert (cfg.steps, cfg.response_len) == (CFG.steps, CFG.response_len)
        if run.method == frontier.POSITIVE_ONLY:
            cfg = parse(FinetuneConfig, [str(flag) for flag in run.flags])
            assert (cfg.reviews, f"{cfg.epochs:g}", cfg.weights) == ("positive", run.setting, "last")


def test_a_run_is_trained_with_its_own_seed_and_the_sweeps_preset_and_device(tmp_path, monkeypatch):
    """And resumes: a sweep that was stopped continues. Catches one seed for all runs, whose intervals would be 0."""
    commands = []

    def keep(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(frontier.subprocess, "run", keep)
    cfg = replace(CFG, preset="mini", out=str(tmp_path), dtype="fp32")
    for seed in (0, 5):
        run = Run("PPO", "0.1", seed, "ppo.py", ("--kl_coef", 0.1))
        assert frontier.train(run, cfg) == tmp_path / run.name
        python, script, *flags = map(str, commands[-1])
        made, preset = parse(PPOConfig, flags), parse(PPOConfig, ["--preset", "mini"])
        expected = replace(preset, kl_coef=0.1, seed=seed, out=str(tmp_path / f"PPO-0.1-{seed}"), resume=True)
        assert made == replace(expected, device="cpu", dtype="fp32", report_to="none")
        assert (python, script) == (sys.executable, str(ROOT / "ppo.py"))


@pytest.mark.parametrize("detail", [detail for detail, change in ABLATIONS.items() if change.startswith("--")])
def test_an_ablation_by_flags_changes_one_constant(detail):
    plain, changed = (parse(PPOConfig, ["--preset", "mini", *flags.split()]) for flags in ("", ABLATIONS[detail]))
    assert len([name for name, value in vars(plain).items() if vars(changed)[name] != value]) == 1


@pytest.mark.parametrize("detail", [detail for detail, change in ABLATIONS.items() if change.endswith(".patch")])
def test_an_ablation_by_patch_changes_one_line_of_a_copy(detail, tmp_path):
    """Catches a patch that no longer fits the source, and one that git passes over in silence."""
    before = {file.name: file.read_text() for file in ROOT.glob("*.py")}
    copy = source_of(ABLATIONS[detail], tmp_path)
    after = {file.name: file.read_text() for file in copy.glob("*.py")}
    (changed,) = [name for name in before if before[name] != after[name]]
    lines = list(zip(before[changed].splitlines(), after[changed].splitlines(), strict=True))
    assert sum(old != new for old, new in lines) == 1
    assert {file.name: file.read_text() for file in ROOT.glob("*.py")} == before
    subprocess.run([sys.executable, "-c", f"import {changed.removesuffix('.py')}"], cwd=copy, check=True)


@pytest.fixture
def home(tmp_path, monkeypatch, gpt2_folder, bert_folder, judge_folder):
    """A sweep on tiny models, whose runs are not trained: each is another policy for each seed, made once."""
    made = []
    reviews_csv(tmp_path / "reviews.csv")
    tiny = dict(
        before=str(gpt2_folder), reward=str(bert_folder), judge=str(judge_folder), max_prompt_len=4, batch_size=4
    )
    sizes = dict(dataset=str(tmp_path / "reviews.csv"), positive_label="", self_check=False) | tiny
    monkeypatch.setitem(PRESETS["mini"], EvaluateConfig, sizes)

    def train(run, cfg):
        made.append(run.name)
        if len(made) == 5 and not os.path.exists(tmp_path / "stopped"):
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return write_tuned(gpt2_folder, tmp_path / "sweep" / run.name, seed=run.seed)

    monkeypatch.setattr(frontier, "train", train)
    cfg = replace(CFG, preset="mini", out=str(tmp_path / "sweep"), response_len=6)
    return cfg, tmp_path / "sweep", made


def rows_of(file):
    with open(file, newline="") as f:
        return list(csv.DictReader(f))


def test_a_sweep_that_was_stopped_goes_on_and_makes_no_run_twice(home, capsys):
    cfg, out, made = home
    with pytest.raises(KeyboardInterrupt):
        frontier.main(cfg)
    frontier.main(cfg)
    assert sorted(made) == sorted([run.name for run in runs_of(cfg)] + [made[4]])  # the fifth was stopped
    rows, ablation = rows_of(out / "frontier.csv"), rows_of(out / "ablation.csv")
    assert rows[0]["method"] == START and float(rows[0]["kl_exact"]) == 0
    assert len(rows) == 1 + 2 * (6 + 1 + 2) and len(ablation) == 2 * len(ABLATIONS)
    for method in {row["method"] for row in rows[1:]}:  # each seed has runs, and random numbers, of its own
        scores = [[row["score"] for row in rows if (row["method"], row["seed"]) == (method, s)] for s in ("0", "1")]
        assert len(scores[0]) == len(scores[1]) > 0 and scores[0] != scores[1], method
    assert (out / "frontier.png").stat().st_size > 10_000
    assert not list(out.glob("*/*.safetensors"))
    first = (out / "frontier.csv").read_text()
    frontier.main(cfg)  # a third time nothing is left to do
    assert (out / "frontier.csv").read_text() == first and len(made) == len(runs_of(cfg)) + 1
    assert "score above PPO's frontier" in capsys.readouterr().out


def test_the_best_of_n_has_the_highest_reward_of_n_answers_and_the_kl_of_its_bound(home):
    """Of one it is the fine-tuned model. Catches the worst of n, and one answer for all n."""
    cfg, _, _ = home
    examiner = frontier.Examiner(cfg)
    found = examiner.best_of_n((1, 4), seed=0)
    draws = [examiner.answers(examiner.reference, "", frontier.seed_of_draw(0, i))["texts"] for i in range(4)]
    scores = torch.stack([examiner.reward_fn(texts) for texts in draws]).double()
    assert len(set(map(tuple, draws))) == 4
    assert found[1]["score"] == pytest.approx(scores[0].mean().item()) and found[1]["kl"] == 0
    assert found[4]["score"] == pytest.approx(scores.max(0).values.mean().item())
    assert found[4]["kl_exact"] == pytest.approx(math.log(4) - 3 / 4)


@pytest.fixture
def opinions(home, tmp_path, monkeypatch):
    """The sweep of home with a reward and a judge that disagree on its responses: its Examiner."""
    cfg, _, _ = home
    examiner = frontier.Examiner(cfg)
    texts = [text for i in range(4) for text in examiner.answers(examiner.reference, "", seed=i)["texts"]]
    made = {name: str(write_opinion(tmp_path / name, texts, seed)) for name, seed in (("reward", 0), ("judge", 2))}
    monkeypatch.setitem(PRESETS["mini"], EvaluateConfig, PRESETS["mini"][EvaluateConfig] | made)
    return frontier.Examiner(replace(cfg, prompts=24))


def shares(texts, *classifiers):
    return [(classifier.log_odds(texts) > 0).double().mean().item() for classifier in classifiers]


def test_a_run_is_measured_by_its_own_policy_against_the_fine_tuned_model(opinions, gpt2_folder, tmp_path):
    """Score by the reward, share positive by each classifier: catches any two of the models exchanged."""
    folder = write_tuned(gpt2_folder, tmp_path / "run", seed=3)
    found = opinions.folder(folder, "run")
    policy, reference = (load_policy(*open_gpt2(str(f))).eval() for f in (folder, gpt2_folder))
    tokenizer, device = opinions.tokenizer, torch.device("cpu")
    answers = respond(policy, reference, tokenizer, opinions.groups, opinions.cfg, device, "run")
    reward, judge = (SentimentReward.load(name) for name in (opinions.cfg.reward, opinions.cfg.judge))
    by_reward, by_judge = shares(answers["texts"], reward, judge)
    assert abs(by_reward - by_judge) > 0.01
    expected = {
        "score": reward(answers["texts"]).mean().item(),
        "positive_by_reward": by_reward,
        "positive_by_judge": by_judge,
        "kl_exact": sum(answers["kl_exact"]) / 24,
        "perplexity": math.exp(sum(answers["ref_nll"]) / sum(map(len, answers["tokens"]))),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found["kl_exact"] > 0.1


def test_the_reward_picks_the_best_of_n_and_the_judge_only_watches(opinions):
    draws = [
        opinions.answers(opinions.reference, "", frontier.seed_of_draw(1, i))["texts"] for i in range(4)
    ]  # of seed 1
    reward, judge = (SentimentReward.load(name) for name in (opinions.cfg.reward, opinions.cfg.judge))
    best = torch.stack([reward(texts) for texts in draws]).argmax(0).tolist()
    texts = [draws[i][row] for row, i in enumerate(best)]
    by_reward, by_judge = shares(texts, reward, judge)
    found = opinions.best_of_n((4,), seed=1)[4]
    assert (found["positive_by_reward"], found["positive_by_judge"]) == pytest.approx((by_reward, by_judge))
    assert by_reward > by_judge + 0.1


def test_the_prompts_of_a_sweep_are_of_the_evaluation_split(home, monkeypatch):
    """14 tokens tell the reviews apart. On the prompts split PPO was trained."""
    cfg, _, _ = home
    sizes = PRESETS["mini"][EvaluateConfig] | dict(min_prompt_len=14, max_prompt_len=14)
    monkeypatch.setitem(PRESETS["mini"], EvaluateConfig, sizes)
    examiner = frontier.Examiner(cfg)
    prompts = [examiner.tokenizer.decode(row) for group in examiner.groups for row in group]
    splits = load_splits(sizes["dataset"])
    begun = {
        name: [[t.startswith(p) for t in part.texts].count(True) for p in prompts] for name, part in splits.items()
    }
    assert begun == {name: [name == "evaluation"] * 8 for name in splits}


def test_a_sweep_of_other_sizes_is_not_mixed_in(tmp_path):
    """More seeds or coefficients of the same kind are."""
    cfg = replace(CFG, out=str(tmp_path))
    check_sweep(cfg)
    check_sweep(replace(cfg, seeds=3, kl_coefs=(0.5,)))
    assert "steps 200 -> 100" in message(check_sweep, replace(cfg, steps=100))
    assert json.loads((tmp_path / "run_config.json").read_text())["seeds"] == 3


def test_a_run_that_fails_says_where_its_words_are(tmp_path):
    cfg = replace(CFG, out=str(tmp_path))
    said = message(frontier.train, Run("PPO", "0.1", 0, "ppo.py", ("--steps", "0")), cfg)
    assert "ended with status 2" in said and "PPO-0.1-0.log" in said
    assert "steps is 0" in (tmp_path / "PPO-0.1-0.log").read_text()


# ---- what the rows say


def point(method, kl, score, seed=0, setting="1"):
    numbers = dict.fromkeys(frontier.MEASURES, 0.0) | {"kl_exact": kl, "score": score}
    return {"method": method, "setting": setting, "seed": seed} | numbers


def test_a_value_at_a_kl_is_interpolated_where_a_run_is_near():
    """From (0, 1), (2, 3), (4, 4); an eighth of the KL is near, from either side."""
    rows = [point(START, 0, 1), point("PPO", 4, 4), point("PPO", 2, 3, setting="2")]
    for nats, score in ((2, 3), (1.8, 2.8), (2.25, 3.125), (3.6, 3.8), (4, 4)):
        assert at_equal_kl(rows, "score", nats)["PPO"] == pytest.approx([score])
    assert frontier.NEAR == 1 / 8


@pytest.mark.parametrize("nats", [1, 1.75, 2.3, 3, 3.5, 4.1, 8])
def test_a_value_at_a_kl_needs_a_run_near_it_and_none_is_extrapolated(nats):
    rows = [point(START, 0, 1), point("PPO", 4, 4), point("PPO", 2, 3, setting="2")]
    assert at_equal_kl(rows, "score", nats) == {"PPO": []}


def test_runs_at_6_and_38_nats_say_nothing_of_8_and_the_cell_is_empty():
    """The published value was .1 too low: PPO's runs at 7.8 to 8.8 nats made GRPO's at 6.5 nats look behind."""
    rows = [point(START, 0, 0), *(point("PPO", 8.1, 1.25, seed) for seed in (0, 1))]
    rows += [point("GRPO", kl, score, seed) for kl, score in ((6.5, 1.15), (38, 1.54)) for seed in (0, 1)]
    assert at_equal_kl(rows, "score", 8)["GRPO"] == []
    assert "| GRPO | - | - | - | - | - |" in methods_table(rows, "score").splitlines()
    assert "| GRPO, 1 | 22.250 " in runs_table(rows)  # the runs themselves are still reported


def test_the_start_is_no_run_of_a_method():
    assert at_equal_kl([point(START, 0, 1), point("PPO", 4, 4)], "score", 0) == {"PPO": []}


def test_each_seed_has_a_curve_of_its_own_and_a_method_needs_a_value_of_every_seed():
    """Catches the runs of another seed or method, and a mean over fewer seeds than the text says."""
    rows = [point(START, 0, 0), point("PPO", 2, 3, 0), point("PPO", 2, 5, 1), point("RLOO", 2, 7, 0)]
    assert at_equal_kl(rows, "score", 2) == {"PPO": [3, 5], "RLOO": [7]}
    assert at_equal_kl([*rows, point("RLOO", 3, 9, 1)], "score", 2) == {"PPO": [3, 5], "RLOO": []}


def cells(text):
    """{first cell of a line: [the others]} of the lines of tables."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return {first: others for first, *others in lines}


def test_the_ablation_reports_differences_within_a_seed():
    """Two seeds that differ by 1 and a detail that adds .5 to both: no more than that, and no width."""
    rows = [point("ablation", 1, seed, seed, PRESET) for seed in (0, 1)]
    rows += [point("ablation", 1, seed + 0.5, seed, "a detail") for seed in (0, 1)]
    lines = cells(ablation_table([point(START, 0, 0), point("PPO", 9, 9), point("PPO", 9, 9, 1)], rows))
    assert lines["a detail"][0] == "0.500 ± 0.000"


def test_the_score_above_the_frontier_is_that_of_the_same_seed_at_the_run_s_own_kl():
    """PPO's frontier rises by 1 and by 2 a nat; the preset is .25 above it at 2 nats, the detail .75 above at 4."""
    ppo = [point(START, 0, 0), *(point("PPO", kl, kl * (seed + 1), seed) for kl in (2, 4) for seed in (0, 1))]
    rows = [point("ablation", 2, 2 * (seed + 1) + 0.25, seed, PRESET) for seed in (0, 1)]
    rows += [point("ablation", 4, 4 * (seed + 1) + 0.75, seed, "a detail") for seed in (0, 1)]
    lines = cells(ablation_table(ppo, rows))
    assert (lines[PRESET][-1], lines["a detail"][-1]) == ("0.250 ± 0.000", "0.500 ± 0.000")


@pytest.mark.parametrize("far", [PRESET, "a detail"])
def test_the_score_above_the_frontier_is_empty_where_no_run_of_the_frontier_is_near(far):
    """A difference needs both of its runs; everything that was measured stays in the table."""
    ppo = [point(START, 0, 0), *(point("PPO", kl, kl, seed) for kl in (2, 8) for seed in (0, 1))]
    kls = {PRESET: 2, "a detail": 2} | {far: 4.5}
    rows = [point("ablation", kl, 1, seed, detail) for detail, kl in kls.items() for seed in (0, 1)]
    lines = cells(ablation_table(ppo, rows))
    assert lines["a detail"][-1] == "-" and lines["a detail"][0] == "0.000 ± 0.000"
    assert (lines[PRESET][-1] == "-") == (far == PRESET)


def committed(name):
    """The rows of a committed CSV as frontier.main has them."""
    rows = rows_of(ROOT / "asset" / "frontier" / name)
    return [row | {n: float(row[n]) for n in MEASURES} | {"seed": int(row["seed"])} for row in rows]


def test_the_published_tables_are_those_of_the_committed_runs():
    """frontier.md is made by the code from the two CSVs; the README's tables stand in it."""
    text = summary(committed("frontier.csv"), committed("ablation.csv"), FrontierConfig(seeds=3, prompts=512))
    assert (ROOT / "asset" / "frontier" / "frontier.md").read_text(encoding="utf-8") == text
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Reward against KL\n")[2].partition("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert len(tables) == 3 and all(table in text for table in tables)
    near = f"within {100 * frontier.NEAR:g} % of that KL"
    assert near in text and near in " ".join(section.split())


def test_an_interval_of_three_seeds_is_students():
    """Of 1, 2, 3: 4.30 x 1 / sqrt(3); the normal's 1.96 would promise too much."""
    assert plot.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30 / math.sqrt(3))
