"""Two processes that torchrun starts are one run: the same numbers, written once, ended together.

torchrun --standalone --nproc_per_node 2 tests/test_distributed.py FOLDER REVIEWS GPT2    # what most tests read
"""

import json
import os
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, message, reviews_csv
from test_ppo import MEASURED, FakeTokenizer, close, config, moved_policy, tiny_rollout, count_sevens, sgd, random_prompts, parameters, tiny_policy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import finetune_gpt2
import ppo
from config import FinetuneConfig, PPOConfig
from model import GPT2
from runtime import checkpoint
from runtime.cli import parse, run
from runtime.device import random_generator
from runtime.distributed import ONE_PROCESS, join
from runtime.errors import BadInput
from runtime.hub import load_gpt2, load_policy, open_gpt2
from runtime.log import RunLog
from runtime.monitor import rollout_metrics

CFG = config(ppo_epochs=2, vf_coef=1.0, micro_batch_size=2)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
COMMON = "--report_to none --save_share 1 --device cpu --lr 1e-3 --batch_size 8 --micro_batch_size 2"
PPO = f"{COMMON} --judge= --sample_prompts 0 --minibatch_size 4 --response_len 6 --save_every 1"
PPO += " --min_prompt_len 12 --max_prompt_len 12"
FINETUNE = f"{COMMON} --block_size 40 --epochs 0.15 --warmup_steps 2 --eval_every 5 --eval_tokens 500"

# ---- what both processes do, and one for comparison


def updated(ranks, hook=None):
    """Two epochs over a rollout with responses of unequal length: parameters and metrics."""
    policy = moved_policy()
    learner = ranks.learner(policy)
    if hook:
        learner.register_comm_hook(None, hook)
    cfg = config(ppo_epochs=2, vf_coef=1.0, micro_batch_size=2)  # two to a minibatch, an episode a process
    metrics = ppo.update(learner, sgd(policy, grad_clip=0.5), tiny_rollout(cfg), cfg, random_generator("cpu", 0), ranks)
    return {"parameters": parameters(policy), "metrics": metrics}


def fine_tuned(ranks):
    """A step on 8 blocks in micro-batches of 2: gradients and loss."""
    model, ids = tiny_policy().gpt2, torch.randint(12, (8, 11), generator=random_generator("cpu", 1))
    x, y, cfg = ranks.share(ids[:, :-1]), ranks.share(ids[:, 1:]), FinetuneConfig(batch_size=8, micro_batch_size=2)
    loss = finetune_gpt2.train_step(ranks.learner(model), x, y, cfg, ranks).item()
    return {"gradients": torch.cat([p.grad.flatten() for p in model.parameters()])} | ranks.mean({"loss": loss})


def played(ranks):
    policy, ref_policy, generator = moved_policy(), tiny_policy(1), random_generator("cpu", 1, ranks.rank)
    _, actor, ref_actor, reward_fn, _ = ranks.spread(policy, ref_policy, count_sevens, None)
    batch = ppo.rollout(actor, ref_actor, FakeTokenizer(), reward_fn, random_prompts(), CFG.kl_coef, CFG, generator)
    return vars(batch) | {"metrics": rollout_metrics(batch, policy, ref_policy, 0.0, CFG)}


def observe(owner, name):
    """The calls of owner's function from now on: a list of (arguments, result)."""
    function, calls = getattr(owner, name), []

    def observed(*args, **named):
        calls.append(((*args, named), function(*args, **named)))
        return calls[-1][1]

    setattr(owner, name, observed)
    return calls


def trained(cfg, reward):
    """What a process sees of ppo.main; the first prompts are the self-check's."""
    ppo.load_reward, calls = lambda *_: reward, observe(GPT2, "generate")
    written, batches, steppers = observe(RunLog, "write"), observe(ppo, "prompt_batch"), observe(ppo, "Stepper")
    ppo.main(cfg)
    return {
        "policy": parameters(steppers[0][0][0]),
        "prompts": [args[1] for args, _ in calls[1:]],
        "seeds": [args[5].initial_seed() for args, _ in calls[1:]],
        "batches": [prompts for _, prompts in batches[1:]],
        "log": [{k: v for k, v in args[-1].items() if k not in MEASURED} | {"step": args[1]} for args, _ in written],
    }


