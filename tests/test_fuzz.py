"""Any content of a file or flag works or raises BadInput: no traceback, no lost results."""

import json
import shutil
from dataclasses import asdict, fields

import pytest
import torch
from conftest import reviews_csv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import EvaluateConfig, FinetuneConfig, GenerateConfig, PPOConfig, RewardConfig
from data import SHARES, load_splits
from reward import positive_index
from runtime.checkpoint import RUN_CONFIG, check_run, latest_checkpoint, load_checkpoint, save_checkpoint
from runtime.cli import SAME_RESULT, parse
from runtime.errors import BadInput
from runtime.hub import load_gpt2, load_tokenizer, read_config

CLASSES = [FinetuneConfig, RewardConfig, PPOConfig, EvaluateConfig, GenerateConfig]
VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "0", "-1", "1e999", "nan", "True", "none", "auto", "--", "-", "a b", "\x00", "é", "[]", "1,2"]
    ),
    st.text(max_size=8),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def fuzz(examples):
    same_folder = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=same_folder)


def refused(function, *args):
    """Return the BadInput that a call raises, or None; any other exception is a bug."""
    try:
        function(*args)
    except BadInput as error:
        return error
    return None


def has_message(error):
    """Return whether there was no error, or one with a message."""
    return error is None or str(error).strip() != ""


@pytest.mark.parametrize("cls", CLASSES)
@fuzz(40)
@given(data=st.data())
def test_any_value_of_any_flag_is_accepted_or_refused(cls, data):
    name = data.draw(st.sampled_from([field.name for field in fields(cls)]))
    assert has_message(refused(parse, cls, [f"--{name}", data.draw(VALUES)]))


@pytest.mark.parametrize("cls", CLASSES[1:3])
@fuzz(15)
@given(argv=st.lists(VALUES, max_size=3).filter(lambda argv: not {"-h", "--help"} & set(argv)))
def test_any_command_line_is_accepted_or_refused(cls, argv):
    assert has_message(refused(parse, cls, argv))


@fuzz(300)
@given(
    st.dictionaries(st.integers(-1, 5), st.sampled_from(["POSITIVE", "pos", "LABEL_1", "", None, 3])),
    st.sampled_from(["", "POSITIVE", "LABEL_1", "x"]),
)
def test_the_positive_label_of_any_label_map_is_one_of_its_labels_or_it_is_refused(id2label, positive_label):
    try:
        index = positive_index(id2label, positive_label, "a classifier")
    except BadInput:
        return
    assert str(id2label[index]).lower() in ("positive", "pos", "label_1", "x")
    assert index < len(id2label)


ROWS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"text": JSON | st.text(max_size=20), "label": JSON | st.sampled_from([0, 1, "pos"]), "other": JSON},
    ),
    max_size=5,
)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@fuzz(25)
@given(rows=ROWS, garbage=st.binary(max_size=30), place=st.integers(0, 200))
def test_any_rows_in_a_file_of_reviews_are_read_or_refused(suffix, tmp_path_factory, rows, garbage, place):
    """Usable reviews followed by random rows, with random bytes inserted at a random place."""
    folder = tmp_path_factory.mktemp("rows")
    good = reviews_csv(folder / "good.csv", rows=120).read_text().splitlines()
    lines = [json.dumps(row) for row in rows]
    if suffix == "jsonl":
        good = [json.dumps(dict(zip(("text", "label"), line.rsplit(",", 1)))) for line in good[1:]]
    file = folder / f"reviews.{suffix}"
    content = "\n".join(good + lines).encode("utf-8", "surrogatepass")
    file.write_bytes(content[:place] + garbage + content[place:])
    try:
        splits = load_splits(str(file))
    except BadInput as error:
        assert str(file) in str(error)
        return
    assert set(splits) == set(SHARES)
    assert all(isinstance(text, str) and text for reviews in splits.values() for text in reviews.texts)


# ---- folders


def small():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run with two checkpoints."""
    out = tmp_path_factory.mktemp("run")
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    for step in (1, 2):
        save_checkpoint(out, model, [optimizer], {"step": step, "inputs": {"texts": "abc"}})
    return out


def damage(file, data):
    """Flip a bit of a file, truncate it or insert a byte."""
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, max(0, len(content) - 1)))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "empty"]))
    if kind == "flip" and content:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    content = {"cut": content[:place], "empty": b"", "insert": content[:place] + b"\x00" + content[place:]}.get(
        kind, content
    )
    file.write_bytes(content)


@fuzz(60)
@given(data=st.data())
def test_a_damaged_checkpoint_is_loaded_or_refused_with_its_path(run_folder, data, tmp_path_factory):
    """The checkpoint before it can then be loaded."""
    out = tmp_path_factory.mktemp("damaged") / "out"
    shutil.copytree(run_folder, out)
    latest, model = latest_checkpoint(out), small()
    damage(data.draw(st.sampled_from(sorted(latest.iterdir()))), data)
    error = refused(load_checkpoint, latest, model, [torch.optim.Adam(model.parameters())])
    assert error is None or str(latest) in str(error)
    shutil.rmtree(latest)
    assert load_checkpoint(latest_checkpoint(out), model, [torch.optim.Adam(model.parameters())])["step"] == 1


@fuzz(40)
@given(data=st.data())
def test_a_damaged_model_folder_is_loaded_or_refused_with_its_path(gpt2_folder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "gpt2"
    shutil.copytree(gpt2_folder, folder)
    damage(data.draw(st.sampled_from(sorted(folder.iterdir()))), data)

    def load():
        config = read_config(folder)
        load_tokenizer(folder, config)
        load_gpt2(folder, config)

    error = refused(load)
    assert error is None or str(folder) in str(error)


@fuzz(150)
@given(
    st.dictionaries(
        st.sampled_from(["n_layer", "n_head", "n_embd", "vocab_size", "layer_norm_epsilon", "n_inner"]), JSON
    )
)
def test_any_config_json_is_read_or_refused(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"} | values))
    assert has_message(refused(read_config, tmp_path))


@fuzz(100)
@given(st.dictionaries(st.sampled_from([field.name for field in fields(PPOConfig)]), JSON, min_size=1) | JSON)
def test_a_run_with_another_config_is_never_replaced(tmp_path, changes):
    """An unfinished run may be replaced only if its config is the same in every field that changes results."""
    cfg = PPOConfig(out=str(tmp_path))
    saved = asdict(cfg) | changes if isinstance(changes, dict) else changes
    (tmp_path / RUN_CONFIG).write_text(json.dumps(saved))
    (tmp_path / "model.safetensors").write_text("hours of work")
    error = refused(check_run, cfg, "results.json")
    ours = {name: value for name, value in asdict(cfg).items() if name not in SAME_RESULT}
    same = isinstance(saved, dict) and {name: saved[name] for name in ours} == ours
    assert (error is None) == same
    assert (tmp_path / "model.safetensors").read_text() == "hours of work"
