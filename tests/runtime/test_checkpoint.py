"""What is written is there whole or not at all, and what a run would overwrite is refused."""

import json
import os
import shutil
import signal
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import message
from safetensors.torch import save_file
from torch import nn

from config import FinetuneConfig
from runtime import checkpoint
from runtime.checkpoint import (
    CARD_MARK,
    RUN_CONFIG,
    TENSORS,
    BestWeights,
    Checkpoints,
    check_finished,
    check_run,
    delete_checkpoints,
    delete_results,
    fingerprint,
    is_our_card,
    latest_checkpoint,
    load_checkpoint,
    match,
    need_disk,
    read_file,
    read_json,
    remove_leftovers,
    replacing,
    save_checkpoint,
    write_text,
)
from runtime.errors import BadInput, Stopped, first_line

# ---- reading


@pytest.mark.parametrize("content", [None, "", "{", b"\xff\xfe"])
def test_json_that_is_missing_or_broken_is_refused_with_its_path(tmp_path, content):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"{file} cannot be read" in message(read_json, file)


def test_an_error_without_a_text_is_reported_by_its_kind():
    assert first_line(ValueError("\n one line\nanother")) == "one line"
    assert first_line(EOFError()) == "EOFError"


def test_the_tensors_of_a_safetensors_file_are_read_one_at_a_time_the_largest_first(tmp_path):
    """A model that is filled from it, the largest last, would have twice its largest tensor in memory at the end."""
    tensors = {"b": torch.rand(4), "a": torch.rand(2, 3), "d": torch.rand(3, 3), "c": torch.rand(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = list(read_file(tmp_path / "model.safetensors"))
    assert [name for name, _ in found] == ["d", "a", "b", "c"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found)


def test_weights_that_were_saved_on_a_gpu_are_read_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"w": torch.tensor([1.0, 2.0])}, tmp_path / "pytorch_model.bin")
    ((name, tensor),) = read_file(tmp_path / "pytorch_model.bin")
    assert name == "w" and tensor.device.type == "cpu" and tensor.tolist() == [1, 2]