def worker(folder, data, gpt2):
    torch.set_default_dtype(torch.float64)
    ranks, exchanges, calls = join(torch.device("cpu"), CFG, "micro_batch_size"), [], count()

    def hook(group, bucket):
        exchanges.append(bucket.index())
        return allreduce_hook(group, bucket)

    def bad_at_step_1(texts):  # on rank 1 alone; the first call is the self-check's
        bad = (next(calls), ranks.rank) == (2, 1)
        return [float("nan") if bad else float(text.count("e")) for text in texts]

    def broken(texts):
        if ranks.rank == 1:
            raise BadInput("no opinion on these")
        return [1.0] * len(texts)

    scripts = ((checkpoint, "save_checkpoint"), (ppo, "save_gpt2"), (finetune_gpt2, "save_gpt2"))
    saves = [observe(module, name) for module, name in scripts]
    found = {"update": updated(ranks), "fine_tuned": fine_tuned(ranks), "rollout": played(ranks)}
    found["asked"] = ranks.any(15 * ranks.rank)
    updated(ranks, hook)
    torch.set_default_dtype(torch.float32)
    ppo.join = finetune_gpt2.join = lambda *_: ranks
    argv = f"--dataset {data} --out {folder}/ppo --policy {gpt2} --steps 3 {PPO}".split()
    found |= {"exchanges": exchanges, "main": trained(parse(PPOConfig, argv), bad_at_step_1)}
    argv = f"--dataset {data} --out {folder}/finetune --init_from {gpt2} {FINETUNE}".split()
    finetune_gpt2.main(parse(FinetuneConfig, argv))
    torch.save(found | {"saves": list(map(len, saves))}, f"{folder}/{ranks.rank}.pt")
    sys.argv[1:] = f"--dataset {data} --out {folder}/broken --policy {gpt2} --self_check False {PPO}".split()
    ppo.load_reward = lambda *_: broken
    run(ppo.main, PPOConfig)


# ---- the tests


def start(*command):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, *map(str, command)], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def steps(out):
    """The steps in the log of a run."""
    return [json.loads(line)["step"] for line in Path(out, "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return reviews_csv(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.fixture(scope="module")
def two(tmp_path_factory, data, gpt2_folder):
    """What the workers of both ranks found, what they printed, and how they ended."""
    folder = tmp_path_factory.mktemp("two")
    process = start(*TORCHRUN, __file__, folder, data, gpt2_folder)
    stdout, stderr = process.communicate(timeout=120)
    assert (folder / "1.pt").is_file(), stderr
    found, seconds = (
        [torch.load(folder / f"{rank}.pt") for rank in range(2)],
        time.time() - os.stat(folder / "1.pt").st_mtime,
    )
    return SimpleNamespace(folder=folder, found=found, out=stdout, err=stderr, rc=process.returncode, seconds=seconds)


@pytest.fixture
def one():
    """One process, in float64 as the workers are when they compare with it."""
    torch.set_default_dtype(torch.float64)
    yield ONE_PROCESS
    torch.set_default_dtype(torch.float32)


def test_two_processes_take_the_steps_of_one(one, two):
    """D1. Catches a mean of the processes' own means, which weighs short responses more; the gradient is clipped."""
    expected = updated(one)
    assert expected["metrics"]["grad_norm"] > 0.5
    for found in (rank["update"] for rank in two.found):
        assert close(found["parameters"], expected["parameters"], 1e-10)
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)  # some are float32 by construction


def test_two_processes_have_the_fine_tuning_gradient_of_one(one, two):
    """D1. Catches a sum over the processes."""
    expected = fine_tuned(one)
    for found in (rank["fine_tuned"] for rank in two.found):
        assert close(found["gradients"], expected["gradients"], 1e-10)
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-10)


def test_processes_exchange_gradients_once_an_optimizer_step(two):
    """D3. Catches a backward pass without no_sync: 8 exchanges. All gradients fit one bucket."""
    assert [rank["exchanges"] for rank in two.found] == [[0] * 4] * 2


def test_a_rollout_of_two_processes_is_what_one_finds_for_all_its_episodes(one, two):
    """D2. Catches advantages that each process whitens alone, and a KL or score of its own episodes only."""
    first, second = (rank["rollout"] for rank in two.found)
    policy = moved_policy()
    policy.gpt2.generate = lambda *_: first["sequences"]
    batch = tiny_rollout(CFG, policy)
    expected = vars(batch) | {"metrics": rollout_metrics(batch, policy, tiny_policy(1), 0.0, CFG)}
    for name in ("mask", "logprobs", "values", "advantages", "returns", "kl", "scores", "ended"):
        assert torch.equal(first[name], second[name]) and close(first[name], expected[name], 1e-12), name
    for name in set(expected["metrics"]) - MEASURED:
        assert first["metrics"][name] == second["metrics"][name] == pytest.approx(expected["metrics"][name], abs=1e-9)


def test_processes_stay_equal_to_the_bit_and_skip_the_same_step(two):
    """D2, D3. The reward was nan on rank 1 alone: catches a decision that a process takes on its own numbers."""
    first, second = (rank["main"] for rank in two.found)
    assert torch.equal(first["policy"], second["policy"]) and first["log"] == second["log"]
    assert [len(line) > 2 for line in first["log"]] == [True, False, True]  # a skipped step has no more than its number
    assert first["log"][2]["kl_coef"] != first["log"][0]["kl_coef"]


