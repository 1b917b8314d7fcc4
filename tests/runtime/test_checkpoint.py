"""Reading and writing files atomically, refusing to replace runs, saving and resuming checkpoints."""

import gc
import json
import os
import signal
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
    delete_earlier_files,
    fingerprint,
    is_our_card,
    latest_checkpoint,
    load_checkpoint,
    match,
    read_file,
    read_json,
    remove_leftovers,
    replacing,
    save_checkpoint,
    write_text,
)
from runtime.errors import BadInput, Finished, Stopped, first_line
from runtime.log import RunLog

# ---- reading


@pytest.mark.parametrize("content", [None, "", "{", b"\xff\xfe"])
def test_a_missing_or_damaged_json_file_is_refused_with_its_path(tmp_path, content):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"{file} cannot be read" in message(read_json, file)


def test_an_error_without_a_message_is_reported_by_its_type():
    assert first_line(ValueError("\n one line\nanother")) == "one line"
    assert first_line(EOFError()) == "EOFError"


def test_the_tensors_of_a_safetensors_file_are_read_one_at_a_time_with_the_largest_first(tmp_path):
    """If the largest tensor came last, filling a model from the file would need twice its size in memory."""
    tensors = {"b": torch.rand(4), "a": torch.rand(2, 3), "d": torch.rand(3, 3), "c": torch.rand(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    read = list(read_file(tmp_path / "model.safetensors"))
    assert [name for name, _ in read] == ["d", "a", "b", "c"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read)


def test_weights_that_were_saved_on_a_gpu_are_read_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"w": torch.tensor([1.0, 2.0])}, tmp_path / "pytorch_model.bin")
    ((name, tensor),) = read_file(tmp_path / "pytorch_model.bin")
    assert name == "w" and tensor.device.type == "cpu" and tensor.tolist() == [1, 2]


