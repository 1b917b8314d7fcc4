"""What the preflight states about downloads, disk, memory and time, and when it refuses to start."""

import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, message
from test_full_size import BERT_IMDB, GPT2, IMDB, NEEDED, SIEBERT, client, download_as_transformers, repositories

from config import FinetuneConfig, PreflightConfig, defaults
from runtime import preflight
from runtime.device import free_memory
from runtime.hub import locate, snapshot
from runtime.preflight import main, size

__all__ = ["client", "repositories"]  # fixtures
CPU, GPU = torch.device("cpu"), torch.device("cuda")
NAMES = {"gpt2": GPT2, IMDB: f"datasets/{IMDB}", BERT_IMDB: BERT_IMDB, SIEBERT: SIEBERT}  # as configs call them
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A dict to change a machine: a CPU with 4 TFLOP/s, of which a run reaches 0.6, 10 GB of memory, 100 GB of disk."""
    values = {"device": CPU, "memory": 10e9, "disk": 100e9}
    monkeypatch.setattr(preflight, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(preflight, "pick_device", lambda cfg: (values["device"], torch.float32))
    monkeypatch.setattr(preflight, "free_memory", lambda device: values["memory"])
    monkeypatch.setattr(preflight, "peak_flops", lambda *args, **sizes: 4e12)
    monkeypatch.setattr(preflight, "CPU_SHARE", 0.6)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, values["disk"]))
    return values


@pytest.fixture
def sheet(client, machine, capsys):
    """A function that runs the preflight with flags and returns its rows, {name: value}."""

    def rows(**flags):
        main(PreflightConfig(**flags))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("preset ")
        return dict(re.split("  +", line.strip(), maxsplit=1) for line in lines[1:])

    return rows


def needed(repositories, name):
    """Return {file: bytes} of what is read of a model or data set of the hub."""
    kind = "datasets" if name == IMDB else "models"
    files = repositories[kind, NAMES[name].removeprefix("datasets/")]
    return {file: len(files[file]) for file in NEEDED[NAMES[name]].split()}


def finish(*stages):
    """Write the files of finished stages to the working directory."""
    files = {
        "fine-tuning": ["finetune_checkpoints/gpt2/model.safetensors"],
        "PPO": ["ppo_checkpoints/gpt2/model.safetensors"],
        "evaluation": ["ppo_checkpoints/gpt2/results.json", "ppo_checkpoints/gpt2/report.html"],
    }
    for path in [Path(file) for stage in stages for file in files[stage]]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


# ---- downloads


def test_the_size_of_each_model_and_data_set_is_that_of_the_files_that_the_commands_read(sheet, client, repositories):
    rows = sheet()
    for name in NAMES:
        assert rows[name] == f"{size(sum(needed(repositories, name).values()))} to download"


def test_nothing_is_downloaded_or_stored(sheet, client, tmp_path):
    sheet()
    assert client.sent == [] and client.requests
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_files_in_the_cache_do_not_count(sheet, client, repositories):
    """A model without its tokenizer, as transformers downloads it; the cache has no list of its files."""
    download_as_transformers(client, Path.cwd())
    files = needed(repositories, "gpt2")
    left = sum(n for file, n in files.items() if file not in ("config.json", "model.safetensors"))
    assert 0 < left < sum(files.values())
    assert sheet()["gpt2"] == f"{size(left)} to download"


def test_with_all_files_in_the_cache_nothing_is_requested(sheet, client):
    for name in NAMES:
        snapshot(name, False, "dataset") if name == IMDB else locate(name)
    client.requests.clear()
    client.failures[""] = 503
    rows = sheet()
    assert [rows[name] for name in NAMES] == ["in the cache"] * 4
    assert rows["disk"].startswith("0 MB for downloads") and client.requests == []


def test_a_finished_stage_needs_nothing(sheet, client):
    finish("fine-tuning")
    rows = sheet()
    assert "gpt2" not in rows and {IMDB, BERT_IMDB, SIEBERT} <= rows.keys()
    assert rows["fine-tuning"] == "finished: finetune_checkpoints/gpt2" and rows["PPO"].startswith("about ")
    finish("PPO", "evaluation")
    client.failures[""] = 503
    rows = sheet()
    assert not rows.keys() & NAMES.keys()
    assert rows["disk"].startswith("0 MB for downloads and 0 MB for runs; ")
    Path("ppo_checkpoints/gpt2/checkpoints").mkdir()  # a run that was started again with --force
    client.failures.clear()
    assert SIEBERT in sheet()


def test_preset_mini_needs_no_hub(machine, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(preflight, "needed_files", None)
    main(PreflightConfig(preset="mini"))
    assert capsys.readouterr().out.startswith("preset mini, before anything is downloaded\n  disk ")


# ---- refused


@pytest.mark.parametrize(
    "name, failure, reason",
    [(GPT2, 503, "503 Service Unavailable"), (IMDB, "close", "disconnected"), (SIEBERT, 404, "404")],
)
def test_a_missing_file_and_a_hub_that_fails_are_an_error_of_one_line(client, machine, name, failure, reason):
    client.failures[name] = failure
    text = message(main, PreflightConfig())
    assert f"{'gpt2' if name == GPT2 else name!r}" in text and reason in text and "cache" in text


def test_the_command_ends_with_status_2_and_one_line_if_the_hub_cannot_be_reached(client, tmp_path):
    env = client.environment(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    done = run_preflight(env)
    assert done.returncode == 2 and re.fullmatch("error: model 'gpt2': .*\n", done.stderr), done.stderr


def run_preflight(env):
    """Run the command in the repository; return its CompletedProcess."""
    command = [sys.executable, "-m", "runtime.preflight", "--device", "cpu"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_a_disk_that_is_too_small_is_refused_and_one_that_is_just_large_enough_is_not(
    client, machine, repositories, capsys
):
    """Downloads, of the data set three times; model, best weights and three checkpoints of PPO; and GPT-2's model."""
    weights = 4 * 124_439_808
    downloads = sum(sum(needed(repositories, name).values()) * (3 if name == IMDB else 1) for name in NAMES)
    runs = weights * (2 + 3 + 3 * 3)
    machine["disk"] = downloads + runs
    main(PreflightConfig())
    assert f"{size(downloads)} for downloads and {size(runs)} for runs; " in capsys.readouterr().out
    machine["disk"] -= 1
    assert message(main, PreflightConfig()).startswith("the disk is too small: 7.0 GB are needed, 7.0 GB are free in ")
    assert "to download" in capsys.readouterr().out  # the table comes before the error


