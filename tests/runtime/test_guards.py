"""Guards: rewards, gradients and weights that are not finite, and the alarms of a run."""

import json
import math

import pytest
import soak
import torch
from conftest import ROOT, message
from soak import ppo_flags, start, toy
from test_resume import ended, lines, train

from config import PPOConfig
from model import GPT2, GPT2Config, Policy
from runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from runtime.cli import parse
from runtime.errors import BadInput
from runtime.hub import save_gpt2
from runtime.monitor import Alarms, peak_memory
from runtime.optimizer import Muon, Stepper


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return soak.small_files(tmp_path_factory.mktemp("home"))


# ---- values that are not finite


def test_three_rollouts_of_nan_in_a_row_end_a_run_with_the_reason(home, tmp_path):
    flags = ppo_flags(home, tmp_path / "out", reward=f"{home}/rewards.py:late", save_every=1)
    code, output = ended(start("ppo", flags, tmp_path / "output"), tmp_path / "output")
    assert code == 2
    reason = "a rollout is not finite: score of text 0 is nan: 'R"
    assert output[-1].startswith(f"error: three steps in a row were skipped, the last one because {reason}")
    assert [line["skipped_steps"] for line in lines(tmp_path / "out")] == [0, 1, 2]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, tokenizer, number):
    """Neither in a checkpoint nor in the value head of a policy; what was saved before is kept."""
    model, optimizer = toy(1)
    save_checkpoint(tmp_path, model, [optimizer], {"step": 1, "inputs": {}})
    model.bias.data[0] = number
    text = message(save_checkpoint, tmp_path, model, [optimizer], {"step": 2})
    assert "model.bias has a value that is not finite" in text
    assert latest_checkpoint(tmp_path).name == "00000001"
    policy = Policy(GPT2(GPT2Config(20, 32, 32, 1, 2)).init_weights())
    policy.value_head.weight.data[0] = number
    assert "value_head" in message(save_gpt2, policy.gpt2, tokenizer, tmp_path, policy.value_head.state_dict())
    assert not (tmp_path / "model.safetensors").exists()


def test_a_step_that_is_taken_resets_the_count_of_skipped_steps_in_a_row():
    model = torch.nn.Linear(2, 1)
    stepper = Stepper(model, [torch.optim.SGD(model.parameters(), 0.1)], 1.0)
    for _ in range(3):
        stepper.skip("a"), stepper.skip("b")
        model(torch.ones(2)).backward()
        stepper.step()
    stepper.skip("a"), stepper.skip("b")
    assert "the last one because c" in message(stepper.skip, "c") and stepper.skipped == 9


def test_moments_of_another_optimizer_are_refused(tmp_path):
    """With --force --optimizer muon: moments are numbered, and would be those of other weights."""
    model, adam = toy(1)
    save_checkpoint(tmp_path, model, [adam], {"step": 1, "inputs": {}})
    rest, muon = torch.optim.Adam([model.bias]), Muon([model.weight], 0.1)
    text = message(load_checkpoint, latest_checkpoint(tmp_path), model, [rest, muon])
    assert "00000001 does not fit: " in text and "optimizer" in text
    assert "optimizer" in message(load_checkpoint, latest_checkpoint(tmp_path), model, [])


# ---- alarms


def alarms(metrics, **changes):
    """Return the alarm, a text, after each (kl, score, share positive by the judge[, perplexity])."""
    checked, names = Alarms(PPOConfig(**changes)), ("kl", "score", "positive_by_judge", "perplexity")
    return [checked.check({"perplexity": 50.0} | dict(zip(names, row))) for row in metrics]


def test_there_is_an_alarm_if_the_kl_is_above_its_ceiling_and_none_if_it_equals_it():
    assert [bool(text) for text in alarms([(29, 0, 0), (30, 0, 0), (31, 0, 0)], kl_ceiling=30.0)] == [0, 0, 1]
    assert not any(alarms([(1e9, 0, 0)], kl_ceiling=0.0))


def test_there_is_an_alarm_if_the_perplexity_is_above_a_multiple_of_that_of_the_first_rollout():
    """Once per crossing. Catches a comparison with the rollout before: here each is at most 1.6 times as large."""
    rollouts = [(0, 0, 0, perplexity) for perplexity in (40, 60, 80, 81, 90, 70, 82)]
    assert [i for i, text in enumerate(alarms(rollouts, perplexity_ceiling=2.0)) if text] == [3, 6]
    assert alarms(rollouts)[3].startswith(
        "perplexity under the reference is 81.0, above perplexity_ceiling 2.0 times the"
    )
    assert not any(alarms(rollouts, perplexity_ceiling=0.0))
    assert Alarms(PPOConfig(perplexity_ceiling=0.5)).check({"kl": 0.0, "perplexity": 9.0})  # also without a judge