class Touch:
    """A pickled object that creates a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_code_in_a_weight_file_is_run_even_if_an_environment_variable_allows_it(tmp_path, monkeypatch):
    torch.save({"w": Touch(tmp_path / "created")}, tmp_path / "pytorch_model.bin")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert "contains more than plain tensors" in message(list, read_file(tmp_path / "pytorch_model.bin"))
    assert not (tmp_path / "created").exists()


def zeros(count):
    return {f"tensor{i}": torch.zeros(2, i + 1) for i in range(count)}


def test_tensors_that_match_raise_nothing():
    assert match(zeros(3), zeros(3), "here") is None


def test_a_mismatch_lists_five_problems_and_counts_the_rest():
    text = message(match, {}, zeros(7), "the folder")
    assert text.startswith("the folder does not fit: missing tensor0 (2, 1); ")
    assert text.endswith("missing tensor4 (2, 5) and 2 more")
    assert message(match, {}, zeros(6), "it").endswith("missing tensor4 (2, 5) and 1 more")
    assert message(match, {}, zeros(5), "it").endswith("missing tensor4 (2, 5)")
    assert message(match, zeros(2), {}, "it") == "it does not fit: unexpected tensor0 (2, 1); unexpected tensor1 (2, 2)"
    wrong = {"tensor0": torch.zeros(3)}
    assert message(match, wrong, zeros(1), "it") == "it does not fit: tensor0 is (3,), expected (2, 1)"


# ---- saving


@pytest.fixture
def out(tmp_path):
    """A folder with a file that a save replaces and one that it does not touch."""
    (tmp_path / "model.bin").write_text("old")
    (tmp_path / "log.jsonl").write_text("kept")
    return tmp_path


@pytest.mark.parametrize("last", ["save_file", "flush"])
def test_an_incomplete_checkpoint_is_not_among_the_checkpoints(tmp_path, monkeypatch, last):
    """Whether the save is interrupted before its tensors are written or before they are on the disk."""
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, model, [], {"step": 1})

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, last, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, model, [], {"step": 2}, keep=1)
    assert latest_checkpoint(tmp_path).name == "00000001"


def test_the_leftovers_of_a_killed_save_are_inside_the_folder_of_the_run_and_are_removed(tmp_path, monkeypatch):
    """In /tmp they would stay forever, and a folder cannot be moved atomically from one disk to another."""

    def interrupt(tensors, file):
        assert file.parent.is_dir() and latest_checkpoint(tmp_path) is None
        remove_leftovers(tmp_path)
        assert not file.parent.exists() and not list((tmp_path / "checkpoints").iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, nn.Linear(2, 2), [], {"step": 1})


def test_files_are_flushed_before_they_replace_others_and_the_folder_afterwards(out, monkeypatch):
    """Otherwise a power cut would leave empty files, or undo the renaming after older checkpoints are deleted."""
    events = []
    flush, rename = checkpoint.flush, os.replace
    monkeypatch.setattr(checkpoint, "flush", lambda path: events.append(Path(path).name) or flush(path))
    monkeypatch.setattr(os, "replace", lambda old, new: events.append(f"rename {Path(new).name}") or rename(old, new))
    with replacing(out, {}) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("")
    assert sorted(events[:2]) == ["a", "b"] and events[2:] == ["rename a", out.name]


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_save_replaces_its_files_and_keeps_the_others(out):
    with replacing(out, {}) as folder:
        (folder / "model.bin").write_text("new")
        (folder / "config.json").write_text("{}")
        assert (out / "model.bin").read_text() == "old"
    assert contents(out) == {"model.bin": "new", "config.json": "{}", "log.jsonl": "kept"}


@pytest.mark.parametrize(
    "error, kind",
    [
        (OSError("disk full"), BadInput),
        (Exception("disk full"), BadInput),  # the type that the tokenizers library raises
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


def test_a_full_disk_is_reported_with_the_folder(out):
    with pytest.raises(BadInput) as caught, replacing(out, {}):
        raise OSError("No space left on device")
    assert str(caught.value) == f"{out} was not written, its old files are kept: No space left on device"


def test_saved_files_have_the_mode_of_any_other_file(out):
    """A temporary folder is 0700, and safetensors writes 0600: other users could not read the model."""
    with replacing(out, {}) as folder:
        save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    (out / "plain").write_text("")
    assert (out / "model.safetensors").stat().st_mode == (out / "plain").stat().st_mode


def test_a_text_file_is_replaced_without_leaving_a_temporary_file(out):
    write_text(out / "model.bin", "naïve")
    write_text(out / "new.json", "{}")
    assert (out / "model.bin").read_text(encoding="utf-8") == "naïve"
    assert sorted(file.name for file in out.iterdir()) == ["log.jsonl", "model.bin", "new.json"]


def test_a_text_file_is_unchanged_if_its_replacement_fails(out, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_text(out / "model.bin", "new")
    assert (out / "model.bin").read_text() == "old"


@pytest.mark.parametrize("text", ["a card\n{}\n", "\xe9\n{}\n", "a card", "\xe9", "text that quotes {}"])
def test_a_card_is_ours_if_it_has_our_mark_whatever_its_encoding(tmp_path, text):
    file = tmp_path / "README.md"
    file.write_bytes(text.format(CARD_MARK).encode("latin-1"))
    assert is_our_card(file) == (f"\n{CARD_MARK}\n" in text.format(CARD_MARK))


def test_a_new_run_deletes_the_files_of_an_earlier_run_in_its_folder_alone(tmp_path, monkeypatch):
    """Not those in the current folder, which has files of the same names if a policy is evaluated there."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    cards = ("README.md", "MODEL_CARD.md")
    results = ("results.json", "viewer.json", "samples.md", "example_results.png", "learning_curves.png", "report.html")
    for folder in (out, elsewhere):
        (folder / "checkpoints/00000002").mkdir(parents=True)
        for name in ("best", "tensorboard"):
            (folder / name).mkdir()
        for name in (*results, *cards, "log.jsonl", "samples.jsonl", "wandb_id", "notes.txt", "model.safetensors"):
            (folder / name).write_text(f"\n{CARD_MARK}\n" if name in cards else "")
    before = sorted(elsewhere.rglob("*"))
    monkeypatch.chdir(elsewhere)
    delete_earlier_files(out)
    assert {path.name for path in out.rglob("*")} == {"checkpoints", "notes.txt", "model.safetensors"}
    assert sorted(elsewhere.rglob("*")) == before