def test_what_a_run_has_already_stored_is_not_needed_again(sheet, machine):
    finish("fine-tuning")
    before = sheet()["disk"]
    file = Path("ppo_checkpoints/gpt2/checkpoints/00000020/tensors.safetensors")
    file.parent.mkdir(parents=True)
    with open(file, "wb") as sparse:
        sparse.truncate(10**9)
    assert " and 6.0 GB for runs" in before and " and 5.0 GB for runs" in sheet()["disk"]


def test_two_disks_are_checked_one_by_one(machine, tmp_path, monkeypatch):
    """Folders that do not exist yet count for the disk of the folder above them."""
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir(), b.mkdir()
    stat, Stat = Path.stat, namedtuple("Stat", "st_dev st_mode")
    monkeypatch.setattr(Path, "stat", lambda p, **kw: Stat(7, stat(p).st_mode) if p == b else stat(p, **kw))
    rows = preflight.disks({str(a / "x"): 1, str(b / "x" / "y"): 10, str(a / "z"): 100})
    assert [(folder, total) for folder, total, _ in rows] == [(a, 101), (b, 10)]


# ---- memory and time


def test_memory_is_that_of_weights_gradients_moments_and_activations(sheet, machine):
    """GPT-2 124M keeps 16 * 768 * 12 + 2 * 50,257 numbers per token. Classifiers of a few kB do not show."""
    weights, per_token = 4 * 124_439_808, 4 * (16 * 768 * 12 + 2 * 50257)
    cache = 4 * 128 * (2 * 24 * 768 * 12 + 50257)
    least = 4 * weights + 2048 * per_token, 5 * weights + 2048 * per_token + cache
    text = f"at least {size(least[0])} for fine-tuning and {size(least[1])} for PPO, 10.0 GB free"
    assert sheet()["memory"] == text == "at least 4.0 GB for fine-tuning and 4.8 GB for PPO, 10.0 GB free"
    machine["device"] = GPU  # one row of 512 or 24 tokens; the graphs of PPO keep activations and two sets of gradients
    least = 4 * weights + 512 * per_token, 7 * weights + 2 * 24 * per_token + cache
    assert sheet()["memory"].startswith(f"at least {size(least[0])} for fine-tuning and {size(least[1])} for PPO")
    machine["memory"] = None
    assert sheet()["memory"].endswith("for PPO")


def test_the_sizes_of_the_model_are_those_of_a_config_on_this_machine(sheet, client, repositories):
    """That of the fine-tuned model, or of the model in the cache. Here it has one block of width 16."""
    numbers = 50257 * 16 + 1024 * 16 + 16 * (12 * 16 + 13) + 2 * 16
    disk = f" and {size(4 * numbers * 4 + 50e6)} for runs"  # two models, each with a copy; and the evaluation
    assert disk not in sheet()["disk"]
    locate("gpt2")
    assert disk in sheet()["disk"]
    shutil.rmtree("hub")
    Path("finetune_checkpoints/gpt2").mkdir(parents=True)
    Path("finetune_checkpoints/gpt2/config.json").write_bytes(repositories["models", GPT2]["config.json"])
    assert disk in sheet()["disk"]


