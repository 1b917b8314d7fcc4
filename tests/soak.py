"""Kill -9 at random moments, many times: what is saved must be complete, and the result equal to an uninterrupted run.

    python tests/soak.py [N]    # N kills of saves and N of a run of ppo.py, 50 by default; exit status 1 on a failure

test_resume.py does the same with a few kills. A run is forked from a server process that has imported the
slow modules and computed nothing, so that it starts in a tenth of the time.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from conftest import TEXTS, hf_gpt2, reviews_csv, train_bpe, write_bert
from tqdm import tqdm

from config import FinetuneConfig, PPOConfig, RewardConfig
from runtime.checkpoint import (
    CHECKPOINTS,
    STATE,
    TENSORS,
    latest_checkpoint,
    load_checkpoint,
    read_file,
    read_json,
    remove_leftovers,
    save_checkpoint,
)
from runtime.cli import run
from runtime.log import RunLog, read_lines

CONFIGS = {"ppo": PPOConfig, "reward": RewardConfig, "finetune_gpt2": FinetuneConfig}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["datasets", "safetensors.torch", "transformers.models.auto.tokenization_auto"]
    + ["transformers.models.bert.modeling_bert", "transformers.models.auto.modeling_auto"]
)
REWARDS = """
import torch
def letters(texts):
    return torch.tensor([float(text.count("e")) for text in texts])
def late(texts, calls=[]):
    calls += [0] * (len(texts) == 8)
    return letters(texts) * (1 if len(calls) == 1 else float("nan"))
