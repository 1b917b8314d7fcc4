"""Models are located on disk and on the hub; missing and damaged files are refused with their path."""

import json
import os
import shutil
import time

import pytest
import torch
from conftest import message
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece

from reward import SentimentReward, open_classifier
from runtime import hub
from runtime.hub import WEIGHTS, load_gpt2, locate, missing_files, open_gpt2, read_tensors, weight_file

# ---- locating a model


def test_a_local_folder_is_its_own_location(gpt2_folder):
    assert locate(str(gpt2_folder)) == gpt2_folder


def test_a_folder_without_a_config_is_refused(tmp_path):
    assert message(locate, str(tmp_path)) == f"{tmp_path} has no config.json"


def test_a_folder_without_weights_is_refused_with_their_possible_names(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = message(locate, str(tmp_path))
    assert str(tmp_path) in text
    assert all(name in text for name in WEIGHTS)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_a_missing_path_is_not_taken_for_a_hub_name(name, monkeypatch):
    monkeypatch.setattr(hub, "snapshot", lambda *args, **kwargs: pytest.fail("a request to the hub"))
    assert message(locate, name) == f"{name} has no config.json"


@pytest.mark.parametrize(
    "name, command",
    [
        ("finetune_checkpoints/mini", "python finetune_gpt2.py --preset mini"),
        ("reward_checkpoints/gpt2/judge", "python reward.py --preset gpt2"),
        ("ppo_checkpoints/my_run", "python ppo.py"),
        ("dpo_checkpoints/mini/best", "python dpo.py --preset mini"),
    ],
)
def test_the_command_of_a_stage_that_has_not_been_run_is_shown(tmp_path, monkeypatch, name, command):
    monkeypatch.chdir(tmp_path)
    assert message(locate, name).endswith(f"; make it with: {command}")


def test_a_hub_name_without_a_network_is_refused_at_once_with_an_alternative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    text = message(locate, "somebody/no-such-model-in-the-cache")
    assert time.monotonic() - start < 5
    assert "'somebody/no-such-model-in-the-cache'" in text
    assert "--preset mini" in text


@pytest.mark.parametrize("name", ["a model with spaces", "one/two/three", "what?"])
def test_a_name_that_no_hub_model_can_have_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text = message(locate, name)
    assert text.startswith(f"model {name!r}: no such folder; ") and "on the hub: Repo id must" in text


def test_only_what_the_cache_lacks_is_downloaded(gpt2_folder, tmp_path, monkeypatch):
    """Safetensors before pickles, and never a repository's TensorFlow, Flax or ONNX files."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def from_cache(name, local, patterns):
        calls.append((local, patterns[-1]))
        return gpt2_folder

    monkeypatch.setattr(hub, "snapshot", from_cache)
    assert locate("gpt2") == gpt2_folder
    assert calls == [(True, "model*.safetensors*")]
    monkeypatch.setattr(hub, "snapshot", lambda *args, **kwargs: from_cache(*args, **kwargs) and tmp_path)
    calls.clear()
    text = message(locate, "gpt2")
    assert text.count("no config.json and no weights (") == 2  # in the cache and on the hub
    patterns = ["model*.safetensors*", "pytorch_model*.bin*"]
    assert calls == [(local, pattern) for local in (True, False) for pattern in patterns]


def test_safetensors_are_preferred_to_pickles(tmp_path):
    assert weight_file(tmp_path) is None
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


def test_a_gpt2_with_a_weight_that_is_not_finite_is_refused_with_its_name(gpt2_folder, tmp_path):
    """generate.py would otherwise write the same token again and again."""
    shutil.copytree(gpt2_folder, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.bias"][3] = float("inf")
    save_file(weights, tmp_path / "broken" / "model.safetensors")
    folder, config, tokenizer = open_gpt2(str(tmp_path / "broken"))
    text = message(load_gpt2, folder, config, len(tokenizer))
    assert text == f"{folder}: h.0.mlp.c_fc.bias has a value that is not finite"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", [truncated, nonsense, empty])
def test_a_damaged_weight_file_is_refused_with_its_path(tmp_path, name, damage):
    file, state = tmp_path / name, {"w": torch.arange(100.0)}
    save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
    damage(file)
    assert message(lambda: dict(read_tensors(tmp_path))).startswith(f"{file} is damaged")


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": Command(f"touch {tmp_path / 'ran'}")}, file)
    assert str(file) in message(lambda: dict(read_tensors(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard_is_refused_with_its_path(tmp_path):
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    text = message(lambda: dict(read_tensors(tmp_path)))
    assert f"{tmp_path / 'model-00001-of-00001.safetensors'} is damaged or missing" in text


def test_an_index_that_lists_no_shards_is_refused_with_its_path(tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text("{}")
    assert str(file) in message(lambda: dict(read_tensors(tmp_path)))


def test_a_pickle_of_more_than_tensors_is_refused_with_its_path(tmp_path):
    """A trainer's checkpoint: the weights are one level deeper, beside its counters."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "epoch": 3}, file)
    assert str(file) in message(lambda: dict(read_tensors(tmp_path)))


# ---- tokenizers


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("opens", [open_gpt2, SentimentReward.load, lambda name: open_classifier(name, dropout=0)])
def test_a_folder_without_a_tokenizer_is_refused_with_its_possible_names(opens, gpt2_folder, bert_folder, tmp_path):
    """If there is none, transformers builds an empty tokenizer: every review would be one token."""
    folder = shutil.copytree(gpt2_folder if opens is open_gpt2 else bert_folder, tmp_path / "model")
    for file in TOKENIZER_FILES:
        (folder / file).unlink()
    text = message(opens, str(folder))
    assert text == f"{folder} has no tokenizer ({', '.join(hub.TOKENIZERS)})"


@pytest.mark.parametrize(
    ("files", "complete"),
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
def test_the_files_of_a_tokenizer_are_recognized(tmp_path, files, complete):
    for name in ("config.json", "model.safetensors", *files.split()):
        (tmp_path / name).touch()
    assert (missing_files(tmp_path) == []) == complete


def test_a_sharded_model_is_complete_with_all_its_shards(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1", "b": "2", "c": "1"}}))
    for name in ("config.json", "tokenizer.json", "1"):
        (tmp_path / name).touch()
    assert missing_files(tmp_path) == [f"no weights ({', '.join(WEIGHTS)})"]
    (tmp_path / "2").touch()
    assert missing_files(tmp_path) == []


def test_a_tokenizer_that_cannot_encode_a_sentence_is_refused(gpt2_folder, bert_folder, tmp_path):
    """With an empty vocabulary, with one of other letters, and with a tokenizer that decodes to other words."""
    for name, kind in (("empty", BPE()), ("strange", WordPiece({"[UNK]": 0, "ξ": 1}, unk_token="[UNK]"))):
        folder = shutil.copytree(bert_folder, tmp_path / name)
        Tokenizer(kind).save(str(folder / "tokenizer.json"))
        assert "are its files complete?" in message(SentimentReward.load, str(folder))
    folder = shutil.copytree(gpt2_folder, tmp_path / "lossy")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "movie"}, "content": "film"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "which it decodes as 'the film was good'" in message(open_gpt2, str(folder))