class Planted:
    """A pickled object that writes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_code_in_a_weight_file_is_run_even_where_torch_is_told_to(tmp_path, monkeypatch):
    torch.save({"w": Planted(tmp_path / "planted")}, tmp_path / "pytorch_model.bin")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert "holds more than plain tensors" in message(list, read_file(tmp_path / "pytorch_model.bin"))
    assert not (tmp_path / "planted").exists()


def names(count):
    return {f"tensor{i}": torch.zeros(2, i + 1) for i in range(count)}


def test_tensors_that_match_raise_nothing():
    assert match(names(3), names(3), "here") is None


def test_a_mismatch_lists_five_problems_and_counts_the_rest():
    text = message(match, {}, names(7), "the folder")
    assert text.startswith("the folder does not fit: missing tensor0 (2, 1); ")
    assert text.endswith("missing tensor4 (2, 5) and 2 more")
    assert message(match, {}, names(6), "it").endswith("missing tensor4 (2, 5) and 1 more")
    assert message(match, {}, names(5), "it").endswith("missing tensor4 (2, 5)")
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


def test_what_a_kill_leaves_of_a_save_is_in_the_folder_of_the_run_and_is_swept(tmp_path, monkeypatch):
    """Elsewhere, say in /tmp, it would stay for ever, and a folder is not moved from one disk to another at once."""

    def killed(tensors, file):
        assert file.parent.is_dir() and latest_checkpoint(tmp_path) is None
        remove_leftovers(tmp_path)
        assert not file.parent.exists() and not list((tmp_path / "checkpoints").iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, nn.Linear(2, 2), [], {"step": 1})


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
    [
        (OSError("disk full"), BadInput),
        (Exception("disk full"), BadInput),  # as the tokenizers library raises it
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_save_that_fails_leaves_the_old_files_and_no_temporary_ones(out, error, kind):
    before = contents(out)
    with pytest.raises(kind), replacing(out, {}) as folder:
        (folder / "model.bin").write_text("half of the n")
        raise error
    assert contents(out) == before


def test_a_full_disk_is_reported_with_the_bytes_that_are_needed_and_free(out, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9999, 9999, 1500))
    tensors = {"a": torch.zeros(100, 3), "b": torch.zeros(100, dtype=torch.float64)}  # 1200 + 800 bytes
    with pytest.raises(BadInput) as caught, replacing(out, tensors):
        raise OSError("disk full")
    assert str(caught.value) == (
        f"{out} was not written, what it held stays: disk full; 2,000 bytes are needed, 1,500 are free on that disk"
    )


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


@pytest.mark.parametrize("text", ["a card\n{}\n", "\xe9\n{}\n", "a card", "\xe9", "text that quotes {}"])
def test_a_card_is_ours_by_its_mark_in_whatever_encoding(tmp_path, text):
    file = tmp_path / "README.md"
    file.write_bytes(text.format(CARD_MARK).encode("latin-1"))
    assert is_our_card(file) == (f"\n{CARD_MARK}\n" in text.format(CARD_MARK))


def test_only_the_results_in_the_folder_itself_are_deleted(tmp_path, monkeypatch):
    """Not those in the current folder, which has the same names where a policy is evaluated in its own folder."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    cards = ("README.md", "MODEL_CARD.md")
    results = ("results.json", "viewer.json", "samples.md", "example_results.png", "report.html")
    for folder in (out, elsewhere):
        folder.mkdir()
        for name in (*results, "learning_curves.png", *cards, "log.jsonl", "model.safetensors"):
            (folder / name).write_text(f"\n{CARD_MARK}\n" if name in cards else "")
    before = contents(elsewhere)
    monkeypatch.chdir(elsewhere)
    delete_results(out)
    assert set(contents(out)) == {"log.jsonl", "model.safetensors"}
    assert contents(elsewhere) == before


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


def test_of_many_fields_that_differ_five_are_named(cfg):
    text = message(check_run, replace(cfg, lr=2e-4, dtype="fp32", seed=9, block_size=7, batch_size=5, epochs=9), "w")
    assert text.count(" -> ") == 5


def test_force_replaces_a_run_of_another_config(cfg):
    assert check_run(replace(cfg, lr=2e-4, force=True), "weights") is None


