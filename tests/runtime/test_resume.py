"""Runs that are killed, stopped or out of disk space, damaged checkpoints, and how such runs are resumed."""

import itertools
import json
import os
import random
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import soak
import torch
from conftest import message, write_bert
from soak import outcome, ppo_flags, start, to_flags, toy, wait_for

import finetune_gpt2
import ppo
import reward
from config import FinetuneConfig, PPOConfig, RewardConfig
from data import load_splits, prompt_pool
from runtime.checkpoint import SAVING, check_run, latest_checkpoint, load_checkpoint, save_checkpoint
from runtime.cli import parse
from runtime.errors import BadInput, Finished
from runtime.hub import load_gpt2, load_tokenizer, open_gpt2, save_gpt2
from runtime.log import RunLog, read_lines


class Killed(Exception):
    """Stops a run inside the process of a test, instead of kill -9."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return soak.small_files(tmp_path_factory.mktemp("home"))


def train(home, out, killed_in=None, nan_in=(), first=0, **changes):
    """Run ppo.main in this process from rollout `first`: Killed in one rollout, a reward of nan in others."""
    rollouts = itertools.count(first)

    def letters(texts):
        number = next(rollouts) if len(texts) == 8 else -1  # -1: for samples.jsonl
        if number == killed_in:
            raise Killed
        return torch.tensor([float(t.count("e")) for t in texts]) * (float("nan") if number in nan_in else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward.FunctionReward, "__call__", lambda self, texts: letters(texts))
        ppo.main(parse(PPOConfig, ppo_flags(home, out, **changes)))


def ended(process, output):
    """Wait for a process; return its exit status and the lines in its output, stdout and stderr."""
    process.join()
    return process.exitcode, Path(output).read_text().splitlines()


def lines(out):
    return read_lines(Path(out) / "log.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(home):
    """The folder of an uninterrupted run of ppo.py; its six rollouts start a second pass over the prompts."""
    out = home / "uninterrupted"
    ppo.main(parse(PPOConfig, ppo_flags(home, out)))
    log, tokenizer = lines(out), load_tokenizer(home / "gpt2")
    assert len(prompt_pool(load_splits(str(home / "reviews.csv"))["prompts"].texts, tokenizer, 4)) // 8 < 6 == len(log)
    assert len({line["kl_coef"] for line in log}) == len({line["lr"] for line in log}) == 6
    return out


# ---- resumed runs are bitwise equal to uninterrupted ones


def test_ppo_killed_and_resumed_equals_an_uninterrupted_run(home, uninterrupted, tmp_path):
    """Log and weights are bitwise equal. Catches unsaved moments, KL coefficient, lr or position in the prompts."""
    flags = ppo_flags(home, tmp_path / "out")
    process = start("ppo", flags, tmp_path / "output", pause=0.3)
    wait_for(process, lambda: len(lines(tmp_path / "out")) == 4)
    process.kill()
    assert ended(process, tmp_path / "output")[0] == -signal.SIGKILL
    assert latest_checkpoint(tmp_path / "out").name == "00000002"
    assert "contains an unfinished run: --resume resumes it" in message(ppo.main, parse(PPOConfig, flags))
    ppo.main(parse(PPOConfig, [*flags, "--resume", "True"]))
    assert outcome(tmp_path / "out") == outcome(uninterrupted)


def test_ppo_killed_in_its_second_pass_over_the_prompts_is_resumed_exactly(home, uninterrupted, tmp_path):
    with pytest.raises(Killed):
        train(home, tmp_path, killed_in=5)
    assert latest_checkpoint(tmp_path).name == "00000004"
    train(home, tmp_path, first=4, resume=True)
    assert outcome(tmp_path) == outcome(uninterrupted)


def test_a_skipped_rollout_is_counted_and_shown_and_a_run_killed_after_it_is_resumed_exactly(home, tmp_path, capsys):
    """Catches a count of skipped steps that is not in the checkpoint."""
    train(home, tmp_path / "whole", nan_in=[1])
    log = lines(tmp_path / "whole")
    assert [line["step"] for line in log if "score" not in line] == [1] and len(log) == 6
    assert [line["skipped_steps"] for line in log] == [0, 1, 1, 1, 1, 1]
    assert "step 1 is skipped: score of text 0 is nan: " in capsys.readouterr().out
    with pytest.raises(Killed):
        train(home, tmp_path / "out", nan_in=[1], killed_in=2)
    train(home, tmp_path / "out", first=2, resume=True)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_a_run_in_float16_killed_and_resumed_equals_an_uninterrupted_run(home, tmp_path, monkeypatch):
    """Catches a scale that is not in the checkpoint. It is so large that the first gradients overflow."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**30, growth_interval=2))
    train(home, tmp_path / "whole", dtype="fp16")
    skipped = [line["skipped_steps"] for line in lines(tmp_path / "whole")]
    with pytest.raises(Killed):
        train(home, tmp_path / "out", killed_in=5, dtype="fp16")
    train(home, tmp_path / "out", first=4, resume=True, dtype="fp16")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    assert 0 < skipped[0] < skipped[3] <= skipped[5] < 40