# ---- before a run


@pytest.fixture
def cfg(tmp_path):
    """A config whose `out` contains a run with this config."""
    cfg = FinetuneConfig(out=str(tmp_path), lr=1e-4)
    (tmp_path / RUN_CONFIG).write_text(json.dumps(asdict(cfg)))
    return cfg


def test_a_folder_without_a_run_accepts_any_config(tmp_path):
    assert check_run(FinetuneConfig(out=str(tmp_path)), "weights") is None
    assert check_run(FinetuneConfig(out=str(tmp_path / "not there")), "weights") is None


def test_a_run_may_be_repeated_with_its_own_config(cfg):
    assert check_run(cfg, "weights") is None
    same_result = replace(cfg, device="cpu", report_to="none")
    assert check_run(same_result, "weights") is None


def test_a_run_of_another_config_is_refused_with_the_fields_that_differ(cfg):
    text = message(check_run, replace(cfg, lr=2e-4, dtype="fp32"), "weights")
    assert f"{cfg.out} contains a run of another config (dtype 'auto' -> 'fp32', lr 0.0001 -> 0.0002)" in text
    assert "--force replaces it" in text
    assert "--out" in text


def test_of_many_fields_that_differ_five_are_named(cfg):
    text = message(check_run, replace(cfg, lr=2e-4, dtype="fp32", seed=9, block_size=7, batch_size=5, epochs=9), "w")
    assert text.count(" -> ") == 5


def test_force_replaces_a_run_of_another_config(cfg):
    assert check_run(replace(cfg, lr=2e-4, force=True), "weights") is None


FINISHED, UNFINISHED = "contains a finished run: ", "contains an unfinished run: --resume resumes it, --force replaces"
CASES = {  # files of a run with two results: what is raised without flags, with --resume, with --force
    "": ("", "", ""),
    "one": (UNFINISHED, "", ""),
    "one two": (FINISHED + "--force replaces", Finished, ""),
    "checkpoints/00000003": (UNFINISHED, "", ""),
    "one checkpoints/00000003": (UNFINISHED, "", ""),
    "reward/checkpoints/00000003": (UNFINISHED, "", ""),
    "judge/checkpoints/00000003": (UNFINISHED, "", ""),
    "one two checkpoints": ("", "", ""),  # --force was given, and the run was killed before its first checkpoint
    "one checkpoints": (UNFINISHED, "", ""),
}


@pytest.mark.parametrize("files", CASES)
@pytest.mark.parametrize("flag", ["", "resume", "force"])
def test_no_finished_run_is_replaced_without_force(cfg, files, flag):
    """Neither is a run of which a part is finished: a reward without its judge."""
    for name in files.split():
        path = Path(cfg.out, name)
        path.mkdir(parents=True) if "checkpoints" in name else path.touch()
    expected = dict(zip(("", "resume", "force"), CASES[files]))[flag]
    changed = replace(cfg, **{flag: True}) if flag else cfg
    if expected is Finished:
        with pytest.raises(Finished, match=FINISHED + "nothing is left to resume"):
            check_run(changed, "one", "two")
    elif expected:
        assert expected in message(check_run, changed, "one", "two")
    else:
        assert check_run(changed, "one", "two") is None


FOREIGN = ["best/mine", "checkpoints/mine", "tensorboard/mine", "log.jsonl", "samples.jsonl", "report.html"]