FINISHED, UNFINISHED = "holds a finished run: ", "holds an unfinished run: --resume resumes it, --force replaces it"
KINDS = {  # what a folder holds of a run with two results: what is said without flags, with --resume, with --force
    "": ("", "", ""),
    "one": (UNFINISHED, "", ""),
    "one two": (FINISHED + "--force replaces", FINISHED + "there is nothing to resume; without --resume, --force", ""),
    "checkpoints/00000003": (UNFINISHED, "", ""),
    "one checkpoints/00000003": (UNFINISHED, "", ""),
    "reward/checkpoints/00000003": (UNFINISHED, "", ""),
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


FOREIGN = [
    "best/mine",
    "checkpoints/mine",
    "tensorboard/mine",
    "log.jsonl",
    "samples.jsonl",
    "report.html",
    "judge/best/x",
]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("resume", [False, True])
def test_files_of_somebody_else_are_replaced_only_by_force(tmp_path, name, resume):
    """What a new run would delete in a folder that no run of ours has written."""
    file, cfg = tmp_path / name, FinetuneConfig(out=str(tmp_path), resume=resume)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    assert f"and no {RUN_CONFIG} of the run that it is of: --force replaces" in message(check_run, cfg, "weights")
    assert check_run(replace(cfg, force=True), "weights") is None
    (tmp_path / RUN_CONFIG).write_text(json.dumps(asdict(cfg)))
    if "checkpoints" not in name:
        assert check_run(cfg, "weights") is None


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/"])
def test_files_that_a_run_leaves_alone_are_no_obstacle(tmp_path, name):
    """And the empty folder of a run that was killed at its start."""
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("mine")
    assert check_run(FinetuneConfig(out=str(tmp_path)), "weights") is None


def test_the_policy_of_an_unfinished_run_is_not_taken_for_that_of_its_config(tmp_path):
    """Weights beside checkpoints are of an earlier run: --force had replaced its config already."""
    (tmp_path / "checkpoints").mkdir()
    text = message(check_finished, str(tmp_path))
    assert text.startswith(f"{tmp_path} holds an unfinished run: ") and str(tmp_path / "best") in text
    (tmp_path / "checkpoints").rmdir()
    assert check_finished(str(tmp_path)) is None and check_finished("a/hub-name") is None


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
        self.now, self.cost, self.saved = 1000.0, cost, []

    def monotonic(self):
        return self.now

    def save(self, out, model, optimizers, state, keep):
        self.saved.append(state["step"])
        self.now += self.cost


@pytest.mark.parametrize(
    ("share", "cost", "expected"),
    [
        (0.05, 0.1, list(range(10, 100, 10))),  # .1 s in 10: all of them
        (0.05, 2.0, [10, 80]),  # two take 4 s, a twentieth of 80
        (0.5, 20.0, [10, 40, 60, 80]),
        (1.0, 60.0, list(range(10, 100, 10))),  # whatever they cost
    ],
)
def test_checkpoints_take_a_share_of_the_time_at_most(tmp_path, monkeypatch, share, cost, expected):
    """The first one too, unless it takes longer than was estimated."""
    clock = Clock(cost)
    monkeypatch.setattr(checkpoint, "save_checkpoint", clock.save)
    monkeypatch.setattr(checkpoint, "time", clock)
    cfg = FinetuneConfig(out=str(tmp_path), save_every=10, save_share=share)
    for _ in Checkpoints(cfg, tmp_path, nn.Linear(1, 1), [], {"inputs": {}}).steps(100):
        clock.now += 1
    assert clock.saved == expected
    assert len(clock.saved) == 1 or cost * len(clock.saved) <= share * (clock.now - 1000)


def test_the_time_of_the_first_checkpoint_is_estimated_from_the_size_of_the_model(tmp_path, monkeypatch):
    """200 MB of weights with their two moments take 3 s, a twentieth of 60: the first checkpoint is after 57 steps."""
    clock, model = Clock(3.0), nn.Linear(10_000, 5_000, bias=False, device="meta")
    monkeypatch.setattr(checkpoint, "save_checkpoint", clock.save)
    monkeypatch.setattr(checkpoint, "time", clock)
    cfg = FinetuneConfig(out=str(tmp_path), save_every=1, save_share=0.05)
    for _ in Checkpoints(cfg, tmp_path, model, [], {"inputs": {}}).steps(100):
        clock.now += 1
    assert clock.saved == [57]


def test_what_belongs_to_a_checkpoint_is_written_before_it_and_counts(tmp_path, monkeypatch):
    clock, order = Clock(1.0), []

    def before():
        order.append("before")
        clock.now += 100

    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *args: order.append("checkpoint") or clock.save(*args))
    monkeypatch.setattr(checkpoint, "time", clock)
    cfg = FinetuneConfig(out=str(tmp_path), save_every=1, save_share=0.05)
    for _ in Checkpoints(cfg, tmp_path, nn.Linear(1, 1), [], {"inputs": {}}, before_save=before).steps(100):
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


# ---- the steps of a run


