"""What is written is there whole or not at all, and what a run would overwrite is refused."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import asdict, replace

import pytest
import torch
from conftest import message
from safetensors.torch import save_file
from torch import nn

import checkpoint
from checkpoint import (
    RUN_CONFIG,
    check_run,
    latest_checkpoint,
    match,
    need_disk,
    read_json,
    replacing,
    save_checkpoint,
    write_text,
)
from config import BadInput, FinetuneConfig

# ---- reading


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


@pytest.mark.parametrize("last", ["save_file", "sha256", "synced"])
def test_a_checkpoint_that_is_not_whole_is_not_where_one_is_looked_for(tmp_path, monkeypatch, last):
    """Whatever the save had come to when it broke: before its tensors, before its sums, before it was on the disk."""
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, model, [], {"step": 1})

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, last, die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, model, [], {"step": 2}, keep=1)
    assert latest_checkpoint(tmp_path).name == "00000001"


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_save_replaces_its_files_and_leaves_the_others(out):
    with replacing(out, {}) as folder:
        (folder / "model.bin").write_text("new")
        (folder / "config.json").write_text("{}")
        assert (out / "model.bin").read_text() == "old"
    assert contents(out) == {"model.bin": "new", "config.json": "{}", "log.jsonl": "kept"}


@pytest.mark.parametrize(
    "error, kind",
    [(OSError("disk full"), BadInput), (RuntimeError("a bug"), RuntimeError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_save_that_fails_leaves_the_old_files_and_no_temporary_ones(out, error, kind):
    before = contents(out)
    with pytest.raises(kind), replacing(out, {}) as folder:
        (folder / "model.bin").write_text("half of the n")
        raise error
    assert contents(out) == before


def test_saved_files_have_the_mode_of_any_other_file(out):
    """A temporary folder is 0700, and safetensors writes 0600: nobody else could read the model."""
    with replacing(out, {}) as folder:
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
    assert "--force replaces it" in text
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
