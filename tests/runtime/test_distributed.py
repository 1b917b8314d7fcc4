"""Two processes started by torchrun are one run: the same numbers, written once, and they end together.

torchrun --standalone --nproc_per_node 2 tests/runtime/test_distributed.py FOLDER REVIEWS GPT2    # for most tests
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import fields
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, message, reviews_csv
from test_ppo import (
    MEASURED,
    FakeTokenizer,
    close,
    config,
    count_sevens,
    moved_policy,
    parameters,
    random_prompts,
    tiny_policy,
    tiny_rollout,
)

import dpo
import evaluate
import finetune_gpt2
import generate
import ppo
import reward
from config import DPOConfig, EvaluateConfig, FinetuneConfig, GenerateConfig, PPOConfig, RewardConfig, defaults
from model import GPT2
from runtime import checkpoint, monitor
from runtime.cli import parse, run
from runtime.device import random_generator
from runtime.distributed import ONE_PROCESS, join
from runtime.errors import BadInput
from runtime.hub import load_gpt2, load_policy, open_gpt2
from runtime.log import RunLog, read_lines
from runtime.monitor import rollout_metrics
from runtime.optimizer import Stepper

CFG = config(ppo_epochs=2, vf_coef=1.0, micro_batch_size=2)  # two micro-batches per minibatch, an episode per process
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
COMMON = "--report_to none --save_share 1 --device cpu --lr 1e-3 --batch_size 8 --micro_batch_size 2"
PPO = f"{COMMON} --judge= --self_check False --sample_prompts 0 --minibatch_size 4 --response_len 6 --save_every 1"
PPO += " --min_prompt_len 12 --max_prompt_len 12"
FINETUNE = f"{COMMON} --block_size 40 --epochs 0.15 --warmup_steps 2 --eval_every 5 --eval_tokens 500"

# ---- what both processes compute, and one process for comparison


def stepper(model, ranks):
    return Stepper(model, [torch.optim.SGD(model.parameters(), 0.1)], 0.5, ranks)


def update(ranks):
    """Update a policy for two epochs on a rollout with responses of different lengths: parameters and metrics."""
    policy = moved_policy()
    metrics = ppo.update(policy, stepper(policy, ranks), tiny_rollout(CFG), CFG, random_generator("cpu", 0), ranks)
    return {"parameters": parameters(policy), "metrics": metrics}


def fine_tune(ranks):
    """Take an optimizer step on 8 blocks in micro-batches of 2: parameters, loss and norm of the gradient."""
    model, ids = tiny_policy().gpt2, torch.randint(12, (8, 11), generator=random_generator("cpu", 1))
    x, y, cfg = ranks.share(ids[:, :-1]), ranks.share(ids[:, 1:]), FinetuneConfig(batch_size=8, micro_batch_size=2)
    step = stepper(model, ranks)
    loss = finetune_gpt2.train_step(step, x, y, cfg).item()
    norm = step.step()
    return {"parameters": parameters(model), "loss": ranks.mean({"loss": loss})["loss"], "norm": norm}


def overflow(ranks):
    """Take two steps in float16; in the first one, the gradient of process 1 is infinite: scales and weights."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    half, seen = Stepper(model, [torch.optim.SGD(model.parameters(), 0.1)], 9.0, ranks, torch.float16), []
    for gradient in (math.inf if ranks.rank else 1.0, 1.0 + 2 * ranks.rank):
        half.backward(gradient * model.weight.sum())
        half.step()
        seen.append((half.scaler.get_scale(), half.skipped, round(model.weight.item(), 6)))
    return seen


def rollout(ranks):
    policy, ref_policy, rng = moved_policy(), tiny_policy(1), random_generator("cpu", 1, ranks.rank)
    args = policy, ref_policy, FakeTokenizer(), count_sevens, random_prompts(), CFG.kl_coef, CFG, rng
    batch = ppo.rollout(*args, ranks=ranks)
    return vars(batch) | {"metrics": rollout_metrics(batch, policy, ref_policy, 0.0, CFG)}


def attempt(ranks):
    """Return the error in each process after a function failed in process 1 alone."""

    def fail():
        if ranks.rank == 1:
            raise BadInput("no such file")

    try:
        ranks.attempt(fail)
    except BadInput as error:
        return str(error)
    return None


def record(owner, name):
    """Replace a function of owner; return the list of its later calls: (arguments, result)."""
    function, calls = getattr(owner, name), []

    def recorded(*args, **named):
        calls.append(((*args, named), function(*args, **named)))
        return calls[-1][1]

    setattr(owner, name, recorded)
    return calls