@pytest.fixture
def broken(tmp_path):
    """(config, model, optimizer) of a run with checkpoints of its steps 3 and 5."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    for step in (3, 5):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        save_checkpoint(tmp_path, model, [optimizer], {"step": step, "inputs": {"texts": "a"}, "best": step / 10})
    return FinetuneConfig(out=str(tmp_path), save_every=100), model, optimizer


def adam():
    model = nn.Linear(2, 2)
    return model, torch.optim.Adam(model.parameters())


def test_resuming_takes_weights_moments_and_state_of_the_latest_checkpoint(broken, capsys):
    """A value that a checkpoint does not have, that of an earlier version say, is the one the loop begins with."""
    (cfg, before, moments), (model, optimizer) = broken, adam()
    state = {"inputs": {"texts": "a"}, "best": None, "new": 7}
    checkpoints = Checkpoints(replace(cfg, resume=True), cfg.out, model, [optimizer], state)
    assert checkpoints.state == {"step": 5, "inputs": {"texts": "a"}, "best": 0.5, "new": 7}
    assert list(checkpoints.steps(8)) == [5, 6, 7]
    assert torch.equal(model.weight, before.weight)
    assert optimizer.state_dict()["state"][0]["step"] == moments.state_dict()["state"][0]["step"] == 2
    assert "00000005" in capsys.readouterr().out


def test_without_resume_a_checkpoint_is_not_read(broken, capsys):
    (cfg, before, _), (model, optimizer) = broken, adam()
    checkpoints = Checkpoints(cfg, cfg.out, model, [optimizer], {"inputs": {}, "best": None})
    assert list(checkpoints.steps(2)) == [0, 1] and checkpoints.state["best"] is None
    assert not torch.equal(model.weight, before.weight) and not capsys.readouterr().out


def test_a_run_that_force_resumed_with_other_inputs_is_then_one_with_them(broken):
    """Its next checkpoint: else each later --resume would need --force again."""
    (cfg, *_), (model, optimizer) = broken, adam()
    now = {"inputs": {"texts": "b"}}
    checkpoints = Checkpoints(replace(cfg, resume=True, force=True), cfg.out, model, [optimizer], now)
    for _ in checkpoints.steps(7):
        pass
    checkpoints.save()
    assert latest_checkpoint(cfg.out).name == "00000006"
    assert Checkpoints(replace(cfg, resume=True), cfg.out, model, [optimizer], now).first_step == 6


def test_a_checkpoint_that_is_there_is_not_written_again_and_only_rank_0_writes(broken):
    (cfg, *_), (model, optimizer), state = broken, adam(), {"step": 5, "inputs": {}}
    there, ranks = latest_checkpoint(cfg.out).stat().st_ino, SimpleNamespace(rank=1, any=int)
    Checkpoints(cfg, cfg.out, model, [optimizer], state, before_save=None).save()
    Checkpoints(cfg, cfg.out, model, [optimizer], state | {"step": 6}, ranks, before_save=None).save()
    assert (latest_checkpoint(cfg.out).name, latest_checkpoint(cfg.out).stat().st_ino) == ("00000005", there)


def interrupted(cfg, model, signals):
    """The steps that a loop yields, and what ends it, where signals {step: numbers} arrive in its steps."""
    done = []
    try:
        for step in Checkpoints(cfg, cfg.out, model, [], {"inputs": {}}).steps(9):
            done.append(step)
            for number in signals.get(step, ()):
                signal.raise_signal(number)
    except (Stopped, KeyboardInterrupt) as error:
        return done, error
    return done, None


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM)])
def test_a_signal_is_acknowledged_and_ends_the_loop_after_the_step_and_its_checkpoint(tmp_path, capfd, numbers):
    """SIGTERM may come twice: torchrun passes it on, and so does a batch system."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done, error = interrupted(FinetuneConfig(out=str(tmp_path), save_every=100), nn.Linear(2, 2), {3: numbers})
    assert done == [0, 1, 2, 3] and isinstance(error, Stopped) and error.args == numbers[:1]
    assert latest_checkpoint(tmp_path).name == "00000004"
    assert capfd.readouterr().err.startswith("\nstopping after this step; Ctrl-C once more stops at once\n")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_second_interrupt_ends_the_loop_at_once(tmp_path):
    signals = {3: (signal.SIGINT, signal.SIGINT)}
    done, error = interrupted(FinetuneConfig(out=str(tmp_path), save_every=100), nn.Linear(2, 2), signals)
    assert done == [0, 1, 2, 3] and isinstance(error, KeyboardInterrupt) and latest_checkpoint(tmp_path) is None


