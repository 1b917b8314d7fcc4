"""The command analysis.quality: continuations, discriminator, agreement, tables and files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXTS, hf_gpt2, message, reviews_csv, write_balanced_bert

from analysis import quality
from analysis.quality import continuations, discriminate, estimate, main, measure_classifiers, samples_table
from config import QualityConfig, defaults
from data import Reviews, load_splits, pack
from finetune_gpt2 import validate
from runtime.hub import load_gpt2, load_policy, open_gpt2

pytest.importorskip("sklearn", reason="scikit-learn is in requirements-dev.txt")

MINI = defaults(QualityConfig, "mini")


def random_texts(n, seed, words=50, length=20):
    rng = np.random.default_rng(seed)
    return [" ".join(f"word{i}" for i in row) for row in rng.integers(0, words, (n, length))]


def test_a_standard_error_is_the_deviation_over_the_root_of_the_number():
    assert estimate(np.array([0.0, 1.0, 1.0, 0.0])) == {"value": 0.5, "standard_error": pytest.approx(1 / 12**0.5)}


# ---- the discriminator


def test_the_discriminator_is_at_chance_for_texts_of_the_same_distribution():
    """A classifier that is tested on its training texts recognizes nearly all of these."""
    result = estimate(discriminate(random_texts(600, 0), random_texts(600, 1)))
    assert abs(result["value"] - 0.5) < 4 * result["standard_error"] < 0.1


def test_the_discriminator_recognizes_gibberish():
    texts = random_texts(100, 0)
    assert discriminate(texts, [text.replace("word", "w0rd") for text in texts]).mean() > 0.99


def test_the_discriminator_is_tested_on_prompts_that_it_was_not_trained_on(monkeypatch):
    """On every prompt once, with both texts, and trained on as many texts of people as of the model."""
    seen = []

    class Spy:
        def fit(self, texts, labels):
            self.trained = [int(text[1:]) for text in texts]
            assert sorted(zip((text[0] == "g" for text in texts), self.trained)) == sorted(zip(labels, self.trained))
            assert sum(labels) == len(labels) / 2
            return self

        def log_odds(self, texts):
            tested = [int(text[1:]) for text in texts]
            assert not set(self.trained) & set(tested)
            assert set(self.trained) | set(tested) == set(range(23))
            seen.extend(texts)
            return torch.tensor([1.0 if text[0] == "g" and int(text[1:]) % 2 else -1.0 for text in texts])

    monkeypatch.setattr(quality, "LinearClassifier", Spy)
    human, generated = ([f"{side}{i}" for i in range(23)] for side in "hg")
    correct = discriminate(human, generated)
    assert sorted(seen) == sorted(human + generated)
    assert correct.tolist() == [1.0 if i % 2 else 0.5 for i in range(23)]


# ---- continuations


def test_people_and_model_continue_the_same_prompts_and_end_where_the_review_ends(gpt2_folder, tokenizer):
    cfg = replace(MINI, prompt_len=4, response_len=12, batch_size=3)
    texts = [*TEXTS[:4], "A great film with <|endoftext|> in it", "A film"]  # the last is shorter than a prompt
    opened = open_gpt2(str(gpt2_folder))
    texts.append(tokenizer.decode(tokenizer.encode(TEXTS[0])[:9]))  # ends within the response
    human, generated = continuations(load_policy(*opened), opened[2], texts, cfg, torch.device("cpu"))
    assert human["prompts"] == generated["prompts"] and len(human["texts"]) == len(generated["texts"]) == 6
    for text, prompt, whole, tokens in zip(texts[:5], human["prompts"], human["texts"], human["tokens"]):
        ids = tokenizer.encode(text, split_special_tokens=True)
        assert prompt == tokenizer.decode(ids[:4]) and text.startswith(whole)
        assert tokens == ids[4:16] and whole == tokenizer.decode(ids[:16])
    assert human["texts"][5] == texts[6] and len(human["tokens"][5]) == 6
    assert human["tokens"][5][-1] == tokenizer.eos_token_id
    assert max(map(len, generated["tokens"])) == 12
    assert len(continuations(load_policy(*opened), opened[2], texts, replace(cfg, prompts=5), "cpu")[0]["texts"]) == 5
    assert "longer" in message(continuations, load_policy(*opened), opened[2], ["A film"] * 9, cfg, "cpu")


def test_the_model_reads_an_end_of_text_before_each_prompt_as_in_its_training(gpt2_folder, monkeypatch):
    """In the continuations and in the samples; without it, a prompt could be from any place of a review."""
    opened, read, cfg = open_gpt2(str(gpt2_folder)), [], replace(MINI, prompt_len=4, response_len=12)
    policy, tokenizer = load_policy(*opened), opened[2]
    generate = policy.gpt2.generate
    monkeypatch.setattr(policy.gpt2, "generate", lambda ids, *rest: read.append(ids.tolist()) or generate(ids, *rest))
    human, generated = continuations(policy, tokenizer, TEXTS[:5], cfg, "cpu")
    (row,) = quality.sample(policy, tokenizer, TEXTS[5:6], cfg, "cpu")
    expected = [[tokenizer.eos_token_id, *tokenizer.encode(text)[:4]] for text in TEXTS[:5]]
    samples = 2 * [[[tokenizer.eos_token_id, *tokenizer.encode(TEXTS[5])][:36]]]  # n_positions - response_len
    assert read == [expected, *samples]
    assert generated["prompts"] == human["prompts"] and row["prompt"] == TEXTS[5]  # the texts do not contain it


# ---- classifiers


class Fixed:
    """A classifier whose log-odds are a fixed function of the text."""

    def __init__(self, function):
        self.function = function

    def log_odds(self, texts):
        return torch.tensor([float(self.function(text)) for text in texts])


def test_agreement_is_the_share_of_texts_on_the_same_side():
    reviews = Reviews(["1 2", "-3 4", "5 6", "-7 8"], np.array([1, 0, 1, 1]))
    first, second = Fixed(lambda text: int(text.split()[0])), Fixed(lambda text: 3.5 - abs(int(text.split()[0])))
    texts = {"human": ["1", "-3", "5", "-7"], "model": ["1", "2", "9"]}
    results = measure_classifiers({"a": first, "b": second}, reviews, texts, MINI)
    assert results["a"]["reviews"]["accuracy"] == 0.75 and results["b"]["reviews"]["accuracy"] == 0.25
    assert results["a"]["positive"] == {"human": 0.5, "model": 1.0}
    assert results["a"]["agreement"] == {"human": {"b": 0.5}, "model": {"b": pytest.approx(2 / 3)}}
    assert results["b"]["agreement"] == {"human": {"a": 0.5}, "model": {"a": pytest.approx(2 / 3)}}


# ---- the command


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer):
    """A CSV of reviews, the folders of two classifiers, and that of a language model with a longer context."""
    folder = tmp_path_factory.mktemp("quality")
    csv = str(reviews_csv(folder / "toy.csv"))
    texts = load_splits(csv)["evaluation"].texts
    hf_gpt2(len(tokenizer), n_positions=512).float().save_pretrained(folder / "second")
    tokenizer.save_pretrained(folder / "second")
    classifiers = [str(write_balanced_bert(folder / name, texts, seed)) for seed, name in enumerate(("one", "two"))]
    return csv, classifiers, str(folder / "second")


def test_the_command_measures_every_model_and_keeps_the_results_of_others(
    gpt2_folder, inputs, tmp_path, capsys, monkeypatch
):
    measured, responses = [], []
    classify, nll = quality.measure_classifiers, quality.second_nll
    monkeypatch.setattr(quality, "measure_classifiers", lambda *args: measured.append(args) or classify(*args))
    monkeypatch.setattr(quality, "second_nll", lambda *args: responses.append(args[2]) or nll(*args))
    csv, (one, two), second = inputs
    cfg = replace(MINI, dataset=csv, out=str(tmp_path / "out"), device="cpu", samples=2, lm_prompts=3, short_words=8)
    cfg = replace(cfg, models=(f"small={gpt2_folder}", f"one={one}", f"two={two}"), second_lm=second, prompt_len=7)
    main(cfg)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    small, table = results["gpt2"]["small"], capsys.readouterr().out
    folder, config, tokenizer = open_gpt2(str(gpt2_folder))
    texts = load_splits(csv)["prompts"].texts
    perplexity, bits = validate(
        load_gpt2(folder, config, len(tokenizer)), pack(texts, tokenizer), sum(map(len, texts)), 48, 1, 0
    )
    assert small["validation"] == {"bits_per_character": pytest.approx(bits), "perplexity": pytest.approx(perplexity)}
    assert small["discriminator"]["value"] > 0.9  # random weights
    assert small["discriminator"]["above_chance"] == small["discriminator"]["value"] - 0.5
    assert small["second_lm"] == "second" and small["human"]["bits_per_character"]["value"] > 0
    assert [set(row) for row in small["samples"]] == [{"prompt", "1.0", "0.7"}] * 2
    assert list(results["classifiers"]) == [
        "one",
        "two",
        *(f"linear, {x}" for x in ("reward + judge", "reward", "judge")),
    ]
    assert results["classifiers"]["linear, judge"]["reviews"]["accuracy"] == 1.0
    assert set(results["classifiers"]["one"]["agreement"]) == {"human", "small"}
    ((_, reviews, kinds, _),) = measured
    assert kinds["human"] == [" ".join(text.split(" ")[:8]) for text in reviews.texts]
    assert reviews.texts == load_splits(csv)["evaluation"].texts and len(kinds["small"]) == small["prompts"]
    assert [len(out["texts"]) for out in responses] == [3, 3]
    assert str(gpt2_folder) not in json.dumps(results)  # paths of a machine
    assert all(text in table for text in ("small", "linear, reward + judge", "one and two", "discriminator"))

    main(replace(cfg, models=(f"other={gpt2_folder}",), second_lm=""))
    later = json.loads((tmp_path / "out" / "results.json").read_text())
    assert later["gpt2"]["small"] == small and later["classifiers"] == results["classifiers"]
    assert later["gpt2"]["other"]["discriminator"] == small["discriminator"]
    assert "| small" in (text := (tmp_path / "out" / "samples.md").read_text()) and "| other" in text
    assert "response_len 40 -> 20" in message(main, replace(cfg, response_len=20))


def test_generated_text_is_escaped_in_the_samples():
    entry = {"prompt": "a|b", "1.0": "<script>\n# [x](y)", "0.7": ""}
    table = samples_table({"new|er": {"samples": [entry]}, "old": {"samples": []}}, 1.0)
    lines = table.splitlines()
    assert len(lines) == 3 and {line.count("|") for line in lines} == {4}
    assert not set("<[#") & set(lines[2].replace("&#", ""))


def test_a_wrong_input_is_one_line(gpt2_folder, inputs, tmp_path):
    cfg = replace(MINI, dataset=inputs[0], out=str(tmp_path), device="cpu", models=(str(gpt2_folder),))
    assert "48 positions" in message(main, replace(cfg, response_len=40))
    assert "twice" in message(main, replace(cfg, models=(f"a={gpt2_folder}", f"a={inputs[1][0]}")))
    assert "nowhere" in message(main, replace(cfg, models=("./nowhere",)))
    assert not list(tmp_path.iterdir())