def train(cfg, reward_fn):
    """Run ppo.main; return what this process sees of it."""
    reward_fn.truncated_frac = 0.0
    ppo.load_rewards = lambda *_: (reward_fn, None)
    batches, generated = record(ppo, "prompt_batch"), record(GPT2, "generate")
    written, steppers = record(RunLog, "write"), record(ppo, "Stepper")
    ppo.main(cfg)
    return {
        "parameters": parameters(steppers[0][0][0]),
        "prompts": [args[1] for args, _ in generated],
        "seeds": [args[5].initial_seed() for args, _ in generated],
        "batches": [prompts for _, prompts in batches[1:]],  # the first one is for the self-check
        "log": [{k: v for k, v in args[-1].items() if k not in MEASURED} | {"step": args[1]} for args, _ in written],
    }


def worker(folder, data, gpt2):
    torch.set_default_dtype(torch.float64)
    ranks, calls = join(torch.device("cpu"), CFG), count()

    def nan_on_rank_1(texts):  # in step 1
        is_nan = (next(calls), ranks.rank) == (1, 1)
        return [float("nan") if is_nan else float(text.count("e")) for text in texts]

    def broken_on_rank_1(texts):  # from step 2 on
        if ranks.rank == 1 and next(calls) == 2:
            raise BadInput("the server is down")
        return [float(text.count("e")) for text in texts]

    saving = ((checkpoint, "save_checkpoint"), (monitor, "save_gpt2"), (finetune_gpt2, "save_gpt2"))
    saves = [record(module, name) for module, name in saving]
    results = {"fine_tune": fine_tune(ranks), "rollout": rollout(ranks), "attempt": attempt(ranks)}
    results["any"] = ranks.any(15 * ranks.rank)
    results["overflow"] = overflow(ranks)
    exchanges = record(torch.distributed, "all_reduce")
    results |= {"update": update(ranks), "exchanges": len(exchanges)}
    torch.set_default_dtype(torch.float32)
    ppo.join = finetune_gpt2.join = lambda *_: ranks
    argv = f"--dataset {data} --out {folder}/ppo --policy {gpt2} --steps 3 {PPO}".split()
    results["main"] = train(parse(PPOConfig, argv), nan_on_rank_1)
    argv = f"--dataset {data} --out {folder}/finetune --init_from {gpt2} {FINETUNE}".split()
    finetune_gpt2.main(parse(FinetuneConfig, argv))
    torch.save(results | {"saves": list(map(len, saves))}, f"{folder}/{ranks.rank}.pt")
    sys.argv[1:], calls = f"--dataset {data} --out {folder}/broken --policy {gpt2} {PPO}".split(), count()
    broken_on_rank_1.truncated_frac = 0.0
    ppo.load_rewards = lambda *_: (broken_on_rank_1, None)
    run(ppo.main, PPOConfig)


# ---- the tests