@pytest.mark.parametrize("name", [*FOREIGN, "judge/best/mine"])
@pytest.mark.parametrize("resume", [False, True])
def test_files_of_no_known_run_are_replaced_only_by_force(tmp_path, name, resume):
    """Files that a new run would delete, in a folder without the config of a run."""
    file, cfg = tmp_path / name, FinetuneConfig(out=str(tmp_path), resume=resume)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    assert f"belongs to no known run (no {RUN_CONFIG}): --force replaces it" in message(check_run, cfg, "weights")
    assert check_run(replace(cfg, force=True), "weights") is None
    (tmp_path / RUN_CONFIG).write_text(json.dumps(asdict(cfg)))
    if "checkpoints" not in name:
        assert check_run(cfg, "weights") is None


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/"])
def test_files_that_a_run_does_not_touch_are_no_obstacle(tmp_path, name):
    """Neither is the empty folder of a run that was killed at its start."""
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("mine")
    assert check_run(FinetuneConfig(out=str(tmp_path)), "weights") is None


def test_the_policy_of_an_unfinished_run_is_refused(tmp_path):
    """Weights beside checkpoints are of an earlier run, whose config --force has already replaced."""
    (tmp_path / "checkpoints").mkdir()
    text = message(check_finished, str(tmp_path))
    assert text.startswith(f"{tmp_path} contains an unfinished run: ") and str(tmp_path / "best") in text
    (tmp_path / "checkpoints").rmdir()
    assert check_finished(str(tmp_path)) is None and check_finished("a/hub-name") is None


# ---- the time that checkpoints take


class Clock:
    """time.monotonic, advanced by `cost` seconds per save and by one second per step."""

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
        (0.05, 0.1, list(range(10, 100, 10))),  # .1 s in 10 s: all
        (0.05, 2.0, [10, 80]),  # two take 4 s, a twentieth of 80 s
        (0.5, 20.0, [10, 40, 60, 80]),
        (1.0, 60.0, list(range(10, 100, 10))),  # all, whatever their cost
    ],
)
def test_checkpoints_take_at_most_a_share_of_the_time(tmp_path, monkeypatch, share, cost, expected):
    """The first one too, unless it takes longer than estimated."""
    clock = Clock(cost)
    monkeypatch.setattr(checkpoint, "save_checkpoint", clock.save)
    monkeypatch.setattr(checkpoint, "time", clock)
    cfg = FinetuneConfig(out=str(tmp_path), save_every=10, save_share=share)
    for _ in Checkpoints(cfg, tmp_path, nn.Linear(1, 1), [], {}, {}).steps(100):
        clock.now += 1
    assert clock.saved == expected
    assert len(clock.saved) == 1 or cost * len(clock.saved) <= share * (clock.now - 1000)


def test_the_time_of_the_first_checkpoint_is_estimated_from_the_size_of_the_model(tmp_path, monkeypatch):
    """200 MB of weights and their two moments take 3 s, a twentieth of 60 s: the first checkpoint is at step 57."""
    clock, model = Clock(3.0), nn.Linear(10_000, 5_000, bias=False, device="meta")
    monkeypatch.setattr(checkpoint, "save_checkpoint", clock.save)
    monkeypatch.setattr(checkpoint, "time", clock)
    cfg = FinetuneConfig(out=str(tmp_path), save_every=1, save_share=0.05)
    for _ in Checkpoints(cfg, tmp_path, model, [], {}, {}).steps(100):
        clock.now += 1
    assert clock.saved == [57]


def test_the_garbage_collector_ignores_what_exists_before_the_loop_and_only_in_it(tmp_path):
    """Also if a loop ends by an exception whose traceback is kept, as a notebook does."""
    cfg = FinetuneConfig(out=str(tmp_path), report_to="none")
    log, earlier, later, seen = RunLog(cfg), [], [], []

    def is_collected(thing):
        return any(other is thing for other in gc.get_objects())  # without those that are frozen

    def loop():
        for step in log.progress(Checkpoints(cfg, tmp_path, nn.Linear(1, 1), [], {}, {}), 9, "loop", "step"):
            later.append([step])
            seen.append((is_collected(earlier), all(map(is_collected, later))))
            if step == 1:
                raise ValueError

    handler = signal.getsignal(signal.SIGINT)
    assert is_collected(earlier)
    with pytest.raises(ValueError) as kept:
        loop()
    assert kept.tb and seen == [(False, True), (False, True)]
    assert is_collected(earlier) and gc.get_freeze_count() == 0 and signal.getsignal(signal.SIGINT) is handler


