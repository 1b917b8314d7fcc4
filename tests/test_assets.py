"""The models in asset/mini: they load everywhere, are as good as their cards say, and saw no held-out review."""

import json

import pytest
import torch
from conftest import ROOT

from checkpoint import load_gpt2, open_gpt2, read_tensors
from data import digest, key, language_model_texts, load_splits, pack
from finetune_gpt2 import validate, validation_texts

MINI = ROOT / "asset" / "mini"
MOST = {"gpt2": 20e6}  # bytes of a folder
every_model = pytest.mark.parametrize("name", MOST)


def results(name):
    return json.loads((MINI / name / "results.json").read_text())


@pytest.fixture(scope="module")
def splits():
    return load_splits("movie-reviews")


@every_model
def test_a_folder_is_small_and_in_16_bits(name):
    assert sum(file.stat().st_size for file in (MINI / name).iterdir()) < MOST[name]
    assert {tensor.dtype for _, tensor in read_tensors(MINI / name)} == {torch.float16}


@every_model
def test_a_card_tells_the_figures_of_its_results(name):
    """Catches a card that was not written anew with the model."""
    card, told = (MINI / name / "README.md").read_text(), results(name)
    after = told["after"]
    figures = [told["data"], f"{told['parameters']:,}", f"{told['tokens']:,}"]
    figures += [f"{after['perplexity']:.1f}", f"{after['bits_per_character']:.3f}"]
    assert [figure for figure in figures if figure not in card] == []


def test_no_review_of_the_evaluation_or_of_the_prompts_was_trained_on(splits):
    """By the hash of the data that the run wrote down, not by what we believe it read."""
    texts = language_model_texts(splits)
    assert results("gpt2")["data"] == digest(texts)
    unseen = {key(text) for name in ("evaluation", "prompts") for text in splits[name].texts}
    assert unseen and not unseen & {key(text) for text in texts}


def test_the_gpt2_has_the_bits_per_character_of_its_card_and_transformers_finds_the_same(splits):
    """On the first 20,000 tokens of the validation stream, which are not all of it: within 3 %."""
    from transformers import AutoModelForCausalLM

    folder, config, tokenizer = open_gpt2(str(MINI / "gpt2"))
    texts = validation_texts(splits["prompts"].texts, tokenizer, 20_000)
    stream = pack(texts, tokenizer)
    model = load_gpt2(folder, config, len(tokenizer))
    _, bits = validate(model, stream, sum(map(len, texts)), config.n_positions, 8, tokenizer.eos_token_id)
    assert results("gpt2")["after"]["bits_per_character"] <= 1.5
    assert bits == pytest.approx(results("gpt2")["after"]["bits_per_character"], rel=0.03)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(stream[None, :256]).long()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-3, rtol=0)