def test_checkpoints_that_cannot_be_deleted_stop_no_run_and_are_swept_later(broken, monkeypatch):
    """A network disk refuses it while another process has a file open. The run is finished all the same."""
    out = Path(broken[0].out)

    def denied(*args, **kwargs):
        raise PermissionError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", denied)
        delete_checkpoints(out)
        remove_leftovers(out)
        assert latest_checkpoint(out) is None and list(out.iterdir())
    remove_leftovers(out)
    assert not list(out.iterdir())


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


def test_a_fingerprint_is_the_same_in_a_later_version():
    """It is in checkpoints: a run that was started before an update would ask for --force without a reason."""
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
    assert fingerprint("reviews", model) == "2b947cd7d27049f7"


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


def test_each_input_that_differs_is_shown_as_it_was_and_as_it_is(tmp_path):
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, model, [], {"step": 1, "inputs": {"texts": "a", "reward": "b", "teacher": "c"}})
    text = message(load_checkpoint, latest_checkpoint(tmp_path), model, [], {"texts": "d", "reward": "b", "judge": "e"})
    shown = "texts (a then, d now), teacher (c then, none now), judge (none then, e now)"
    assert f" was made with another content of: {shown}. " in text


def test_a_checkpoint_without_inputs_is_one_of_other_inputs(tmp_path):
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, model, [], {"step": 1})
    assert load_checkpoint(latest_checkpoint(tmp_path), model, [], {})["step"] == 1
    assert "texts (none then, a now)" in message(
        load_checkpoint, latest_checkpoint(tmp_path), model, [], {"texts": "a"}
    )


def test_a_checkpoint_of_an_earlier_version_is_refused_also_with_force(tmp_path):
    """It has no inputs, and the other values of its state have another meaning."""
    model, cfg = nn.Linear(2, 2), FinetuneConfig(out=str(tmp_path), resume=True, force=True)
    save_checkpoint(tmp_path, model, [], {"step": 1, "texts": "a", "best": 0.5})
    text = message(Checkpoints, cfg, tmp_path, model, [], {"inputs": {"texts": "a"}, "best": None})
    assert text.endswith("00000001 was saved by an earlier version of this project and cannot be resumed")


def test_the_moments_of_a_checkpoint_stay_when_its_file_is_written_over(tmp_path):
    """They are copied: else they would be mapped to the file, and follow it."""
    model = nn.Linear(2, 2)
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    adam.step()
    save_checkpoint(tmp_path, model, [adam], {"step": 1})
    other = torch.optim.Adam(model.parameters())
    load_checkpoint(latest_checkpoint(tmp_path), model, [other], {})
    file = latest_checkpoint(tmp_path) / TENSORS
    with open(file, "rb+") as f:
        f.seek(8 + int.from_bytes(file.read_bytes()[:8], "little"))
        f.write(bytes(file.stat().st_size - f.tell()))
    for before, after in zip(adam.state.values(), other.state.values()):
        assert torch.equal(before["exp_avg"], after["exp_avg"]) and after["exp_avg"].any()


def test_weights_that_do_not_fit_are_refused_with_the_folder_of_the_checkpoint(tmp_path):
    save_checkpoint(tmp_path, nn.Linear(2, 2), [], {"step": 1})
    text = message(load_checkpoint, latest_checkpoint(tmp_path), nn.Linear(3, 2), [], {})
    assert text == f"{tmp_path / 'checkpoints/00000001'} does not fit: weight is (2, 2), expected (2, 3)"