def test_the_time_of_before_save_counts_as_that_of_the_checkpoint(tmp_path, monkeypatch):
    clock, order = Clock(1.0), []

    def before():
        order.append("before")
        clock.now += 100

    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *args: order.append("checkpoint") or clock.save(*args))
    monkeypatch.setattr(checkpoint, "time", clock)
    cfg = FinetuneConfig(out=str(tmp_path), save_every=1, save_share=0.05)
    for _ in Checkpoints(cfg, tmp_path, nn.Linear(1, 1), [], {}, {}, before_save=before).steps(100):
        clock.now += 1
    assert order == ["before", "checkpoint"]  # a second one would take more than a twentieth of the time


def test_the_best_weights_are_copied_when_they_are_kept_and_written_once(tmp_path):
    """Catches weights that change with the model in later steps."""
    model, written = nn.Linear(1, 1), []
    best = BestWeights(model)
    best.save = lambda weights: written.append(weights["bias"].item())
    best.write()
    assert not written
    for number in (1.0, 2.0):
        model.bias.data.fill_(number)
        best.keep()
    model.bias.data.fill_(3.0)
    best.write(), best.write()
    assert written == [2.0]


# ---- the steps of a run


class Part:
    """A part of a run: its attributes `best` and `rollouts` are saved, `other` is not."""

    saved = ("best", "rollouts")

    def __init__(self, best=None):
        self.best, self.rollouts, self.other = best, [], best


INPUTS = {"texts": "a", "reward": "b"}


@pytest.fixture
def stopped(tmp_path):
    """(config, model, optimizer) of a run with checkpoints of its steps 3 and 5."""
    model, optimizer = adam()
    for step in (3, 5):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        state = {"step": step, "inputs": INPUTS, "part": {"best": step / 10, "rollouts": [[step]]}}
        save_checkpoint(tmp_path, model, [optimizer], state)
    return FinetuneConfig(out=str(tmp_path), save_every=100, resume=True), model, optimizer


def adam():
    model = nn.Linear(2, 2)
    return model, torch.optim.Adam(model.parameters())


def resume(cfg, inputs=INPUTS, part=None, **changes):
    """The Checkpoints of a run that is resumed with a new model."""
    model, optimizer = adam()
    return Checkpoints(replace(cfg, **changes), cfg.out, model, [optimizer], inputs, {"part": part or Part()})


def test_resuming_restores_weights_moments_and_attributes_of_the_latest_checkpoint(stopped, capsys):
    cfg, before, moments = stopped
    part = Part(best=0.9)
    checkpoints = resume(cfg, part=part)
    assert (part.best, part.rollouts, part.other) == (0.5, [[5]], 0.9)
    assert list(checkpoints.steps(8)) == [5, 6, 7]
    assert torch.equal(checkpoints.model.weight, before.weight)
    restored, saved = checkpoints.optimizers[0].state_dict()["state"], moments.state_dict()["state"]
    assert restored[0]["step"] == saved[0]["step"] == 2 and restored.keys() == saved.keys()
    for i, name in ((0, "exp_avg"), (1, "exp_avg_sq")):
        assert torch.equal(restored[i][name], saved[i][name])
    assert "00000005" in capsys.readouterr().out


def test_without_resume_no_checkpoint_is_read(stopped, capsys):
    cfg, before, _ = stopped
    part = Part()
    checkpoints = resume(cfg, part=part, resume=False)
    assert list(checkpoints.steps(2)) == [0, 1] and part.best is None
    assert not torch.equal(checkpoints.model.weight, before.weight) and not capsys.readouterr().out