"""


def start(script, flags, output, pause=0.0, limit=None):
    """Start a script with flags as a process that prints to the file `output`.

    pause: seconds to wait after each step. limit: the most bytes that a file may have, to simulate a full disk.
    """
    process = FORKS.Process(target=_script, args=(script, flags, output, pause, limit), daemon=True)
    process.start()
    return process


def _script(script, flags, output, pause, limit):
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(write_through=False)  # buffered as in a pipe, also if PYTHONUNBUFFERED is set
    tqdm.set_lock(threading.RLock())  # the default lock would survive a process that is killed
    write = RunLog.write
    RunLog.write = lambda *args, **metrics: write(*args, **metrics) or time.sleep(pause)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [script, *flags]
    run(importlib.import_module(script).main, CONFIGS[script])


def wait_for(process, condition):
    """Wait until condition() holds; fail if the process ends earlier."""
    while not condition():
        assert process.is_alive(), f"the process ended with status {process.exitcode} before it could be stopped"
        time.sleep(0.005)


def small_files(home):
    """Write a tiny GPT-2, a tiny BERT, reviews and rewards to a folder; return it."""
    tokenizer = train_bpe(TEXTS, 300)
    hf_gpt2(len(tokenizer)).float().save_pretrained(home / "gpt2")
    tokenizer.save_pretrained(home / "gpt2")
    write_bert(home / "bert")
    reviews_csv(home / "reviews.csv")
    (home / "rewards.py").write_text(REWARDS)
    return home


def ppo_flags(home, out, **changes):
    """Return the flags of ppo.py for a short run on small_files, with everything adaptive turned on."""
    flags = dict(
        dataset=home / "reviews.csv", policy=home / "gpt2", reward=f"{home}/rewards.py:letters", judge=home / "bert",
        self_check=False, out=out, steps=6, batch_size=8, minibatch_size=4, micro_batch_size=2, response_len=6,
        max_prompt_len=4, kl_target=0.5, kl_horizon=100, lr=1e-3, lr_end=0.0, alarm_window=4, save_every=2,
        save_share=1, device="cpu", report_to="none",
    )  # fmt: skip
    return to_flags(flags | changes)


def to_flags(values):
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def outcome(out):
    """Return what is bitwise equal in two equal runs: the logs without their times, and the weights."""
    times = ("tokens_per_second", "peak_memory_gb")
    log, weights = {}, {}
    for file in sorted(Path(out).rglob("*")):
        name = file.relative_to(out).as_posix()
        if file.suffix == ".jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            log[name] = [
                {key: value for key, value in line.items() if key not in times and not key.startswith("seconds")}
                for line in lines
            ]
        elif file.suffix == ".safetensors":
            weights[name] = file.read_bytes()
    return log, weights


def check_complete(out):
    """Read the checkpoints from which a run may resume, the latest two."""
    for folder in sorted((Path(out) / CHECKPOINTS).glob("[0-9]*"))[-2:]:
        assert read_json(folder / STATE) and dict(read_file(folder / TENSORS))


def kill_runs(flags, out, uninterrupted, kills, rng):
    """Kill ppo.py with these flags at random moments and check what is saved; finally let it end. Yield what happened.

    A run that finishes before it is killed must equal the uninterrupted one; then a new one is started.
    """
    out = Path(out)
    for number in range(1, kills + 2):
        process = start("ppo", [*flags, "--resume", "True"], f"{out}.txt")
        process.join(rng.uniform(0.2, 3.0) if number <= kills else None)
        process.kill()
        process.join()
        assert process.exitcode == 0 or number <= kills and process.exitcode == -9, Path(f"{out}.txt").read_text()
        check_complete(out)
        if (out / "model.safetensors").is_file() and not (out / CHECKPOINTS).is_dir():
            remove_leftovers(out)  # left by a kill while the checkpoints were being deleted
            differing = differences(outcome(out), outcome(uninterrupted))
            assert not differing, f"{out} differs from {uninterrupted}: {differing}"
            shutil.rmtree(out)
            yield f"run {number}: finished, equal to the uninterrupted one"
        else:
            step = latest_checkpoint(out)
            yield f"run {number}: killed in step {len(read_lines(out / 'log.jsonl'))}, saved at {step and step.name}"


def differences(first, second):
    """Return what differs between two outcomes: names of files, and for a log its first differing line in both."""
    differing = []
    for files, others in zip(first, second):
        for name in sorted(files.keys() | others.keys()):
            file, other = files.get(name), others.get(name)
            if file != other and isinstance(file, list) and isinstance(other, list):
                differing += [name, *next(pair for pair in itertools.zip_longest(file, other) if pair[0] != pair[1])]
            elif file != other:
                differing.append(name)
    return differing


def toy(fill):
    """Return a model and its optimizer, with all weights and moments equal to one number."""
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(300)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for tensor in tensors_of(model, optimizer):
            tensor.fill_(fill)
    return model, optimizer


def tensors_of(model, optimizer):
    return [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]


def _save_forever(out):
    latest = latest_checkpoint(out)
    for step in itertools.count(int(latest.name) + 1 if latest else 1):
        model, optimizer = toy(step)
        save_checkpoint(out, model, [optimizer], {"step": step, "inputs": {}})


def kill_saves(out, kills, rng):
    """Kill a process that only saves, at random moments; a checkpoint must be of a single step. Yield what happened."""
    done = 0
    for number in range(1, kills + 1):
        process = FORKS.Process(target=_save_forever, args=(out,), daemon=True)
        process.start()
        wait_for(process, lambda: (latest := latest_checkpoint(out)) and int(latest.name) > done)  # noqa: B023
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        check_complete(out)
        model, optimizer = toy(-1)
        step = load_checkpoint(latest_checkpoint(out), model, [optimizer])["step"]
        assert all((tensor == step).all() for tensor in tensors_of(model, optimizer)) and step > done
        done = step
        yield f"save {number}: killed, checkpoint {step} is complete"


def main(kills):
    rng = random.Random(0)
    home = small_files(Path(tempfile.mkdtemp()))
    first = start("ppo", ppo_flags(home, home / "uninterrupted", steps=40, save_every=1), home / "uninterrupted.txt")
    first.join()
    assert first.exitcode == 0, (home / "uninterrupted.txt").read_text()
    flags = ppo_flags(home, home / "killed", steps=40, save_every=1)
    (home / "saves").mkdir()
    saves = kill_saves(home / "saves", kills, rng)
    for event in itertools.chain(saves, kill_runs(flags, home / "killed", home / "uninterrupted", kills, rng)):
        print(event, flush=True)
    shutil.rmtree(home)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
