"""Finding a model folder, reading damaged files, saving whole or not at all."""

import json
import os
import shutil
import time
from collections import namedtuple
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import checkpoint
from checkpoint import (
    RUN_CONFIG,
    WEIGHTS,
    check_run,
    locate,
    match,
    need_disk,
    read_json,
    read_tensors,
    replacing,
    weight_file,
    write_text,
)
from config import BadInput, FinetuneConfig


def message(function, *args, **kwargs):
    """The one line of the BadInput that a call raises."""
    with pytest.raises(BadInput) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- finding a model


def test_a_local_folder_is_its_own_location(gpt2_folder):
    assert locate(str(gpt2_folder)) == gpt2_folder


def test_a_folder_without_a_model_is_refused_with_the_file_looked_for(tmp_path):
    assert str(tmp_path / "config.json") in message(locate, str(tmp_path))


def test_a_folder_without_weights_is_refused_with_the_names_looked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = message(locate, str(tmp_path))
    assert str(tmp_path) in text
    assert all(name in text for name in WEIGHTS)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_a_path_that_is_not_there_is_no_hub_name(name, monkeypatch):
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert f"{name} holds no model" in message(locate, name)


@pytest.mark.parametrize(
    "name, command",
    [
        ("finetune_checkpoints/mini", "python finetune_gpt2.py --preset mini"),
        ("reward_checkpoints/gpt2/judge", "python reward.py --preset gpt2"),
        ("ppo_checkpoints/my_run", "python ppo.py"),
    ],
)
def test_a_stage_that_has_not_run_yet_is_named_with_its_command(tmp_path, monkeypatch, name, command):
    monkeypatch.chdir(tmp_path)
    assert message(locate, name).endswith(f"; make it with: {command}")


def test_a_hub_name_without_a_network_is_refused_at_once_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    text = message(locate, "somebody/no-such-model-in-the-cache")
    assert time.monotonic() - start < 5
    assert "'somebody/no-such-model-in-the-cache'" in text
    assert "--preset mini" in text


@pytest.mark.parametrize("name", ["a model with spaces", "one/two/three", "what?"])
def test_a_name_that_no_hub_model_can_have_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert message(locate, name) == f"{name!r} is neither a folder here nor a name on the Hugging Face hub"


def test_the_hub_is_asked_only_for_what_its_cache_does_not_hold(gpt2_folder, tmp_path, monkeypatch):
    """And for safetensors before pickles, and never for a repository's TensorFlow, Flax or ONNX files."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def from_cache(name, allow_patterns, local_files_only):
        calls.append((local_files_only, allow_patterns[-1]))
        return gpt2_folder

    monkeypatch.setattr(checkpoint, "snapshot_download", from_cache)
    assert locate("gpt2") == gpt2_folder
    assert calls == [(True, "model*.safetensors*")]
    monkeypatch.setattr(
        checkpoint, "snapshot_download", lambda *args, **kwargs: from_cache(*args, **kwargs) and tmp_path
    )
    calls.clear()
    message(locate, "gpt2")
    patterns = ["model*.safetensors*", "pytorch_model*.bin*"]
    assert calls == [(local, pattern) for local in (True, False) for pattern in patterns]


def test_safetensors_are_read_where_both_formats_lie(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert weight_file(tmp_path).name == "pytorch_model.bin"
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert weight_file(tmp_path).name == "model.safetensors"
    assert dict(read_tensors(tmp_path)) == {"w": torch.ones(1)}


# ---- damaged files


def truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def nonsense(file):
    file.write_bytes(b"not a checkpoint at all" * 20)


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", [truncated, nonsense, empty])
def test_a_damaged_weight_file_is_refused_with_its_path(tmp_path, name, damage):
    file, state = tmp_path / name, {"w": torch.arange(100.0)}
    save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
    damage(file)
    assert f"{file} is damaged or missing" in message(lambda: dict(read_tensors(tmp_path)))


class Attack:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": Attack(f"touch {tmp_path / 'ran'}")}, file)
    assert str(file) in message(lambda: dict(read_tensors(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard_is_refused_with_its_path(tmp_path):
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    text = message(lambda: dict(read_tensors(tmp_path)))
    assert f"{tmp_path / 'model-00001-of-00001.safetensors'} is damaged or missing" in text


def test_an_index_that_names_no_shards_is_refused_with_its_path(tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text("{}")
    assert str(file) in message(lambda: dict(read_tensors(tmp_path)))


def test_a_pickle_of_more_than_tensors_is_refused_with_its_path(tmp_path):
    """A trainer's checkpoint: the weights lie one level deeper, beside its counters."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "epoch": 3}, file)
    assert str(file) in message(lambda: dict(read_tensors(tmp_path)))