def test_a_saved_run_has_the_same_attributes_when_it_is_resumed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    part, cfg = Part(best=0.25), FinetuneConfig(out=str(tmp_path), save_every=2, save_share=1)
    for step in resume(cfg, part=part).steps(4):
        part.rollouts.append(step)
    later = Part()
    assert resume(cfg, part=later, resume=True).first_step == 2
    assert (later.best, later.rollouts) == (0.25, [0, 1])


def test_a_run_resumed_by_force_with_different_inputs_saves_the_new_ones(stopped):
    """Otherwise each later --resume would need --force again."""
    cfg, *_ = stopped
    inputs = {"texts": "b"}
    checkpoints = resume(cfg, inputs, force=True)
    for _ in checkpoints.steps(7):
        pass
    checkpoints.save()
    assert latest_checkpoint(cfg.out).name == "00000006"
    assert resume(cfg, inputs).first_step == 6


def test_an_existing_checkpoint_is_not_written_again_and_only_rank_0_writes(stopped):
    cfg, *_ = stopped
    inode, other_rank = latest_checkpoint(cfg.out).stat().st_ino, SimpleNamespace(rank=1, any=int)
    checkpoints = resume(cfg)
    checkpoints.save()
    checkpoints.step, checkpoints.ranks = 6, other_rank
    checkpoints.save()
    assert (latest_checkpoint(cfg.out).name, latest_checkpoint(cfg.out).stat().st_ino) == ("00000005", inode)


def test_an_error_is_returned_after_a_checkpoint_with_the_step_to_resume_at(stopped):
    cfg, *_ = stopped
    checkpoints = resume(cfg)
    checkpoints.step = 6
    text = str(checkpoints.save_before(BadInput("the server is down")))
    assert text.startswith("the server is down. The run is saved: --resume resumes it at step 6, ")
    assert latest_checkpoint(cfg.out).name == "00000006"


