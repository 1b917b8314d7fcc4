"""What is written is there whole or not at all, and what a run would overwrite is refused."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import message
from safetensors.torch import save_file
from torch import nn

import checkpoint
from checkpoint import (
    RUN_CONFIG,
    BestWeights,
    Checkpoints,
    check_run,
    fingerprint,
    latest_checkpoint,
    load_checkpoint,
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
    assert check_run(FinetuneConfig(out=str(tmp_path)), "weights") is None
    assert check_run(FinetuneConfig(out=str(tmp_path / "not there")), "weights") is None


def test_a_run_may_be_repeated_with_its_own_config(cfg):
    assert check_run(cfg, "weights") is None
    assert (
        check_run(replace(cfg, device="cpu", report_to="none"), "weights") is None
    )  # neither changes what a run means


def test_a_run_of_another_config_is_refused_with_the_fields_that_differ(cfg):
    text = message(check_run, replace(cfg, lr=2e-4, dtype="fp32"), "weights")
    assert f"{cfg.out} holds a run of another config (lr 0.0001 -> 0.0002, dtype 'auto' -> 'fp32')" in text
    assert "--force replaces it" in text
    assert "--out" in text


def test_force_replaces_a_run_of_another_config(cfg):
    assert check_run(replace(cfg, lr=2e-4, force=True), "weights") is None


FINISHED, UNFINISHED = "holds a finished run: ", "holds an unfinished run: --resume resumes it, --force replaces it"
KINDS = {  # what a folder holds of a run with two results: what is said without flags, with --resume, with --force
    "": ("", "", ""),
    "one": (UNFINISHED, "", ""),
    "one two": (FINISHED + "--force replaces it", FINISHED + "there is nothing to resume; --force replaces it", ""),
    "checkpoints/00000003": (UNFINISHED, "", ""),
    "one checkpoints/00000003": (UNFINISHED, "", ""),
    "judge/checkpoints/00000003": (UNFINISHED, "", ""),
    "one two checkpoints": ("", "", ""),  # --force was given, and the run was killed before its first checkpoint
    "one checkpoints": (UNFINISHED, "", ""),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flag", ["", "resume", "force"])
def test_nothing_finished_is_replaced_without_force(cfg, kind, flag):
    """Nor what is finished in part: a reward without its judge."""
    for name in kind.split():
        path = Path(cfg.out, name)
        path.mkdir(parents=True) if "checkpoints" in name else path.touch()
    expected = dict(zip(("", "resume", "force"), KINDS[kind]))[flag]
    changed = replace(cfg, **{flag: True}) if flag else cfg
    if expected:
        assert expected in message(check_run, changed, "one", "two")
    else:
        assert check_run(changed, "one", "two") is None


def test_the_disk_must_have_room_for_two_copies_of_the_model(tmp_path, monkeypatch):
    usage, model = namedtuple("Usage", "total used free"), nn.Linear(1000, 10, bias=False)  # 40,000 bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 80_000))
    assert need_disk(tmp_path, model) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 79_999))
    text = message(need_disk, tmp_path, model)
    assert str(tmp_path) in text
    assert "79,999 bytes free" in text
    assert "80,000" in text


# ---- what checkpoints cost


class Clock:
    """time.monotonic, which a save moves forward by `cost` seconds and a step by one."""

    def __init__(self, cost):
        self.now, self.cost, self.saved = 0.0, cost, []

    def monotonic(self):
        return self.now

    def save(self, out, model, optimizers, state, keep):
        self.saved.append(state["step"])
        self.now += self.cost


@pytest.mark.parametrize(
    ("share", "cost", "expected"),
    [
        (0.05, 0.1, list(range(10, 100, 10))),  # .1 s in 10: all of them
        (0.05, 2.0, [10, 40, 80]),  # after 2 s of saving 38 of training, at least
        (0.5, 20.0, [10, 20, 40, 60, 80]),
        (1.0, 60.0, list(range(10, 100, 10))),  # whatever they cost
    ],
)
def test_checkpoints_take_a_share_of_the_time_at_most(tmp_path, monkeypatch, share, cost, expected):
    clock = Clock(cost)
    monkeypatch.setattr(checkpoint, "save_checkpoint", clock.save)
    monkeypatch.setattr(checkpoint, "time", clock)
    cfg = FinetuneConfig(out=str(tmp_path), save_every=10, save_share=share)
    for _ in Checkpoints(cfg, tmp_path, None, [], {"inputs": {}}).steps(100):
        clock.now += 1
    assert clock.saved == expected
    assert sum(cost for _ in clock.saved) <= share * clock.now + cost


def test_what_belongs_to_a_checkpoint_is_written_before_it_and_counts(tmp_path, monkeypatch):
    clock, order = Clock(1.0), []

    def before():
        order.append("before")
        clock.now += 100

    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *args: order.append("checkpoint") or clock.save(*args))
    monkeypatch.setattr(checkpoint, "time", clock)
    cfg = FinetuneConfig(out=str(tmp_path), save_every=1, save_share=0.05)
    for _ in Checkpoints(cfg, tmp_path, None, [], {"inputs": {}}, before_save=before).steps(100):
        clock.now += 1
    assert order == ["before", "checkpoint"]  # 101 s may not be spent again in 100 s


def test_the_best_weights_are_those_of_the_moment_and_are_written_once(tmp_path):
    """Catches weights that follow the model while it goes on learning."""
    model, written = nn.Linear(1, 1), []
    best = BestWeights(model, lambda weights: written.append(weights["bias"].item()))
    best.write()
    assert not written
    for number in (1.0, 2.0):
        model.bias.data.fill_(number)
        best.keep()
    model.bias.data.fill_(3.0)
    best.write(), best.write()
    assert written == [2.0]


# ---- what a run depends on


def test_a_fingerprint_is_of_names_shapes_and_numbers():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(other) != fingerprint(one.double())
    one.float()
    other.bias.data[1] += 1e-3
    assert fingerprint(one) != fingerprint(other)
    renamed = nn.ModuleDict({"a": nn.Linear(2, 2)})
    renamed["a"].load_state_dict(one.state_dict())
    assert len({fingerprint(one), fingerprint(renamed), fingerprint("a", "b"), fingerprint("ab"), fingerprint()}) == 5


@pytest.mark.parametrize(
    "now", [{"texts": "a", "reward": "c"}, {"texts": "a"}, {"texts": "a", "reward": "b", "new": "d"}]
)
def test_inputs_that_differ_are_named_and_force_takes_them(tmp_path, capsys, now):
    """Also where one is missing, or was not recorded then."""
    model, then = nn.Linear(2, 2), {"texts": "a", "reward": "b"}
    save_checkpoint(tmp_path, model, [], {"step": 1, "inputs": then})
    folder, name = latest_checkpoint(tmp_path), "new" if "new" in now else "reward"
    text = message(load_checkpoint, folder, model, [], now)
    assert f"made with another content of: {name} (" in text and "texts" not in text and "--force" in text
    assert load_checkpoint(folder, model, [], now, force=True)["step"] == 1
    assert f"warning: resuming with another content of: {name} (" in capsys.readouterr().err
    assert load_checkpoint(folder, model, [], then)["step"] == 1 and not capsys.readouterr().err
