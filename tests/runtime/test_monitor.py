"""What is measured during PPO: samples, alarms, the best policy, and what a checkpoint restores of them."""

import json
import types

import numpy as np
import pytest
import torch
from test_ppo import FakeTokenizer, config, random_prompts, tiny_policy, tiny_rollout
from torch import nn, tensor

from config import PPOConfig
from ppo import AdaptiveKL
from runtime.checkpoint import Checkpoints
from runtime.distributed import ONE_PROCESS
from runtime.monitor import Alarms, BestPolicy, rollout_metrics, sample
from runtime.optimizer import Stepper

POOL = np.ones((9, 3), dtype=np.int64)


def lengths(texts):
    return tensor([float(len(text)) for text in texts])


def parts_of(cfg, model):
    """The objects of a PPO run whose attributes are in a checkpoint."""
    stepper = Stepper(model, [torch.optim.SGD(model.parameters(), 0.1)], 1.0)
    return {
        "stepper": stepper,
        "controller": AdaptiveKL(cfg),
        "alarms": Alarms(cfg),
        "best": BestPolicy(model, FakeTokenizer(), cfg),
    }


def test_a_checkpoint_restores_the_state_of_every_part(tmp_path):
    """Catches an attribute that changes during a run and is not saved."""
    cfg, model = PPOConfig(out=str(tmp_path), resume=True, kl_target=1.0), nn.Linear(1, 1)
    parts = parts_of(cfg, model)
    parts["stepper"].skip("")
    parts["controller"].update(kl=9.0, episodes=100)
    parts["alarms"].check(dict(kl=1.0, perplexity=50.0, score=0.5, positive_by_judge=0.75))
    parts["best"].update(dict(objective=1.0, kl=2.0), kl_coef=0.5)
    checkpoints = Checkpoints(cfg, tmp_path, model, [], {}, parts)
    checkpoints.step = 1
    checkpoints.save()
    restored = parts_of(cfg, model)
    assert Checkpoints(cfg, tmp_path, model, [], {}, restored).first_step == 1
    assert (restored["stepper"].skipped, restored["stepper"].in_a_row) == (1, 1)
    assert restored["controller"].coef == parts["controller"].coef != cfg.kl_coef
    assert restored["alarms"].history == [[0.5, 0.75]] and restored["alarms"].first_perplexity == 50.0
    assert restored["best"].best == {"score": 2.0, "kl": 2.0, "rollouts": 1}
    assert restored["best"].rollouts == [[2.0, 2.0]]


@pytest.mark.parametrize(("steps", "expected"), [(7, [0, 3, 6]), (6, [0, 3, 5])])
def test_samples_are_made_at_the_configured_interval_and_in_the_last_step(steps, expected):
    cfg, policy = config(steps=steps, sample_every=3, sample_prompts=2), tiny_policy()
    made = [sample(policy, FakeTokenizer(), lengths, POOL, step, cfg) for step in range(steps)]
    assert [step for step, samples in enumerate(made) if samples is not None] == expected
    assert all(len(samples) == 2 for samples in made if samples)
    assert sample(policy, FakeTokenizer(), lengths, POOL, 0, config(sample_prompts=0)) == []


def test_samples_are_made_on_the_device_of_the_policy(monkeypatch):
    calls, policy = [], types.SimpleNamespace(gpt2=tiny_policy().to("meta").gpt2)
    monkeypatch.setattr(type(policy.gpt2), "generate", lambda self, *args: calls.append(args) or args[0])
    monkeypatch.setattr("runtime.monitor.random_generator", lambda device, *key: (device, key))
    monkeypatch.setattr("runtime.monitor.decode", lambda ids, tokenizer: ["a"] * len(ids))
    sample(policy, FakeTokenizer(), lengths, POOL, 0, config(seed=3))
    ((prompts, *_, generator),) = calls
    assert prompts.device.type == generator[0].type == "meta" and generator[1] == (3,)


def test_the_exact_kl_of_a_rollout_is_that_of_its_first_eight_episodes(monkeypatch):
    cfg = config(batch_size=16)
    prompts = torch.cat([random_prompts(), random_prompts()])
    policy, ref_policy = tiny_policy(0), tiny_policy(1)
    batch, rows = tiny_rollout(cfg, policy, ref_policy, prompts=prompts), []
    monkeypatch.setattr("runtime.monitor.exact_kl", lambda *args: rows.append(len(args[2])) or torch.zeros(8))
    rollout_metrics(batch, policy, ref_policy, 0.0, cfg)
    assert rows == [8]


def values(kl):
    return {"kl": kl, "perplexity": 50.0}


class Log:
    def __init__(self):
        self.printed = []

    def print(self, text):
        self.printed.append(text)


@pytest.mark.parametrize("on_alarm", ["warn", "stop"])
def test_an_alarm_is_printed_once_and_stops_the_run_only_on_request(on_alarm):
    alarms, log = Alarms(PPOConfig(kl_ceiling=1.0, on_alarm=on_alarm)), Log()
    assert not alarms.stopped
    results = [alarms.stop(step, values(kl), log, ONE_PROCESS) for step, kl in enumerate((0.5, 1.5, 1.6, 0.5, 1.7))]
    assert results == [on_alarm == "stop" and step in (1, 4) for step in range(5)]
    text = "nats per response, above kl_ceiling 1.0: raise kl_coef or lower lr"
    assert log.printed == [f"alarm at step 1: KL is 1.5 {text}", f"alarm at step 4: KL is 1.7 {text}"]
    assert alarms.stopped == (on_alarm == "stop")


def test_an_alarm_of_another_process_stops_this_one_too():
    ranks = types.SimpleNamespace(any=lambda flag: 1)
    assert Alarms(PPOConfig(on_alarm="stop")).stop(0, values(0.0), Log(), ranks)
    assert not Alarms(PPOConfig(on_alarm="warn")).stop(0, values(0.0), Log(), ranks)


def test_any_kl_ceiling_above_0_gives_an_alarm_and_0_gives_none():
    assert Alarms(PPOConfig(kl_ceiling=0.5)).check(values(0.75))
    assert not Alarms(PPOConfig(kl_ceiling=0.0)).check(values(99.0))


def test_samples_are_json_also_if_a_score_is_infinite():
    samples = sample(
        tiny_policy(), FakeTokenizer(), lambda texts: tensor([torch.inf, -1.0]), POOL, 0, config(sample_prompts=2)
    )
    assert [one["score"] for one in samples] == [None, -1.0] and json.loads(json.dumps(samples)) == samples