def interrupted(cfg, model, signals):
    """Run a loop in which signals {step: numbers} arrive; return its steps and the exception that ended it."""
    done = []
    try:
        for step in Checkpoints(cfg, cfg.out, model, [], {}, {}).steps(9):
            done.append(step)
            for number in signals.get(step, ()):
                signal.raise_signal(number)
    except (Stopped, KeyboardInterrupt) as error:
        return done, error
    return done, None


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM)])
def test_a_signal_is_acknowledged_and_ends_the_loop_after_the_step_with_a_checkpoint(tmp_path, capfd, numbers):
    """SIGTERM may come twice: torchrun forwards it, and so does a batch system."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done, error = interrupted(FinetuneConfig(out=str(tmp_path), save_every=100), nn.Linear(2, 2), {3: numbers})
    assert done == [0, 1, 2, 3] and isinstance(error, Stopped) and error.args == numbers[:1]
    assert latest_checkpoint(tmp_path).name == "00000004"
    assert capfd.readouterr().err.startswith("\nstopping after this step; press Ctrl-C again to stop now\n")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_second_interrupt_ends_the_loop_at_once(tmp_path):
    signals = {3: (signal.SIGINT, signal.SIGINT)}
    done, error = interrupted(FinetuneConfig(out=str(tmp_path), save_every=100), nn.Linear(2, 2), signals)
    assert done == [0, 1, 2, 3] and isinstance(error, KeyboardInterrupt) and latest_checkpoint(tmp_path) is None


def test_checkpoints_that_cannot_be_deleted_do_not_stop_a_run_and_are_removed_later(stopped, monkeypatch):
    """A network disk may refuse it while another process has a file open."""
    out = Path(stopped[0].out)

    def denied(*args, **kwargs):
        raise PermissionError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", denied)
        delete_checkpoints(out)
        remove_leftovers(out)
        assert latest_checkpoint(out) is None and list(out.iterdir())
    remove_leftovers(out)
    assert not list(out.iterdir())


# ---- the inputs of a run


def test_a_fingerprint_depends_on_names_shapes_dtypes_and_values():
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
    """Checkpoints contain it: a run that was started before an update would need --force without a reason."""
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
    assert fingerprint("reviews", model) == "2b947cd7d27049f7"


@pytest.mark.parametrize(
    ("inputs", "hashes"),
    [
        ({"texts": "a", "reward": "c"}, "reward (b then, c now)"),
        ({"texts": "a"}, "reward (b then, - now)"),
        (INPUTS | {"new": "d"}, "new (- then, d now)"),
        ({"texts": "d", "judge": "e"}, "texts (a then, d now), reward (b then, - now), judge (- then, e now)"),
    ],
)
def test_a_run_is_resumed_with_different_inputs_only_by_force(stopped, capsys, inputs, hashes):
    """Also if an input is missing, or was not recorded then."""
    cfg, *_ = stopped
    folder = latest_checkpoint(cfg.out)
    assert message(resume, cfg, inputs) == f"{folder} was made with different inputs: {hashes}. --force resumes anyway"
    assert resume(cfg, inputs, force=True).first_step == 5
    assert capsys.readouterr().err == f"warning: resuming with different inputs: {hashes}\n"
    assert resume(cfg).first_step == 5 and not capsys.readouterr().err


@pytest.mark.parametrize(
    "state",
    [
        {"step": 1, "texts": "a", "best": 0.5},
        {"step": 1, "inputs": INPUTS, "part": {"best": 0.5, "rollouts": []}, "other": {}},
        {"step": 1, "inputs": INPUTS, "part": {"best": 0.5}},
    ],
)
def test_a_checkpoint_of_another_version_is_refused_also_with_force(tmp_path, state):
    """Its state or that of a part has other keys."""
    save_checkpoint(tmp_path, nn.Linear(2, 2), [], state)
    model, _ = adam()
    cfg = FinetuneConfig(out=str(tmp_path), resume=True, force=True)
    text = message(Checkpoints, cfg, tmp_path, model, [], INPUTS, {"part": Part()})
    assert text.endswith("00000001 was saved by another version of this project and cannot be resumed")


# ---- tensors


def test_restored_moments_do_not_change_with_the_file(tmp_path):
    """They are copied: otherwise they would be mapped to the file."""
    model, optimizer = adam()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, model, [optimizer], {"step": 1})
    other = torch.optim.Adam(model.parameters())
    load_checkpoint(latest_checkpoint(tmp_path), model, [other])
    file = latest_checkpoint(tmp_path) / TENSORS
    with open(file, "rb+") as f:
        f.seek(8 + int.from_bytes(file.read_bytes()[:8], "little"))
        f.write(bytes(file.stat().st_size - f.tell()))
    for before, after in zip(optimizer.state.values(), other.state.values()):
        assert torch.equal(before["exp_avg"], after["exp_avg"]) and after["exp_avg"].any()


def test_weights_that_do_not_fit_are_refused_with_the_folder_of_the_checkpoint(tmp_path):
    save_checkpoint(tmp_path, nn.Linear(2, 2), [], {"step": 1})
    text = message(load_checkpoint, latest_checkpoint(tmp_path), nn.Linear(3, 2), [])
    assert text == f"{tmp_path / 'checkpoints/00000001'} does not fit: weight is (2, 2), expected (2, 3)"


@pytest.mark.parametrize(
    "name", ["optimizer.0.9.exp_avg", "optimizer.1.0.exp_avg", "optimizer.x.exp_avg", "weight", ""]
)
def test_a_tensor_of_no_weight_and_no_moment_is_refused(tmp_path, name):
    """As in a damaged file."""
    model, optimizer = adam()
    save_checkpoint(tmp_path, model, [optimizer], {"step": 1})
    folder = latest_checkpoint(tmp_path)
    tensors = {old: tensor.clone() for old, tensor in read_file(folder / TENSORS)}  # not mapped: Windows refuses that
    save_file(tensors | {name: torch.zeros(2, 2)}, folder / TENSORS)
    expected = f"{folder} does not fit: {name} (2, 2) is not of this run's optimizers"
    assert message(load_checkpoint, folder, model, [optimizer]) == expected
