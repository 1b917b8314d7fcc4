"""Models found on disk and on the hub, and damaged files that are refused with their path."""

import json
import os
import shutil
import time

import pytest
import torch
from conftest import message
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece

from reward import SentimentReward, open_classifier
from runtime import hub
from runtime.hub import WEIGHTS, locate, open_gpt2, read_tensors, weight_file

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
    monkeypatch.setattr(hub, "snapshot", lambda *args, **kwargs: pytest.fail("asked the hub"))
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

    def from_cache(name, local, patterns, revision=None):
        calls.append((local, patterns[-1]))
        return gpt2_folder

    monkeypatch.setattr(hub, "snapshot", from_cache)
    assert locate("gpt2") == gpt2_folder
    assert calls == [(True, "model*.safetensors*")]
    monkeypatch.setattr(hub, "snapshot", lambda *args, **kwargs: from_cache(*args, **kwargs) and tmp_path)
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


# ---- tokenizers


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("opens", [open_gpt2, SentimentReward.load, lambda name: open_classifier(name, dropout=0)])
def test_a_folder_without_a_tokenizer_is_refused_with_the_names_looked_for(opens, gpt2_folder, bert_folder, tmp_path):
    """transformers builds an empty tokenizer where there is none: every review would be one token."""
    folder = shutil.copytree(gpt2_folder if opens is open_gpt2 else bert_folder, tmp_path / "model")
    for file in TOKENIZER_FILES:
        (folder / file).unlink()
    text = message(opens, str(folder))
    assert text == f"{folder} holds no tokenizer: looked for {', '.join(hub.TOKENIZERS)}"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ("tokenizer.json", True),
        ("vocab.txt", True),
        ("vocab.json merges.txt", True),
        ("spiece.model", True),
        ("vocab.json", False),
        ("merges.txt", False),
        ("tokenizer_config.json special_tokens_map.json", False),
    ],
)
def test_the_files_of_a_tokenizer_are_known(tmp_path, files, found):
    for name in files.split():
        (tmp_path / name).touch()
    assert hub.has_tokenizer(tmp_path) == found


def test_a_tokenizer_that_cannot_encode_a_sentence_is_refused(gpt2_folder, bert_folder, tmp_path):
    """An empty vocabulary; one that knows no letter of it; one that decodes to other words."""
    for name, kind in (("empty", BPE()), ("strange", WordPiece({"[UNK]": 0, "ξ": 1}, unk_token="[UNK]"))):
        folder = shutil.copytree(bert_folder, tmp_path / name)
        Tokenizer(kind).save(str(folder / "tokenizer.json"))
        assert "are its files complete?" in message(SentimentReward.load, str(folder))
    folder = shutil.copytree(gpt2_folder, tmp_path / "lossy")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "movie"}, "content": "film"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "which it decodes as 'the film was good'" in message(open_gpt2, str(folder))
