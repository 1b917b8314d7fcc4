"""The log of a run: files, TensorBoard, the lines on the terminal, and tables."""

import importlib.util
import json
import math
import sys
import types

import pytest
import torch
from conftest import message
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import FinetuneConfig, PPOConfig
from model import GPT2, GPT2Config, Policy
from runtime import log, monitor
from runtime.checkpoint import REVISIONS
from runtime.log import RunLog, column_width, columns, finetune_sheet, one_line, ppo_sheet, side_by_side
from runtime.monitor import peak_memory
from runtime.optimizer import Stepper

SHAPE = GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=2)
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def clock(monkeypatch):
    """time.time of the log: 1000 s, moved by hand."""
    clock = types.SimpleNamespace(now=1000.0, time=lambda: clock.now)
    monkeypatch.setattr(log, "time", clock)
    return clock


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


class Bar:
    """Stands for the progress bar: keeps what is printed above it and shown beside it."""

    def __init__(self):
        self.printed, self.shown = [], []

    def write(self, text):
        self.printed.append(text)

    def set_postfix(self, values, refresh):
        self.shown.append((values, refresh))


def rollout(**changes):
    metrics = dict(score=0.5, kl=1.0, kl_stderr=0.25, clip_frac=0.125, entropy=4.0, tokens_per_second=99.6)
    return metrics | changes


def test_a_line_has_the_step_the_seconds_of_the_run_and_the_metrics(tmp_path, clock):
    run = RunLog(PPOConfig(out=f"{tmp_path}/a/b", report_to="none"))
    clock.now += 2.126
    run.write(3, score=0.5, skipped_steps=1)
    assert lines(tmp_path / "a/b/log.jsonl") == [{"step": 3, "seconds": 2.13, "score": 0.5, "skipped_steps": 1}]
    clock.now += 1
    assert run.close() == 3.13


def test_the_seconds_of_a_resumed_run_continue(tmp_path, clock):
    """The lines from the resumed step on are dropped, also that of the step itself."""
    cfg = PPOConfig(out=str(tmp_path), report_to="none")
    run = RunLog(cfg)
    for step in range(4):
        clock.now += 10
        run.write(step)
    run.close()
    clock.now += 500
    run = RunLog(cfg, first_step=2)
    clock.now += 5
    run.write(2)
    run.close()
    assert [(line["step"], line["seconds"]) for line in lines(tmp_path / "log.jsonl")] == [(0, 10), (1, 20), (2, 25)]


def test_the_config_is_written_with_the_commits_of_what_was_read_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(REVISIONS, "gpt2", "0123abcd")
    RunLog(PPOConfig(out=str(tmp_path), report_to="none", lr=0.5)).close()
    text = (tmp_path / "run_config.json").read_text()
    assert json.loads(text)["lr"] == 0.5 and json.loads(text)["revisions"] == {"gpt2": "0123abcd"}
    assert text.startswith('{\n "')  # a field per line


def test_tensorboard_has_every_metric_and_drops_the_steps_that_a_resumed_run_repeats(tmp_path):
    cfg = PPOConfig(out=str(tmp_path))
    for first_step in (0, 2):
        run = RunLog(cfg, first_step=first_step)
        for step in range(first_step, 4):
            run.write(step, score=step + first_step / 4, kl=1.0)
        run.close()
    found = scalars(tmp_path / "tensorboard")
    assert found == {"score": [(0, 0.0), (1, 1.0), (2, 2.5), (3, 3.5)], "kl": [(step, 1.0) for step in range(4)]}
    run = RunLog(cfg)  # a new run deletes the curves of an earlier one
    run.write(0, loss=1.0)
    run.close()
    assert scalars(tmp_path / "tensorboard") == {"loss": [(0, 1.0)]}


def test_only_rank_0_writes(tmp_path):
    run = RunLog(PPOConfig(out=f"{tmp_path}/out"), rank=1)
    run.write(0, score=1.0)
    steps = types.SimpleNamespace(first_step=0, steps=lambda end: (step for step in range(end)))
    assert list(run.progress(steps, 2, "ppo", "rollout")) == [0, 1] and run.bar.disable
    run.write_rollout(0, rollout(), [{"prompt": "a", "response": "b", "score": 1.0}])
    run.close()
    assert not (tmp_path / "out").exists()


