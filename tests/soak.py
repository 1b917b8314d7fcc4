"""Kill -9 at random moments, again and again: what is saved must be whole, and the end as if nothing had happened.

    python tests/soak.py [N]    # N kills of saves and N of a run of ppo.py, 50 if not told; 1 when any did harm

test_resume.py does the same with a few kills. A run is a process of its own, forked from a server that has imported
all that is slow and computed nothing, so that it starts in a tenth of the time.
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
    check_sums,
    latest_checkpoint,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from runtime.cli import run
from runtime.log import RunLog, read_lines

CONFIGS = {"ppo": PPOConfig, "reward": RewardConfig, "finetune_gpt2": FinetuneConfig}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tyro", "datasets", "safetensors.torch", "transformers.models.auto.tokenization_auto"]
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


def start(script, flags, told, pause=0.0, limit=None):
    """A script with flags as a process; what it prints goes to the file `told`.

    pause: seconds that every step lasts longer. limit: the most bytes that a file may have, which is how a test fills
    a disk.
    """
    process = FORKS.Process(target=_script, args=(script, flags, told, pause, limit), daemon=True)
    process.start()
    return process


def _script(script, flags, told, pause, limit):
    output = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tqdm.set_lock(threading.RLock())  # its own would outlive a process that is killed
    write = RunLog.write
    RunLog.write = lambda *args, **metrics: write(*args, **metrics) or time.sleep(pause)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [script, *flags]
    run(importlib.import_module(script).main, CONFIGS[script])


def wait_for(process, condition):
    """Wait until condition() holds; the process must be alive then."""
    while not condition():
        assert process.is_alive(), f"it ended with status {process.exitcode} before it could be stopped"
        time.sleep(0.005)


def small_files(home):
    """Write a tiny GPT-2, a tiny BERT, reviews and rewards into a folder; returns it."""
    tokenizer = train_bpe(TEXTS, 300)
    hf_gpt2(len(tokenizer)).float().save_pretrained(home / "gpt2")
    tokenizer.save_pretrained(home / "gpt2")
    write_bert(home / "bert")
    reviews_csv(home / "reviews.csv")
    (home / "rewards.py").write_text(REWARDS)
    return home


def ppo_flags(home, out, **changes):
    """Flags of ppo.py for a short run on small_files, adaptive in all that can be."""
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
    """All that two runs have in common which are the same to the bit: the log but for its clocks, and the weights."""
    clocks = ("tokens_per_second", "peak_memory_gb")
    log, weights = {}, {}
    for file in sorted(Path(out).rglob("*")):
        name = file.relative_to(out).as_posix()
        if file.suffix == ".jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            log[name] = [
                {key: value for key, value in line.items() if key not in clocks and not key.startswith("seconds")}
                for line in lines
            ]
        elif file.suffix == ".safetensors":
            weights[name] = file.read_bytes()
    return log, weights


def check_whole(out):
    """The checkpoints that a run may go on from, the latest two, are whole."""
    for folder in sorted((Path(out) / CHECKPOINTS).glob("[0-9]*"))[-2:]:
        check_sums(folder)


def kill_runs(flags, out, unbroken, kills, rng):
    """Kill ppo.py with these flags at random moments, and check what is there; at last let it end. Yields news.

    A run that is whole before its kill must be the unbroken one, and begins anew.
    """
    out = Path(out)
    for number in range(1, kills + 2):
        process = start("ppo", [*flags, "--resume", "True"], f"{out}.txt")
        process.join(rng.uniform(0.2, 3.0) if number <= kills else None)
        process.kill()
        process.join()
        assert process.exitcode == 0 or number <= kills and process.exitcode == -9, Path(f"{out}.txt").read_text()
        check_whole(out)
        if (out / "model.safetensors").is_file() and not (out / CHECKPOINTS).is_dir():
            remove_leftovers(out)  # a kill while the checkpoints were deleted leaves some
            differ = differences(outcome(out), outcome(unbroken))
            assert not differ, f"{out} is not {unbroken}: {differ}"
            shutil.rmtree(out)
            yield f"run {number}: whole"
        else:
            step = latest_checkpoint(out)
            yield f"run {number}: killed in step {len(read_lines(out / 'log.jsonl'))}, at {step and step.name}"


def differences(found, expected):
    """What differs between two outcomes: names of files, and of a log its first line that is another, both of them."""
    told = []
    for files, wanted in zip(found, expected):
        for name in sorted(files.keys() | wanted.keys()):
            file, other = files.get(name), wanted.get(name)
            if file != other and isinstance(file, list) and isinstance(other, list):
                told += [name, *next(pair for pair in itertools.zip_longest(file, other) if pair[0] != pair[1])]
            elif file != other:
                told.append(name)
    return told


def toy(fill):
    """A model and its optimizer, every weight and every moment of them one number."""
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(300)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for tensor in numbers(model, optimizer):
            tensor.fill_(fill)
    return model, optimizer


def numbers(model, optimizer):
    return [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]


def _save_on_and_on(out):
    latest = latest_checkpoint(out)
    for step in itertools.count(int(latest.name) + 1 if latest else 1):
        model, optimizer = toy(step)
        save_checkpoint(out, model, [optimizer], {"step": step, "inputs": {}})


def kill_saves(out, kills, rng):
    """Kill a process that does nothing but save, at random moments; what loads must be of one step. Yields news."""
    done = 0
    for number in range(1, kills + 1):
        process = FORKS.Process(target=_save_on_and_on, args=(out,), daemon=True)
        process.start()
        wait_for(process, lambda: (latest := latest_checkpoint(out)) and int(latest.name) > done)  # noqa: B023
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        check_whole(out)
        model, optimizer = toy(-1)
        step = load_checkpoint(latest_checkpoint(out), model, [optimizer], {})["step"]
        assert all((tensor == step).all() for tensor in numbers(model, optimizer)) and step > done
        done = step
        yield f"save {number}: killed, {step} is whole"


def main(kills):
    rng = random.Random(0)
    home = small_files(Path(tempfile.mkdtemp()))
    first = start("ppo", ppo_flags(home, home / "unbroken", steps=40, save_every=1), home / "unbroken.txt")
    first.join()
    assert first.exitcode == 0, (home / "unbroken.txt").read_text()
    flags = ppo_flags(home, home / "broken", steps=40, save_every=1)
    (home / "saves").mkdir()
    for news in itertools.chain(
        kill_saves(home / "saves", kills, rng), kill_runs(flags, home / "broken", home / "unbroken", kills, rng)
    ):
        print(news, flush=True)
    shutil.rmtree(home)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