def test_fine_tuning_killed_and_resumed_equals_an_uninterrupted_run(home, tmp_path):
    """Catches unsaved moments, best perplexity or position in the data; test_finetune.py has corner cases."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = dict(
        dataset=home / "reviews.csv", init_from=home / "gpt2", block_size=40, epochs=0.2, batch_size=8,
        micro_batch_size=4, lr=1e-3, warmup_steps=2, eval_every=3, eval_tokens=300, save_every=2, save_share=1,
        device="cpu", report_to="none",
    )  # fmt: skip
    finetune_gpt2.main(parse(FinetuneConfig, to_flags(flags | {"out": whole})))
    process = start("finetune_gpt2", to_flags(flags | {"out": out}), tmp_path / "output", pause=0.3)
    wait_for(process, lambda: len(lines(out)) == 4)
    process.kill()
    assert ended(process, tmp_path / "output")[0] == -signal.SIGKILL
    finetune_gpt2.main(parse(FinetuneConfig, to_flags(flags | {"out": out, "resume": True})))
    assert outcome(out) == outcome(whole) and len(lines(whole)) > 6


def reward_flags(home, out, **changes):
    """Return the flags of reward.py for two epochs, with dropout, from random weights."""
    flags = dict(
        dataset=home / "reviews.csv", init_from="scratch", out=out, vocab_size=300, hidden_size=32, num_layers=1,
        max_length=64, dropout=0.2, epochs=2, batch_size=32, lr=1e-3, eval_reviews=20, short_words=8, save_every=2,
        save_share=1, device="cpu", report_to="none",
    )  # fmt: skip
    return to_flags(flags | changes)


@pytest.fixture(scope="module")
def uninterrupted_reward(home):
    reward.main(parse(RewardConfig, reward_flags(home, home / "uninterrupted_reward")))
    return home / "uninterrupted_reward"


def test_reward_killed_in_its_second_epoch_and_resumed_equals_an_uninterrupted_run(
    home, uninterrupted_reward, tmp_path
):
    """Catches dropout, crops or the order of an epoch that depend on more than the seed and the step."""
    flags, steps = reward_flags(home, tmp_path / "out"), len(lines(uninterrupted_reward / "reward"))
    process = start("reward", flags, tmp_path / "output", pause=0.1)
    wait_for(process, lambda: len(lines(tmp_path / "out/reward")) == steps // 2 + 2)
    process.kill()
    assert ended(process, tmp_path / "output")[0] == -signal.SIGKILL
    assert int(latest_checkpoint(tmp_path / "out/reward").name) >= steps // 2
    reward.main(parse(RewardConfig, [*flags, "--resume", "True"]))
    assert outcome(tmp_path / "out") == outcome(uninterrupted_reward)


def test_reward_killed_in_the_judge_resumes_the_judge(home, uninterrupted_reward, tmp_path, monkeypatch, capsys):
    """Even if the folder has the judge of an earlier run, which must not be used instead."""
    shutil.copytree(uninterrupted_reward, tmp_path / "out")
    flags, write = reward_flags(home, tmp_path / "out", lr=2e-3), RunLog.write
    reward.main(parse(RewardConfig, [*flags, "--out", str(tmp_path / "whole")]))

    def kill_in(part):
        def killed(log, step, **metrics):
            if log.out.name == part and step == 5:
                raise Killed
            write(log, step, **metrics)

        monkeypatch.setattr(RunLog, "write", killed)

    for part, flag in (("reward", "--force"), ("judge", "--resume")):
        kill_in(part)
        with pytest.raises(Killed):
            reward.main(parse(RewardConfig, [*flags, flag, "True"]))
    kill_in("none")
    reward.main(parse(RewardConfig, [*flags, "--resume", "True"]))
    assert "the reward is already trained" in capsys.readouterr().out
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_reward_killed_in_the_judge_is_not_resumed_with_a_reward_of_other_texts(home, uninterrupted_reward, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted_reward, out)
    (out / "judge/results.json").unlink()
    results = json.loads((out / "reward/results.json").read_text())
    (out / "reward/results.json").write_text(json.dumps(results | {"data": "0123456789abcdef"}))
    with pytest.raises(BadInput, match="reward was trained on other texts: --force without --resume replaces the run"):
        reward.main(parse(RewardConfig, [*reward_flags(home, out), "--resume", "True"]))


# ---- signals and kills


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(home, uninterrupted, tmp_path, number, status):
    flags = ppo_flags(home, tmp_path / "out", save_every=6)
    process = start("ppo", flags, tmp_path / "output", pause=0.3)
    wait_for(process, lambda: len(lines(tmp_path / "out")) == 3)
    os.kill(process.pid, number)
    code, output = ended(process, tmp_path / "output")
    assert code == status and output[-1] == "stopped; --resume resumes the run"
    assert latest_checkpoint(tmp_path / "out").name == "00000003" and len(lines(tmp_path / "out")) == 3
    ppo.main(parse(PPOConfig, [*flags, "--resume", "True"]))
    log, weights = outcome(tmp_path / "out")
    assert log == outcome(uninterrupted)[0]
    assert weights["model.safetensors"] == outcome(uninterrupted)[1]["model.safetensors"]


def test_kills_at_random_moments_do_no_harm_to_a_run(home, uninterrupted, tmp_path):
    """With the save_every of `uninterrupted`, on which the best policy depends."""
    out = tmp_path / "out"
    assert len(list(soak.kill_runs(ppo_flags(home, out), out, uninterrupted, 3, random.Random(3))))


def test_kills_while_saving_leave_a_checkpoint_of_a_single_step(tmp_path):
    """Catches files that are written in place, and a checkpoint deleted before its successor is complete."""
    assert len(list(soak.kill_saves(tmp_path, 8, random.Random(1)))) == 8


# ---- a full disk


@pytest.fixture
def stopped(home, tmp_path):
    """(flags that resume it, folder) of a run of ppo.py that was killed in rollout 3, with a checkpoint of step 2."""
    with pytest.raises(Killed):
        train(home, tmp_path / "out", killed_in=3)
    return [*ppo_flags(home, tmp_path / "out"), "--resume", "True"], tmp_path / "out"


@pytest.mark.parametrize(
    ("limit", "problem"),
    [(300_000, "out/checkpoints was not written, its old files are kept: "), (3000, "the disk is full: ")],
)
def test_a_full_disk_ends_a_run_with_one_line_and_what_was_saved_is_complete(stopped, uninterrupted, limit, problem):
    """A file may have `limit` bytes: too few for a checkpoint, or for the log, whose last line is then incomplete."""
    flags, out = stopped
    code, output = ended(start("ppo", flags, f"{out}.txt", limit=limit), f"{out}.txt")
    assert code == 2
    assert [problem in line for line in output if "rror" in line] == [True], output
    assert "Traceback" not in "".join(output)
    assert latest_checkpoint(out).name == "00000002"
    assert not list(out.rglob(SAVING + "*"))
    ppo.main(parse(PPOConfig, flags))
    assert outcome(out) == outcome(uninterrupted)


def test_a_disk_that_is_full_when_the_tokenizer_is_saved_is_reported_in_one_line(home, tmp_path):
    """The tokenizers library raises a bare Exception, not an OSError."""
    flags = ppo_flags(home, tmp_path / "out")
    code, output = ended(start("ppo", flags, tmp_path / "output", limit=5000), tmp_path / "output")
    assert code == 2 and output[-1].startswith("error: ") and "out/best was not written" in output[-1]


# ---- damage


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_checkpoint_is_refused_with_the_file(tmp_path, file, damage):
    model, optimizer = toy(1)
    save_checkpoint(tmp_path, model, [optimizer], {"step": 1, "inputs": {}})
    path = latest_checkpoint(tmp_path) / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = message(load_checkpoint, path.parent, model, [optimizer])
    assert str(path) in text and ("is damaged or missing" in text or "cannot be read" in text)


def test_resuming_from_a_damaged_checkpoint_is_refused_in_one_line_with_status_2(stopped):
    flags, out = stopped
    with open(out / "checkpoints/00000002/tensors.safetensors", "r+b") as f:
        f.truncate(1000)
    code, output = ended(start("ppo", flags, f"{out}.txt"), f"{out}.txt")
    assert code == 2 and "00000002/tensors.safetensors is damaged or missing" in output[-1]
    assert "Traceback" not in "".join(output) and len(lines(out)) == 3


# ---- another config, different inputs, a finished run


def test_resuming_with_another_lr_needs_force(stopped, home):
    """The first two rollouts stay, those after them have the new lr."""
    flags, out = stopped
    text = message(ppo.main, parse(PPOConfig, [*flags, "--lr", "2e-3"]))
    assert "contains a run of another config (lr 0.001 -> 0.002): --force resumes it with this one" in text
    train(home, out, first=2, resume=True, force=True, lr=2e-3)
    rate = [1e-3, 1e-3 * 5 / 6, *(2e-3 * left / 6 for left in (4, 3, 2, 1))]
    assert [line["lr"] for line in lines(out)] == pytest.approx(rate)
    assert json.loads((out / "run_config.json").read_text())["lr"] == 2e-3


@pytest.mark.parametrize("script", [ppo, reward])
def test_a_finished_run_is_not_resumed(home, uninterrupted, uninterrupted_reward, script):
    flags = ppo_flags(home, uninterrupted) if script is ppo else reward_flags(home, uninterrupted_reward)
    cfg = parse(PPOConfig if script is ppo else RewardConfig, [*flags, "--resume", "True"])
    before = outcome(cfg.out)
    with pytest.raises(Finished, match=f"{cfg.out} contains a finished run: nothing is left to resume"):
        script.main(cfg)
    assert outcome(cfg.out) == before


def test_a_finished_run_is_replaced_only_by_force(home, uninterrupted, tmp_path):
    """Starting it again with the same flags changes nothing."""
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    flags = ppo_flags(home, out)
    assert message(ppo.main, parse(PPOConfig, flags)) == (
        f"{out} contains a finished run: --force replaces it, --out names another folder"
    )
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    ppo.main(parse(PPOConfig, [*flags, "--force"]))
    assert outcome(out) == outcome(uninterrupted)


def test_a_finished_reward_is_replaced_only_by_force(home, uninterrupted_reward):
    before = outcome(uninterrupted_reward)
    text = message(reward.main, parse(RewardConfig, reward_flags(home, uninterrupted_reward)))
    assert "contains a finished run: --force replaces it" in text and outcome(uninterrupted_reward) == before


def changed_inputs(home, folder):
    """Return {input: (other file or folder, the one that it replaces)} for runs whose inputs keep their names."""
    shutil.copytree(home, folder, dirs_exist_ok=True)
    policy = load_gpt2(*open_gpt2(str(folder / "gpt2"))[:2])
    policy.ln_f.bias.data += 0.5
    (folder / "other").mkdir()
    save_gpt2(policy, load_tokenizer(folder / "gpt2"), folder / "other")
    write_bert(folder / "judge", seed=1)
    (folder / "other.py").write_text((folder / "rewards.py").read_text() + "# another version\n")
    shutil.copytree(folder / "gpt2", folder / "heads")
    config = json.loads((folder / "gpt2/config.json").read_text())
    (folder / "heads/config.json").write_text(json.dumps(config | {"n_head": config["n_head"] * 2}))
    return {
        "policy": (folder / "other", folder / "gpt2"),
        "policy, in its config alone": (folder / "heads", folder / "gpt2"),
        "judge": (folder / "judge", folder / "bert"),
        "reward": (folder / "other.py", folder / "rewards.py"),
    }


@pytest.mark.parametrize("what", ["policy", "policy, in its config alone", "judge", "reward"])
def test_a_run_is_resumed_only_with_the_weights_reward_and_judge_that_it_had(home, tmp_path, what, capsys):
    """Otherwise a file replaced in between would, for example, change the reference of the KL silently."""
    files, out = changed_inputs(home, tmp_path / "home"), tmp_path / "out"
    with pytest.raises(Killed):
        train(tmp_path / "home", out, killed_in=3)
    new, old = files[what]
    if new.is_dir():
        shutil.rmtree(old)
    os.replace(new, old)
    flags = [*ppo_flags(tmp_path / "home", out), "--resume"]
    text, what = message(ppo.main, parse(PPOConfig, flags)), what.partition(",")[0]
    assert re.fullmatch(rf".*00000002 was made with different inputs: {what} \(\w+ then, \w+ now\)\. --force .*", text)
    ppo.main(parse(PPOConfig, [*flags, "--force"]))
    assert f"warning: resuming with different inputs: {what}" in capsys.readouterr().err and len(lines(out)) == 6


def test_a_classifier_is_resumed_only_with_the_teacher_that_it_had(home, uninterrupted_reward, tmp_path, monkeypatch):
    teacher = shutil.copytree(uninterrupted_reward, tmp_path / "teacher")
    flags = reward_flags(home, tmp_path / "out", teacher=teacher)
    write = RunLog.write
    monkeypatch.setattr(RunLog, "write", lambda log, step, **m: die() if step == 5 else write(log, step, **m))
    with pytest.raises(Killed):
        reward.main(parse(RewardConfig, flags))
    monkeypatch.setattr(RunLog, "write", write)
    shutil.copytree(uninterrupted_reward / "judge", teacher / "reward", dirs_exist_ok=True)
    text = message(reward.main, parse(RewardConfig, [*flags, "--resume"]))
    assert "was made with different inputs: teacher (" in text


def die():
    raise Killed


# ---- a reward function that raises


SERVER = """
from pathlib import Path
def score(texts):
    calls = Path(__file__).with_suffix(".calls")
    done = int(calls.read_text()) if calls.exists() else 0
    if done == 3 and len(texts) == 8:
        raise ConnectionError("server is down\\nreally")
    calls.write_text(str(done + (len(texts) == 8)))
    return [float(text.count("e")) for text in texts]