def test_the_weights_of_reward_and_judge_count_for_ppo(client, machine, repositories):
    files = {name: ("model", {"config.json": 9, "model.safetensors": n, "pytorch_model.bin": 7}, {}) for name, n in
             (("a", 1000), ("b", 2000))}  # fmt: skip
    assert preflight.weight_bytes("a", files) == 1000
    files["c"] = ("model", {"pytorch_model-1.bin": 5, "pytorch_model-2.bin": 6, "training_args.bin": 9}, {})
    assert preflight.weight_bytes("c", files) == 11
    assert preflight.weight_bytes("", files) == preflight.weight_bytes("my_reward.py:f", files) == 0
    local = ROOT / "asset/mini/judge"
    assert preflight.weight_bytes(str(local), files) == os.path.getsize(local / "model.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/meminfo")
def test_the_free_memory_of_a_cpu_is_what_the_system_says_is_available():
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    assert 0.01 * pages * page < free_memory(CPU) <= pages * page
    assert free_memory(torch.device("mps")) is None


def test_too_little_memory_is_a_warning(client, machine, capsys):
    machine["memory"] = 4.5e9
    main(PreflightConfig())
    assert "warning: 4.8 GB of memory are needed, 4.5 GB are free\n" in capsys.readouterr().err


def test_the_time_of_each_stage_is_that_of_its_flops_at_the_assumed_speed(sheet, machine):
    """22,800 reviews of 281 tokens are 391 steps of 32 * 512 tokens, with ten evaluations of 200,000."""
    blocks, head = 85_054_464, 50257 * 768
    tokens = 3 * 391 * 32 * 512 + (8 + 2) * 200_000
    finetune = 2 * tokens * (blocks + head)
    ppo = 200 * 128 * 15 * 2 * (21 * blocks + 16 * head)
    rows = sheet()
    assert rows["fine-tuning"] == f"about {finetune / 2.4e12 / 60:.0f} min"
    assert rows["PPO"] == f"about {ppo / 2.4e12 / 60:.0f} min"
    assert rows["speed"] == "2.4 TFLOP/s, assumed: 60% of a large product"
    machine["device"] = GPU
    assert sheet()["speed"] == "0.2 TFLOP/s, assumed: 5% of a large product"
    Path("reviews.csv").touch()
    assert sheet(finetune="--dataset reviews.csv")["fine-tuning"] == "an unknown time"


def test_flags_of_a_command_change_what_is_stated_and_wrong_ones_are_refused(sheet, client, machine):
    reward = "--reward my_reward.py:f"
    rows = sheet()
    shorter = sheet(ppo=f"--steps 100 {reward}", finetune="--epochs 2", evaluate=reward)
    assert BERT_IMDB in rows and BERT_IMDB not in shorter
    minutes = [int(r[name].split()[1]) for name in ("PPO", "fine-tuning") for r in (rows, shorter)]
    assert minutes[1] == pytest.approx(minutes[0] / 2, abs=1) and minutes[3] > 1.8 * minutes[2]
    assert "stepz" in message(main, PreflightConfig(ppo="--stepz 100"))


def test_a_cpu_that_takes_more_than_a_day_is_a_warning(client, machine, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "peak_flops", lambda *args, **sizes: 1e11)
    main(PreflightConfig())
    assert "--preset mini is made for a CPU" in capsys.readouterr().err
    finish("fine-tuning", "PPO")
    main(PreflightConfig())
    assert not capsys.readouterr().err


def test_a_model_from_scratch_has_the_sizes_of_its_config(tmp_path):
    """Not those of GPT-2 124M, whose weights would be four times as large as those of preset medium."""
    cfg = replace(defaults(FinetuneConfig, "medium"), out=str(tmp_path))
    shape = preflight.open_config(cfg, {})
    assert (shape.n_layer, shape.n_embd, shape.vocab_size, shape.n_positions) == (8, 512, 8192, 512)


@pytest.mark.parametrize("name", ["posix", "nt"])
def test_flags_are_split_at_spaces_outside_of_quotes_and_keep_the_backslashes_of_windows(monkeypatch, name):
    monkeypatch.setattr(preflight, "os", SimpleNamespace(name=name))  # pathlib of pytest reads os.name too
    split = preflight.words(r"""--out 'my runs' --dataset C:\me\reviews.csv --note "a # b" """)
    path = r"C:\me\reviews.csv" if name == "nt" else "C:mereviews.csv"
    assert split == ["--out", "my runs", "--dataset", path, "--note", "a # b"]
