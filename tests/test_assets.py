"""The models in asset/mini: their size, their cards, their quality, and the reviews that they were trained on."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from config import FinetuneConfig, RewardConfig
from data import key, language_model_texts, load_splits, pack
from finetune_gpt2 import validate, validation_texts
from reward import SentimentReward, check_reward
from runtime.checkpoint import fingerprint
from runtime.cli import differing, parse
from runtime.hub import load_gpt2, open_gpt2, read_tensors

MINI = ROOT / "asset" / "mini"
LIMITS = {"gpt2": 20e6, "reward": 8e6, "judge": 8e6}  # bytes of a folder
every_model = pytest.mark.parametrize("name", LIMITS)
# accuracy on reviews and on 32 words; a linear classifier of the same labels has .890 and .756, .890 and .768
ACCURACIES = {"reward": (0.88, 0.765), "judge": (0.895, 0.768)}
every_classifier = pytest.mark.parametrize("name", ["reward", "judge"])


def results(name):
    return json.loads((MINI / name / "results.json").read_text())


@pytest.fixture(scope="module")
def splits():
    return load_splits("movie-reviews")


@every_model
def test_a_folder_is_small_and_in_16_bits(name):
    assert sum(file.stat().st_size for file in (MINI / name).iterdir()) < LIMITS[name]
    assert {tensor.dtype for _, tensor in read_tensors(MINI / name)} == {torch.float16}


@every_model
def test_a_card_has_the_numbers_of_its_results(name):
    """Detects a card that was not updated with the model."""
    card, values = (MINI / name / "README.md").read_text(), results(name)
    after = values["after"]
    numbers = [values["data"], f"{values['parameters']:,}"]
    if name == "gpt2":
        numbers += [f"{values['tokens']:,}", f"{after['perplexity']:.1f}", f"{after['bits_per_character']:.3f}"]
    else:
        accuracies = [after[part]["accuracy"] for part in ("reviews", "short_texts")]
        numbers += [f"{100 * accuracy:.1f} %" for accuracy in accuracies]
    assert [number for number in numbers if number not in card] == []


def test_no_review_of_the_evaluation_or_of_the_prompts_was_trained_on(splits):
    """According to the hash of the data in the results of each run."""
    trained = {
        "gpt2": language_model_texts(splits),
        "reward": language_model_texts(splits),
        "judge": language_model_texts(splits),
    }
    teacher = json.loads((ROOT / "asset/medium/results.json").read_text())
    assert teacher["data"] == fingerprint(*trained["gpt2"])
    held_out = {key(text) for name in ("evaluation", "prompts") for text in splits[name].texts}
    for name, texts in trained.items():
        assert results(name)["data"] == fingerprint(*texts)
        assert held_out and not held_out & {key(text) for text in texts}
    for name in ("reward", "judge"):  # the labels of the other's reviews were not used: a teacher gave the targets
        saved = json.loads((MINI / name / "run_config.json").read_text())
        assert saved["unlabelled"] and saved["teacher"] and saved["only"] == name
    assert not {key(text) for text in splits["reward"].texts} & {key(text) for text in splits["judge"].texts}


def test_gpt2_has_the_bits_per_character_of_its_card_and_the_logits_of_transformers(splits):
    """On the first 20,000 tokens of the validation stream, within 3 %."""
    from transformers import AutoModelForCausalLM

    folder, config, tokenizer = open_gpt2(str(MINI / "gpt2"))
    texts = validation_texts(splits["prompts"].texts, tokenizer, 20_000)
    stream = pack(texts, tokenizer)
    model = load_gpt2(folder, config, len(tokenizer))
    _, bits = validate(model, stream, sum(map(len, texts)), config.n_positions, 8, tokenizer.eos_token_id)
    assert results("gpt2")["after"]["bits_per_character"] <= 1.42
    assert bits == pytest.approx(results("gpt2")["after"]["bits_per_character"], rel=0.03)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(stream[None, :256]).long()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "folder, flags", [("mini/gpt2", "--preset mini --init_from scratch"), ("medium", "--preset medium")]
)
def test_the_command_on_the_card_of_a_gpt2_has_the_constants_of_its_training(folder, flags):
    """Catches a preset that was changed without training the model again."""
    saved = json.loads((ROOT / "asset" / folder / "run_config.json").read_text())
    free = ("save_every", "teacher_share") if folder == "medium" else ("save_every",)  # without effect on the result
    cfg = parse(FinetuneConfig, flags.split())
    assert differing(cfg, saved | {name: getattr(cfg, name) for name in free}) == []
    card = (ROOT / "asset" / folder / "README.md").read_text()
    assert f"python finetune_gpt2.py {flags}" in card
    assert saved["teacher"] == ("" if folder == "medium" else parse(FinetuneConfig, ["--preset", "medium"]).out)


def test_the_card_of_medium_has_the_numbers_of_its_results():
    card = (ROOT / "asset/medium/README.md").read_text()
    values = json.loads((ROOT / "asset/medium/results.json").read_text())
    after = values["after"]
    numbers = [values["data"], f"{values['parameters']:,}", f"{values['tokens']:,}", f"{values['seconds']:.0f} s"]
    assert all(n in card for n in [*numbers, f"{after['perplexity']:.1f}", f"{after['bits_per_character']:.3f}"])
    assert 25e6 <= values["parameters"] <= 35e6


@every_classifier
def test_the_card_of_a_classifier_has_the_commands_that_made_it(name):
    """Each needs only what is in the repository, on the hub or made by a command before it. The last made the model."""
    there = {"", "scratch", "linear", "asset/mini/gpt2", "sentence-transformers/all-MiniLM-L6-v2"}
    for line in (MINI / name / "README.md").read_text().splitlines():
        if line.startswith("python "):
            script, *flags = line.split()[1:]
            cfg = parse({"reward.py": RewardConfig, "finetune_gpt2.py": FinetuneConfig}[script], flags)
            assert {cfg.init_from, *cfg.teacher.split(","), getattr(cfg, "generator", "")} <= there
            there.add(cfg.out)
    assert differing(cfg, json.loads((MINI / name / "run_config.json").read_text())) == []


@every_classifier
def test_a_classifier_has_the_accuracy_of_its_card_and_the_probabilities_of_transformers(splits, name):
    """On 400 held-out reviews, whole and short, within three standard errors: 5 and 7 percentage points."""
    from transformers import pipeline

    classifier = SentimentReward.load(str(MINI / name))
    labels, texts = splits["evaluation"].labels[:400], splits["evaluation"].texts[:400]
    words = json.loads((MINI / name / "run_config.json").read_text())["short_words"]
    short = [" ".join(text.split(" ")[:words]) for text in texts]
    after = results(name)["after"]
    assert all(after[part]["accuracy"] >= least for part, least in zip(("reviews", "short_texts"), ACCURACIES[name]))
    assert max(after[part]["calibration_error"] for part in ("reviews", "short_texts")) <= 0.03
    for part, tolerance, part_texts in (("reviews", 0.05, texts), ("short_texts", 0.07, short)):
        accuracy = np.mean((classifier.log_odds(part_texts) > 0).numpy() == labels)
        assert accuracy == pytest.approx(after[part]["accuracy"], abs=tolerance)
    theirs = pipeline("text-classification", model=str(MINI / name), dtype=torch.float32, device="cpu")
    probabilities = [row["score"] if row["label"] == "POSITIVE" else 1 - row["score"] for row in theirs(short[:20])]
    np.testing.assert_allclose(classifier.log_odds(short[:20]).sigmoid(), probabilities, atol=1e-4)


@every_classifier
def test_a_classifier_passes_the_self_check_of_ppo(name):
    assert "log-odds apart" in check_reward(SentimentReward.load(str(MINI / name)))