"""


def test_a_reward_function_that_raises_ends_the_run_with_one_line_and_a_checkpoint(home, uninterrupted, tmp_path):
    """Even if no checkpoint is due; the resumed run equals the uninterrupted one."""
    (tmp_path / "server.py").write_text(SERVER)
    flags = ppo_flags(home, tmp_path / "out", reward=f"{tmp_path}/server.py:score", save_every=6, save_share=0.05)
    code, output = ended(start("ppo", flags, tmp_path / "output"), tmp_path / "output")
    assert code == 2 and "Traceback" not in "".join(output)
    assert output[-1] == (
        f"error: reward {tmp_path}/server.py:score raised ConnectionError while scoring 8 texts, line 7: server is "
        "down. The run is saved: --resume resumes it at step 3, with --force if you changed the file of the reward"
    )
    assert latest_checkpoint(tmp_path / "out").name == "00000003" and len(lines(tmp_path / "out")) == 3
    (tmp_path / "server.calls").write_text("4")
    ppo.main(parse(PPOConfig, [*flags, "--resume"]))
    log, weights = outcome(tmp_path / "out")
    assert log == outcome(uninterrupted)[0]
    assert weights["model.safetensors"] == outcome(uninterrupted)[1]["model.safetensors"]


def test_a_reward_function_that_raises_again_after_resuming_loses_nothing(home, tmp_path):
    """The checkpoint of the failed step exists: it is not written again."""
    (tmp_path / "server.py").write_text(SERVER)
    cfg = parse(PPOConfig, ppo_flags(home, tmp_path / "out", reward=f"{tmp_path}/server.py:score", save_every=6))
    for resume in (False, True, True):
        assert "ConnectionError" in message(ppo.main, replace(cfg, resume=resume))
        assert latest_checkpoint(tmp_path / "out").name == "00000003"


# ---- leftovers


@pytest.mark.parametrize("first_step", [0, 2])
def test_leftovers_of_a_killed_run_are_removed_at_the_next_start(tmp_path, first_step):
    model = torch.nn.Linear(2, 2)
    save_checkpoint(tmp_path, model, [], {"step": 2})
    for folder in ("", "checkpoints", "best"):
        (tmp_path / folder / f"{SAVING}x").mkdir(parents=True)
    RunLog(PPOConfig(out=str(tmp_path), report_to="none"), first_step=first_step).close()
    assert not list(tmp_path.rglob(SAVING + "*")) and bool(latest_checkpoint(tmp_path)) == bool(first_step)


def test_checkpoints_of_an_earlier_run_are_deleted_before_the_new_config_is_written(tmp_path, monkeypatch):
    """Otherwise, after a kill in between, --resume would combine the weights of one run with the config of another."""
    save_checkpoint(tmp_path, torch.nn.Linear(2, 2), [], {"step": 2})
    cfg = PPOConfig(out=str(tmp_path), report_to="none", lr=1e-3)
    RunLog(cfg, first_step=2).close()
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        RunLog(replace(cfg, lr=2e-3))
    assert latest_checkpoint(tmp_path) is None
    assert check_run(replace(cfg, resume=True), "model.safetensors") is None