@pytest.mark.parametrize("content", [None, "", "{", b"\xff\xfe"])
def test_json_that_is_missing_or_broken_is_refused_with_its_path(tmp_path, content):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"{file} cannot be read" in message(read_json, file)


def names(count):
    return {f"tensor{i}": torch.zeros(2, i + 1) for i in range(count)}


def test_tensors_that_match_raise_nothing():
    assert match(names(3), names(3), "here") is None


def test_a_mismatch_lists_five_problems_and_counts_the_rest():
    text = message(match, {}, names(7), "the folder")
    assert text.startswith("the folder does not fit: missing tensor0 (2, 1); ")
    assert text.endswith("missing tensor4 (2, 5) and 2 more")
    assert message(match, names(2), {}, "it") == "it does not fit: unexpected tensor0 (2, 1); unexpected tensor1 (2, 2)"
    wrong = {"tensor0": torch.zeros(3)}
    assert message(match, wrong, names(1), "it") == "it does not fit: tensor0 is (3,), expected (2, 1)"


# ---- saving


@pytest.fixture
def out(tmp_path):
    """A folder with a file that a save replaces and one that it does not touch."""
    (tmp_path / "model.bin").write_text("old")
    (tmp_path / "log.jsonl").write_text("kept")
    return tmp_path


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_save_replaces_its_files_and_leaves_the_others(out):
    with replacing(out) as folder:
        (folder / "model.bin").write_text("new")
        (folder / "config.json").write_text("{}")
        assert (out / "model.bin").read_text() == "old"
    assert contents(out) == {"model.bin": "new", "config.json": "{}", "log.jsonl": "kept"}


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("unexpected pos"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_files_and_no_temporary_ones(out, error):
    before = contents(out)
    with pytest.raises(type(error)), replacing(out) as folder:
        (folder / "model.bin").write_text("half of the n")
        raise error
    assert contents(out) == before


def test_saved_files_have_the_mode_of_any_other_file(out):
    """A temporary folder is 0700, and safetensors writes 0600: nobody else could read the model."""
    with replacing(out) as folder:
        save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    (out / "plain").write_text("")
    assert (out / "model.safetensors").stat().st_mode == (out / "plain").stat().st_mode


def test_a_text_file_is_replaced_whole_and_its_temporary_one_is_gone(out):
    write_text(out / "model.bin", "naïve")
    write_text(out / "new.json", "{}")
    assert (out / "model.bin").read_text(encoding="utf-8") == "naïve"
    assert sorted(file.name for file in out.iterdir()) == ["log.jsonl", "model.bin", "new.json"]


def test_a_text_file_that_cannot_be_finished_stays_as_it_was(out, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_text(out / "model.bin", "new")
    assert (out / "model.bin").read_text() == "old"


# ---- before a run


@pytest.fixture
def cfg(tmp_path):
    """A config whose `out` holds a run of it."""
    cfg = FinetuneConfig(out=str(tmp_path), lr=1e-4)
    (tmp_path / RUN_CONFIG).write_text(json.dumps(asdict(cfg)))
    return cfg


def test_a_folder_without_a_run_takes_any_config(tmp_path):
    assert check_run(FinetuneConfig(out=str(tmp_path))) is None
    assert check_run(FinetuneConfig(out=str(tmp_path / "not there"))) is None


def test_a_run_may_be_repeated_with_its_own_config(cfg):
    assert check_run(cfg) is None
    assert check_run(replace(cfg, device="cpu", report_to="none")) is None  # neither changes what a run means


def test_a_run_of_another_config_is_refused_with_the_fields_that_differ(cfg):
    text = message(check_run, replace(cfg, lr=2e-4, dtype="fp32"))
    assert f"{cfg.out} holds a run of another config (lr 0.0001 -> 0.0002, dtype 'auto' -> 'fp32')" in text
    assert "--force True" in text
    assert "--out" in text


def test_force_replaces_a_run_of_another_config(cfg):
    assert check_run(replace(cfg, lr=2e-4, force=True)) is None


def test_the_disk_must_have_room_for_two_copies_of_the_model(tmp_path, monkeypatch):
    usage, model = namedtuple("Usage", "total used free"), nn.Linear(1000, 10, bias=False)  # 40,000 bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 80_000))
    assert need_disk(tmp_path, model) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 79_999))
    text = message(need_disk, tmp_path, model)
    assert str(tmp_path) in text
    assert "79,999 bytes free" in text
    assert "80,000" in text