def test_the_progress_bar_starts_at_the_resumed_step(tmp_path, capsys):
    run = RunLog(PPOConfig(out=str(tmp_path), report_to="none"), first_step=3)
    steps = types.SimpleNamespace(first_step=3, steps=lambda end: (step for step in range(3, end)))
    assert list(run.progress(steps, 5, "ppo", "rollout")) == [3, 4]
    assert (run.bar.initial, run.bar.total, run.bar.unit, run.bar.desc) == (3, 5, "rollout", "ppo")
    assert "ppo:  60%|" in capsys.readouterr().err
    run.close()


def test_a_rollout_with_samples_is_printed_with_them_and_they_are_written(tmp_path):
    """A score that is not finite is shown as nan."""
    run = RunLog(PPOConfig(out=str(tmp_path), report_to="none"))
    run.bar, samples = Bar(), [
        {"prompt": "A ", "response": "good\nfilm", "score": 1.25},
        {"prompt": "B", "response": "x" * 200, "score": None},
    ]  # fmt: skip
    run.write_rollout(0, rollout(), None)
    assert not run.bar.printed and not (tmp_path / "samples.jsonl").exists()
    assert run.bar.shown == [(dict(score="+0.50", kl="1.00", tok_s="100"), False)]
    run.write_rollout(1, rollout(), samples)
    assert lines(tmp_path / "samples.jsonl") == [{"step": 1, "samples": samples}]
    assert run.bar.printed == [
        "step 1 | score +0.50 | kl 1.00 +- 0.25 nats | clip 0.125 | entropy 4.00\n"
        "   +1.25  A good film\n"
        f"    +nan  B{'x' * 108}…"
    ]
    run.write_rollout(2, rollout(), [])
    assert run.bar.printed[1] == "step 2 | score +0.50 | kl 1.00 +- 0.25 nats | clip 0.125 | entropy 4.00"
    run.close()
    assert [(line["step"], line["score"]) for line in lines(tmp_path / "log.jsonl")] == [(0, 0.5), (1, 0.5), (2, 0.5)]


@pytest.mark.parametrize(("kl", "warned"), [(-1.0, False), (-1.01, True)])
def test_a_kl_below_minus_1_prints_a_warning(kl, warned):
    run = RunLog(PPOConfig(), rank=1)
    run.bar = Bar()
    run.write_rollout(0, rollout(kl=kl), None)
    assert [text.startswith(f"warning: KL is {kl:.2f} nats") for text in run.bar.printed] == [True] * warned


def test_a_skipped_rollout_is_counted_printed_and_logged_and_the_third_in_a_row_gives_its_reason(tmp_path):
    run, stepper = RunLog(PPOConfig(out=str(tmp_path), report_to="none")), Stepper(torch.nn.Linear(1, 1), [], 1.0)
    run.bar = Bar()
    for step in range(2):
        run.skip(step, "score of text 0 is nan", stepper)
    text = message(run.skip, 2, "score of text 1 is nan", stepper)
    assert text.endswith("the last one because a rollout is not finite: score of text 1 is nan")
    assert run.bar.printed == [f"step {step} is skipped: score of text 0 is nan" for step in range(2)]
    run.close()
    assert [line["skipped_steps"] for line in lines(tmp_path / "log.jsonl")] == [1, 2]


