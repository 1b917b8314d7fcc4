"""How ppo.main puts a run together: inputs, seeds, log and checkpoints."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import message, reviews_csv, write_bert

import ppo
from config import PPOConfig
from data import load_prompts
from reward import load_reward, reward_fingerprint
from runtime import checkpoint
from runtime.checkpoint import fingerprint, latest_checkpoint
from runtime.device import random_generator
from runtime.errors import BadInput
from runtime.hub import load_policy, open_gpt2, policy_fingerprint


class Killed(Exception):
    """Stands for kill -9."""


@pytest.fixture
def cfg(tmp_path, gpt2_folder, bert_folder):
    reviews = reviews_csv(tmp_path / "reviews.csv")
    (tmp_path / "rewards.py").write_text("def e(texts):\n    return [float(text.count('e')) for text in texts]\n")
    return PPOConfig(
        dataset=str(reviews), policy=str(gpt2_folder), reward=f"{tmp_path}/rewards.py:e", judge=str(bert_folder),
        out=str(tmp_path / "out"), steps=3, batch_size=8, minibatch_size=4, micro_batch_size=2, response_len=6,
        max_prompt_len=4, lr=1e-3, save_every=1, save_share=1.0, sample_prompts=2, report_to="none", device="cpu",
        self_check=False, seed=7,
    )  # fmt: skip


def killed_after(cfg, monkeypatch, steps):
    """Run main until it is killed after so many steps."""
    update, calls = ppo.update, []

    def update_or_die(*args):
        if len(calls) == steps:
            raise Killed
        calls.append(args)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "update", update_or_die)
        with pytest.raises(Killed):
            ppo.main(cfg)
    return calls


def test_a_checkpoint_has_the_hashes_of_prompts_policy_reward_and_judge(cfg, monkeypatch):
    """Catches an input that is not compared when a run is resumed."""
    killed_after(cfg, monkeypatch, 2)
    state = json.loads((latest_checkpoint(cfg.out) / "state.json").read_text())
    opened = open_gpt2(cfg.policy)
    pool = load_prompts(cfg, "prompts", opened[1], opened[2])
    judge = load_reward(replace(cfg, reward=cfg.judge), torch.device("cpu"))
    assert state["inputs"] == {
        "prompts": fingerprint(str(pool.tolist())),
        "policy": policy_fingerprint(load_policy(*opened), opened[2]),
        "reward": reward_fingerprint(load_reward(cfg, torch.device("cpu"))),
        "judge": reward_fingerprint(judge),
    }
    assert state.keys() == {"step", "inputs", "stepper", "controller", "alarms", "best"} and state["step"] == 2
    assert state["controller"]["coef"] != cfg.kl_coef and len(state["alarms"]["history"]) == 2


def test_a_resumed_run_keeps_the_log_and_restores_every_part(cfg, monkeypatch):
    killed_after(cfg, monkeypatch, 2)
    folder = latest_checkpoint(cfg.out)
    state = json.loads((folder / "state.json").read_text())
    state["stepper"]["skipped"], state["controller"]["coef"] = 5, 0.25
    (folder / "state.json").write_text(json.dumps(state))
    ppo.main(replace(cfg, resume=True))
    lines = [json.loads(line) for line in open(f"{cfg.out}/log.jsonl")]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert (lines[2]["skipped_steps"], lines[2]["kl_coef"]) == (5, 0.25)


def test_sampling_and_minibatches_have_seeds_of_their_own_for_each_step(cfg, monkeypatch):
    generators, rollout = [], ppo.rollout
    monkeypatch.setattr(ppo, "rollout", lambda *args: generators.append(args[7]) or rollout(*args))
    updates = killed_after(cfg, monkeypatch, 2)
    expected = [random_generator("cpu", 7, step, 0).initial_seed() for step in range(3)]
    assert [generator.initial_seed() for generator in generators] == expected
    assert [args[4].initial_seed() for args in updates] == [
        random_generator("cpu", 7, s).initial_seed() for s in (0, 1)
    ]


def test_a_finished_run_is_not_replaced_without_force(cfg):
    ppo.main(replace(cfg, steps=1))
    assert "a finished run: --force replaces it" in message(ppo.main, replace(cfg, steps=1))


def test_a_run_whose_reward_fails_is_saved_before_the_failed_step(cfg, monkeypatch):
    """Its best policy too. Nothing of the failed step is in it."""
    calls, score = [], ppo.score

    def fail_at_step_1(*args):
        calls.append(args)
        if len(calls) == 3:  # reward and judge of step 0, then the reward of step 1
            raise BadInput("the server is down")
        return score(*args)

    monkeypatch.setattr(ppo, "score", fail_at_step_1)
    text = message(ppo.main, replace(cfg, save_every=9))
    assert text.startswith("the server is down. The run is saved: --resume resumes it at step 1")
    assert latest_checkpoint(cfg.out).name == "00000001"
    assert (checkpoint.Path(cfg.out) / "best/model.safetensors").is_file()
    monkeypatch.setattr(ppo, "score", score)
    ppo.main(replace(cfg, save_every=9, resume=True))
    assert len(open(f"{cfg.out}/log.jsonl").readlines()) == 3


def test_the_share_of_truncated_texts_is_that_of_the_reward(cfg, tmp_path, monkeypatch):
    write_bert(tmp_path / "reward")
    tokenizer = json.loads((tmp_path / "reward/tokenizer_config.json").read_text())
    (tmp_path / "reward/tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 6}))
    ppo.main(replace(cfg, steps=1, reward=str(tmp_path / "reward")))
    (line,) = map(json.loads, open(f"{cfg.out}/log.jsonl"))
    assert line["truncated_frac"] > 0.5
    shutil.rmtree(cfg.out)


def test_the_learning_rate_decays_linearly_to_lr_end_and_an_update_is_timed(cfg):
    ppo.main(replace(cfg, lr_end=0.5, sample_prompts=0))
    lines = [json.loads(line) for line in open(f"{cfg.out}/log.jsonl")]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 1e-3 * 5 / 6, 1e-3 * 4 / 6])
    assert all(0 < line["seconds_update"] < 60 for line in lines)