def start(*command):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command, pipe = [sys.executable, *map(str, command)], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def steps(out):
    """Return the steps in the log of a run."""
    return [line["step"] for line in read_lines(Path(out, "log.jsonl"))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return reviews_csv(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.fixture(scope="module")
def two(tmp_path_factory, data, gpt2_folder):
    """What the workers of both ranks computed and printed, and how they ended."""
    folder = tmp_path_factory.mktemp("two")
    process = start(*TORCHRUN, __file__, folder, data, gpt2_folder)
    stdout, stderr = process.communicate(timeout=120)
    assert (folder / "1.pt").is_file(), stderr
    seconds = time.time() - os.stat(folder / "1.pt").st_mtime
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return SimpleNamespace(
        folder=folder, results=results, out=stdout, err=stderr, status=process.returncode, seconds=seconds
    )


@pytest.fixture
def one():
    """One process, in float64 like the workers that are compared with it."""
    torch.set_default_dtype(torch.float64)
    yield ONE_PROCESS
    torch.set_default_dtype(torch.float32)


def test_an_update_by_two_processes_equals_that_by_one(one, two):
    """Catches a mean of the processes' means, in which tokens of short responses count more. Gradients are clipped."""
    expected = update(one)
    assert expected["metrics"]["grad_norm"] > 0.5
    for result in (rank["update"] for rank in two.results):
        assert close(result["parameters"], expected["parameters"], 1e-10)
        for name in set(expected["metrics"]) - MEASURED:  # some are computed in float32
            assert result["metrics"][name] == pytest.approx(expected["metrics"][name], abs=1e-6), name


def test_a_fine_tuning_step_by_two_processes_equals_that_by_one(one, two):
    """Catches a sum of gradients over the processes instead of their mean."""
    expected = fine_tune(one)
    for result in (rank["fine_tune"] for rank in two.results):
        assert close(result["parameters"], expected["parameters"], 1e-10)
        assert (result["loss"], result["norm"]) == pytest.approx((expected["loss"], expected["norm"]), abs=1e-10)


def test_an_overflow_of_one_process_in_float16_skips_the_step_of_all_and_halves_their_scales(two):
    """The second step is taken: its mean gradient is 2."""
    assert [rank["overflow"] for rank in two.results] == 2 * [[(2.0**15, 1, 1.0), (2.0**15, 1, 0.8)]]


def test_gradients_are_averaged_once_per_optimizer_step(two):
    """Two epochs of two minibatches of two micro-batches: 4 steps, 8 backward passes."""
    assert [rank["exchanges"] for rank in two.results] == [4, 4]


def test_a_rollout_by_two_processes_equals_that_by_one(one, two):
    """Catches advantages that are whitened per process, and a KL or a score of a process's own episodes."""
    first, second = (rank["rollout"] for rank in two.results)
    policy = moved_policy()
    policy.gpt2.generate = lambda *_: first["sequences"]
    batch = tiny_rollout(CFG, policy)
    expected = vars(batch) | {"metrics": rollout_metrics(batch, policy, tiny_policy(1), 0.0, CFG)}
    for name in ("mask", "logprobs", "values", "advantages", "returns", "kl", "scores", "objective", "ended"):
        assert torch.equal(first[name], second[name]) and close(first[name], expected[name], 1e-12), name
    assert first["texts"] == second["texts"] == expected["texts"]
    for name in set(expected["metrics"]) - MEASURED:
        assert first["metrics"][name] == second["metrics"][name] == pytest.approx(expected["metrics"][name], abs=1e-9)


def test_processes_stay_equal_to_the_bit_and_skip_the_same_step(two):
    """The reward was nan on rank 1 alone. Catches a decision that depends on a process's own numbers."""
    first, second = (rank["main"] for rank in two.results)
    assert torch.equal(first["parameters"], second["parameters"]) and first["log"] == second["log"]
    assert [len(line) > 2 for line in first["log"]] == [True, False, True]  # a skipped step has two fields
    assert first["log"][2]["kl_coef"] != first["log"][0]["kl_coef"]


def test_processes_divide_the_prompts_and_sample_with_different_seeds(two):
    """Catches processes that all respond to the first prompts, or with the same random numbers."""
    first, second = (rank["main"] for rank in two.results)
    assert len(first["prompts"]) == len(first["batches"]) == 3
    for part, other_part, batch in zip(first["prompts"], second["prompts"], first["batches"]):
        assert torch.equal(torch.cat([part, other_part]), batch) and len(batch.unique(dim=0)) == 2 * len(part) == 8
    assert len({*first["seeds"], *second["seeds"]}) == 6


def test_only_rank_0_writes_and_prints(two):
    """Catches lines printed twice, two progress bars, and a log that two processes append to."""
    end = f"the policy is in {two.folder}/ppo"
    for text in ("step 2 | score", "step 1 is skipped", end, "fine-tuning", "step 10 | validation"):
        assert sum(line.startswith(text) for line in two.out.splitlines()) == 1, text
    assert two.err.count("ppo:   0%|          | 0/3 [00:00<?, ?rollout/s]") == 1
    assert min(two.results[0]["saves"]) > 0 and two.results[1]["saves"] == [0, 0, 0]
    assert steps(two.folder / "ppo") == [0, 1, 2] and steps(two.folder / "finetune") == list(range(11))


def test_the_model_trained_by_two_processes_is_one_folder_that_can_be_loaded(two):
    ppo_out, out = two.folder / "ppo", two.folder / "finetune"
    assert torch.equal(parameters(load_policy(*open_gpt2(str(ppo_out)))), two.results[0]["main"]["parameters"])
    assert load_gpt2(*open_gpt2(str(out))[:2]).wte.weight.isfinite().all()
    files = "config.json log.jsonl model.safetensors results.json run_config.json tokenizer.json tokenizer_config.json"
    assert sorted(file.name for file in out.iterdir()) == files.split()
    results = json.loads((out / "results.json").read_text())
    assert results["after"]["perplexity"] < results["before"]["perplexity"] / 2


def test_a_signal_received_by_one_process_is_known_to_all(two):
    """Catches a process that stops after this step while the other one continues and waits for it."""
    assert [rank["any"] for rank in two.results] == [15, 15]


def test_an_attempt_that_fails_in_one_process_raises_in_all(two):
    assert [rank["attempt"] for rank in two.results] == [
        "another process ended with an error, see its message",
        "no such file",
    ]


def test_an_error_of_the_reward_on_one_rank_ends_all_with_its_message_and_a_checkpoint(two):
    """Catches a process that waits for one that has ended, and a checkpoint that the failing rank alone would write."""
    hint = r"\. The run is saved: --resume resumes it at step 2, "
    assert two.status and two.seconds < 20
    assert len(re.findall(rf"error on rank 1: the server is down{hint}", two.err)) == 1
    assert (
        len(re.findall(rf"error on rank 0: another process ended with an error, see its message{hint}", two.err)) == 1
    )
    assert checkpoint.latest_checkpoint(two.folder / "broken").name == "00000002" and steps(two.folder / "broken") == [
        0,
        1,
    ]


def test_a_run_of_two_processes_that_was_stopped_is_resumed_by_one(tmp_path, data, gpt2_folder, capsys):
    """torchrun forwards SIGTERM: both processes end after the same step, which is saved."""
    (tmp_path / "slow.py").write_text(
        "import time\ndef e(texts):\n  time.sleep(.2)\n  return [t.count('e') for t in texts]"
    )
    out, reward = tmp_path / "out", f"{tmp_path / 'slow.py'}:e"
    flags = f"--dataset {data} --out {out} --policy {gpt2_folder} --reward {reward} {PPO} --steps".split()
    process = start(*TORCHRUN, "ppo.py", *flags, 400)
    while process.poll() is None and len(steps(out)) < 2:
        time.sleep(0.1)
    process.terminate()
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode and stderr.count("stopped; --resume resumes the run") == 2, stderr
    done = steps(out)
    assert done == list(range(len(done))) and 2 <= len(done) < 400
    ppo.main(parse(PPOConfig, [*flags, str(len(done) + 1), "--resume", "--force"]))
    assert f"resuming from {out / 'checkpoints'}" in capsys.readouterr().out and steps(out) == [*done, len(done)]


@pytest.mark.parametrize(
    ("script", "cls"),
    [(reward, RewardConfig), (dpo, DPOConfig), (evaluate, EvaluateConfig), (generate, GenerateConfig)],
)
def test_scripts_for_one_process_refuse_several(script, cls, monkeypatch):
    """They would all write into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = message(script.main, defaults(cls, "mini"))
    assert text == f"{script.__name__}.py runs in one process: start it with python, not with torchrun"


@pytest.mark.parametrize("cls", [PPOConfig, FinetuneConfig])
@pytest.mark.parametrize("name", ["batch_size", "minibatch_size", "micro_batch_size"])
def test_rows_that_cannot_be_divided_among_the_processes_are_refused(monkeypatch, cls, name):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("runtime.distributed.Processes", lambda device: SimpleNamespace(size=3))
    sizes = {f.name: 12 for f in fields(cls) if f.name in ("batch_size", "minibatch_size", "micro_batch_size")}
    assert join(torch.device("cpu"), cls(**sizes)).size == 3
    if name in sizes:
        text = message(join, torch.device("cpu"), SimpleNamespace(**(sizes | {name: 4})))
        assert text == f"{name} 4 is not divisible by the number of processes, 3"


def test_a_process_without_the_checkpoint_from_which_another_resumes_ends_the_run(tmp_path):
    """On two machines without a shared folder. Catches loops of different lengths, which wait for each other."""
    ranks, model = SimpleNamespace(any=lambda step: max(step, 3)), torch.nn.Linear(1, 1)
    text = message(checkpoint.Checkpoints, config(resume=True), tmp_path, model, [], {}, {}, ranks)
    assert text == f"another process resumes from a checkpoint that is not in {tmp_path}: share that folder"


def test_at_most_a_twentieth_of_the_lines_of_ppo_use_other_processes():
    lines = (ROOT / "ppo.py").read_text().splitlines()
    assert 0 < sum(bool(re.search(r"\branks\.|\bjoin\(", line)) for line in lines) <= len(lines) / 20


if __name__ == "__main__":
    worker(*sys.argv[1:])
