"""The linear classifier and the baseline of sentiment."""

import sys

import numpy as np
import pytest
from conftest import message

from config import RewardConfig
from data import Reviews
from reward import LINEAR_EPOCHS, calibration_error, sentiment_baseline
from runtime.linear_classifier import LinearClassifier

pytest.importorskip("sklearn", reason="scikit-learn is in requirements-dev.txt")


def classifier_of(pairs, copies=20):
    texts, labels = zip(*pairs * copies)
    return LinearClassifier().fit(texts, labels)


def test_word_pairs_count_and_case_does_not():
    """Both classes have the same words, each as often."""
    classifier = classifier_of([("very good, not bad", 1), ("very bad, not good", 0)])
    odds = classifier.log_odds(["not bad", "not good", "NOT BAD"])
    assert odds[0] > 0.1 and odds[1] < -0.1 and odds[2] == odds[0]


def test_punctuation_and_short_words_count():
    classifier = classifier_of([("I a film !", 1), ("U a film ?", 0)])
    odds = classifier.log_odds(["I", "!", "U", "?"])
    assert (odds[:2] > 0.1).all() and (odds[2:] < -0.1).all()


def test_probabilities_are_the_frequencies_of_the_label():
    """Catches scores that are no log-odds, such as the margins of a support vector machine."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 4, 4000)
    chances = np.array([0.1, 0.35, 0.6, 0.9])[words]
    labels = (rng.random(4000) < chances).astype(int)
    texts = [f"word{word} film" for word in words]
    probabilities = LinearClassifier().fit(texts[:3000], labels[:3000]).log_odds(texts).sigmoid().numpy()
    np.testing.assert_allclose(probabilities, chances, atol=0.05)
    assert calibration_error(probabilities[3000:], labels[3000:]) < 0.05
    assert ((probabilities > 0) & (probabilities < 1)).all()


def test_without_scikit_learn_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    assert "pip install -r requirements-dev.txt" in message(LinearClassifier)


def test_the_baseline_is_trained_on_crops_of_its_splits_only_with_their_labels(monkeypatch):
    """Catches reviews of other splits, labels in another order than the texts, and crops that are always the same."""
    names, fitted = ("reward", "judge", "prompts", "evaluation"), []
    splits = {
        name: Reviews([f"{name} {label} " + " ".join(map(str, range(60)))] * 2, np.array([label, label]))
        for label, name in enumerate(names)
    }
    monkeypatch.setattr(LinearClassifier, "fit", lambda self, texts, labels: fitted.append((texts, labels)))
    crops = RewardConfig(crop_share=0.5, max_crop_words=20)
    for part in (("reward", "judge"), ("judge",)):
        sentiment_baseline([splits[name] for name in part], crops)
        texts, labels = fitted.pop()
        whole = {splits[name].texts[0] for name in part}
        assert len(texts) == len(labels) == 2 * (1 + LINEAR_EPOCHS) * len(part)
        assert all(any(text in review for review in whole) for text in texts)
        beginnings = [(text.split()[0], label) for text, label in zip(texts, labels) if not text[0].isdigit()]
        assert set(beginnings) == {(name, names.index(name)) for name in part}
        assert {text in whole for text in texts} == {True, False} and len(set(texts)) > 4 * len(part)