def test_a_run_on_wandb_is_named_after_its_folder(tmp_path, monkeypatch):
    settings = []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.util.spec_from_loader("wandb", None, origin="here")
    wandb.util = types.SimpleNamespace(generate_id=lambda: "1")
    wandb.init = lambda **named: settings.append(named) or types.SimpleNamespace(finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    RunLog(PPOConfig(out=str(tmp_path), report_to="wandb")).close()
    assert (settings[0]["project"], settings[0]["name"]) == ("mini-rlhf", tmp_path.as_posix())


def test_a_text_that_fits_stays_and_a_longer_one_ends_with_an_ellipsis():
    assert one_line("abcd", 4) == "abcd" and one_line("abcde", 4) == "abc…" and one_line("a\x1b[2J\nb", 9) == "a [2J b"


def test_two_columns_fill_the_width_within_bounds():
    assert [column_width(width) for width in (1, 20, 22, 100, 160, 161, 999)] == [8, 8, 9, 48, 78, 78, 78]


def test_responses_are_side_by_side_with_the_probabilities_of_the_judge():
    text = side_by_side([("The", [("film was bad", 0.5), ("film was good", 0.51)])], width=60)
    assert text.splitlines() == [
        "before PPO" + " " * 22 + "after PPO",
        "",
        "The …",
        f"(0.50) film was bad{' ' * 13}(0.51) film was good",
    ]
    assert columns(["a b", "c"], 1) == ["a    c", "b"]


def classifier(weights):
    return types.SimpleNamespace(model=torch.nn.Linear(weights, 1, bias=False))


def test_the_table_of_ppo_shows_models_sizes_device_and_where_values_come_from(monkeypatch):
    calls = []
    monkeypatch.setattr(log, "time_on_cpu", lambda *args: calls.append(args) or {"time": "soon"})
    cfg, policy = PPOConfig(micro_batch_size=4, minibatch_size=32, lr=0.5), Policy(GPT2(SHAPE, dtype=torch.bfloat16))
    reward, judge = classifier(1000), classifier(500)
    text = ppo_sheet(cfg, policy, reward, judge, 1234, GPU)
    weights = f"{sum(p.numel() for p in policy.parameters()):,}"
    assert text.splitlines() == [
        "PPO",
        f"  policy           {weights} parameters from finetune_checkpoints/gpt2",
        "  reward           lvwerra/bert-imdb, logit",
        "  episodes         25,600: 200 rollouts of 128, 1,234 prompts",
        "  optimizer steps  3,200: 16 per rollout, over 4 epochs",
        "  forward passes   4 episodes each",
        "  device           cuda:0, bf16",
        "  time             soon",
        "  output           ppo_checkpoints/gpt2",
    ]
    assert calls == [(log.ppo_flops(cfg, policy.gpt2, [reward, judge]), cfg, GPU)]
    plain = ppo_sheet(cfg, Policy(GPT2(SHAPE)), len, None, 1, CPU)
    assert "  reward           lvwerra/bert-imdb\n" in plain and "cpu, fp32\n" in plain


def test_the_table_of_a_fine_tuning_shows_its_device_and_its_time(monkeypatch):
    calls = []
    monkeypatch.setattr(log, "time_on_cpu", lambda *args: calls.append(args) or {})
    cfg = FinetuneConfig()
    assert "cuda:0, bf16" in finetune_sheet(cfg, GPT2(SHAPE, dtype=torch.bfloat16), None, 20, 1, 1, 1, 1, GPU)
    assert "cpu, fp32" in finetune_sheet(cfg, GPT2(SHAPE), None, 20, 1, 1, 1, 1, CPU)
    assert [args[1:] for args in calls] == [(cfg, GPU), (cfg, CPU)]


def test_the_peak_memory_on_a_gpu_is_that_of_the_gpu_in_gigabytes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {GPU: 3e9}.__getitem__)
    assert peak_memory(GPU) == 3.0


@pytest.mark.parametrize(("platform", "expected"), [("linux", 2.048), ("darwin", 0.002)])
def test_the_peak_memory_on_the_host_is_in_kilobytes_or_on_macos_in_bytes(monkeypatch, platform, expected):
    monkeypatch.setattr(monitor.resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=2_000_000))
    monkeypatch.setattr(monitor.sys, "platform", platform)
    assert peak_memory(CPU) == pytest.approx(expected)


def test_an_alarm_needs_a_change_above_two_standard_errors_and_is_not_raised_at_two():
    """Halves of +-1 around 0 and around x: the standard error of the change is 1."""
    for x, goes_off in ((2.0, False), (2.0 + 1e-6, True)):
        values = [1.0, -1.0, 1.0 + x, -1.0 + x]
        assert monitor.change(values) == pytest.approx(x, abs=1e-9)
        assert (monitor.change(values) > 2) == goes_off
    assert math.isfinite(monitor.change([0.0, 0.0, 1.0, 1.0]))