def test_processes_share_out_the_prompts_and_draw_other_answers(two):
    """D4. Catches processes that all answer the first prompts, and a seed that is the same for all."""
    first, second = (rank["main"] for rank in two.found)
    for ours, theirs, batch in zip(first["prompts"], second["prompts"], first["batches"]):
        assert torch.equal(torch.cat([ours, theirs]), batch) and len(batch.unique(dim=0)) == 2 * len(ours) == 8
    assert len({*first["seeds"], *second["seeds"]}) == 6


def test_only_rank_0_writes_and_prints(two):
    """D5. Catches lines said twice, two progress bars, and a log that two processes append to."""
    for line in ("step 0 | score", "step 1 is skipped", "the policy is in", "fine-tuning", "step 10 | validation"):
        assert sum(text.startswith(line) for text in two.out.splitlines()) == 1, line
    assert two.err.count("ppo:   0%|          | 0/3 [00:00<?, ?rollout/s]") == 1
    assert min(two.found[0]["saves"]) > 0 and two.found[1]["saves"] == [0, 0, 0]
    assert steps(two.folder / "ppo") == [0, 1, 2] and steps(two.folder / "finetune") == list(range(11))


def test_what_two_processes_trained_is_one_folder_that_loads(two):
    ppo_out, out = two.folder / "ppo", two.folder / "finetune"
    assert torch.equal(parameters(load_policy(*open_gpt2(str(ppo_out)))), two.found[0]["main"]["policy"])
    assert load_gpt2(*open_gpt2(str(out))[:2]).wte.weight.isfinite().all()
    files = "config.json log.jsonl model.safetensors results.json run_config.json tokenizer.json tokenizer_config.json"
    assert sorted(file.name for file in out.iterdir()) == files.split()
    results = json.loads((out / "results.json").read_text())
    assert results["after"]["perplexity"] < results["before"]["perplexity"] / 2


def test_a_signal_that_one_process_got_is_known_to_all(two):
    """D5. Catches a process that stops after this step while the other goes on and waits for it."""
    assert [rank["asked"] for rank in two.found] == [15, 15]


def test_an_error_on_one_rank_ends_all_with_its_message(two):
    """D5. Catches a rank that waits for the one that is gone."""
    assert two.rc and two.err.count("error on rank 1: no opinion on these") == 1 and two.seconds < 20


def test_a_stopped_run_of_two_processes_goes_on_in_one_that_never_imports_distributed(
    tmp_path, data, gpt2_folder, capsys
):
    """D5. torchrun passes SIGTERM on: both processes end after the same step, and it is saved."""
    (tmp_path / "slow.py").write_text(
        "import time\ndef e(texts):\n  time.sleep(.2)\n  return [t.count('e') for t in texts]"
    )
    out, reward = tmp_path / "out", f"{tmp_path / 'slow.py'}:e"
    flags = f"--dataset {data} --out {out} --policy {gpt2_folder} --reward {reward} {PPO} --steps".split()
    process = start(*TORCHRUN, "ppo.py", *flags, 400)
    while process.poll() is None and not ((out / "log.jsonl").is_file() and len(steps(out)) >= 2):
        time.sleep(0.1)
    process.terminate()
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode and stderr.count("stopped; --resume resumes the run") == 2, stderr
    done = steps(out)
    assert done == list(range(len(done))) and 2 <= len(done) < 400
    sys.modules.pop("distributed", None)
    ppo.main(parse(PPOConfig, [*flags, str(len(done) + 1), "--resume", "True", "--force", "True"]))
    assert f"resuming from {out / 'checkpoints'}" in capsys.readouterr().out and steps(out) == [*done, len(done)]
    assert "distributed" not in sys.modules


def test_rows_that_the_processes_cannot_share_evenly_are_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("distributed.Processes", lambda device: SimpleNamespace(size=3))
    said = message(join, torch.device("cpu"), CFG, "batch_size")
    assert said == "batch_size 8 cannot be shared evenly by 3 processes"


def test_a_process_without_the_checkpoint_that_another_goes_on_from_ends_the_run(tmp_path):
    """Folders of two machines that are not one: catches loops of different lengths, which wait for each other."""
    ranks = SimpleNamespace(any=lambda step: max(step, 3))
    said = message(checkpoint.Checkpoints, config(resume=True), tmp_path, None, [], {"inputs": {}}, ranks)
    assert said == f"another process resumes from a checkpoint that is not in {tmp_path}: share that folder"


def test_several_processes_are_on_a_twentieth_of_the_lines_of_ppo_at_most():
    lines = (ROOT / "ppo.py").read_text().splitlines()
    assert 0 < sum("rank" in line for line in lines) <= len(lines) / 20


if __name__ == "__main__":
    worker(*sys.argv[1:])