def test_alarms_of_one_rollout_are_reported_together():
    """Also that of the judge: none of them delays another."""
    rollouts = [(0, i // 4, 1 - i // 4, 40.0) for i in range(7)] + [(9, 1, 0, 400.0)]
    text = alarms(rollouts, alarm_window=8, kl_ceiling=8.0)[-1]
    assert [part in text for part in ("KL is 9.0", "perplexity under", "the judge fell")] == [True] * 3


@pytest.mark.parametrize("file", ["log.jsonl", "gpt2/log.jsonl", "medium/ppo_log.jsonl"])
def test_the_committed_runs_have_no_alarm(file):
    """Their logs have no perplexity; it is e^(entropy + KL per token).

    In gpt2/log.jsonl, score and perplexity both rise by more than two standard errors in rollouts 4 to 24.
    """
    rows = [json.loads(line) for line in (ROOT / "asset" / file).read_text().splitlines()]
    columns = [[row[name] for name in ("kl", "score", "positive_by_judge")] for row in rows]
    perplexities = [math.exp(row["entropy"] + row["kl"] / row["response_length"]) for row in rows]
    assert not any(alarms([(*row, perplexity) for row, perplexity in zip(columns, perplexities)]))


@pytest.mark.parametrize(("score", "judge", "expected"), [(1, -1, True), (1, 1, False), (-1, -1, False), (1, 0, False)])
def test_there_is_an_alarm_when_the_judge_falls_while_the_score_rises(score, judge, expected):
    """Once per window, with noise that is small compared to the change; not before the window is full."""
    rollouts = [(0, score * i / 8 + 0.01 * (-1) ** i, 0.9 + judge * i / 20 - 0.01 * (-1) ** i) for i in range(15)]
    texts = alarms(rollouts, alarm_window=8)
    assert [i for i, text in enumerate(texts) if text] == ([7] if expected else [])
    assert not any(alarms(rollouts, alarm_window=0))


@pytest.mark.parametrize(("score", "judge", "expected"), [(2.1, -2.1, True), (1.9, -2.1, False), (2.1, -1.9, False)])
def test_an_alarm_needs_changes_of_two_standard_errors(score, judge, expected):
    """Values of +-1 around their mean, four in each half: the standard error of a change is sqrt(1/2)."""
    rise = [i // 4 / 2**0.5 for i in range(8)]
    rollouts = [(0, score * x + (-1) ** i, judge * x + (-1) ** i) for i, x in enumerate(rise)]
    assert any(alarms(rollouts, alarm_window=8)) == expected


def test_the_peak_memory_is_in_gigabytes():
    """A process with PyTorch uses at least .2 GB, and far less than a thousand times that."""
    assert 0.1 < peak_memory(torch.device("cpu")) < 50


def test_a_change_within_the_noise_is_no_alarm():
    rollouts = [(0, i / 8, 0.5 - i / 20 + e) for i, e in enumerate([0.5, -0.5] * 4)]
    assert not any(alarms(rollouts, alarm_window=8))


@pytest.mark.parametrize("nan_in", [[], [0]])
def test_a_run_stopped_by_an_alarm_ends_with_its_best_policy(home, tmp_path, capsys, nan_in):
    """Also if the first rollout was skipped, after which the initial policy would be kept."""
    train(home, tmp_path, nan_in=nan_in, kl_ceiling=1e-6, on_alarm="stop", save_every=6)
    output = capsys.readouterr().out
    assert f"alarm at step {lines(tmp_path)[-1]['step']}: KL is " in output and f"the policy is in {tmp_path}" in output
    assert len(lines(tmp_path)) < 6 and latest_checkpoint(tmp_path) is None
    for file in ("model.safetensors", "value_head.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "best" / file).read_bytes()


@pytest.mark.parametrize("ceiling", ["kl_ceiling", "perplexity_ceiling"])
def test_an_alarm_only_warns_by_default(home, tmp_path, capsys, ceiling):
    train(home, tmp_path, steps=3, **{ceiling: 1e-6})
    assert "alarm at step" in capsys.readouterr().out and len(lines(tmp_path)) == 3
    with pytest.raises(BadInput):
        parse(PPOConfig, ["--on_alarm", "panic"])
