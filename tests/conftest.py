"""Fixtures and helpers: tiny models in Hugging Face's format, written by transformers with random weights."""

import os
import tempfile
import weakref

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import train_bpe, train_wordpiece  # noqa: E402
from runtime.checkpoint import REVISIONS  # noqa: E402
from runtime.errors import BadInput  # noqa: E402

TEXTS = [
    "I loved this movie, it was wonderful from start to finish.",
    "I hated this movie, it was terrible from start to finish.",
    "A great film with excellent acting and a beautiful story about a café.",
    "A bad film with awful acting, a boring story and no end.",
] * 5


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU, and is skipped without one")


@pytest.fixture(autouse=True)
def no_revisions():
    """Forget what a test read from the hub, so that no other test finds it in its run_config.json."""
    yield
    REVISIONS.clear()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of at most 300 tokens; its end-of-text token is 0."""
    return train_bpe(TEXTS, 300)


def hf_gpt2(vocab_size, **changes):
    """Return transformers' GPT-2 in float64, with larger weights and random biases, so that differences show."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=vocab_size, n_positions=48, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**(shape | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 if name.endswith("bias") else parameter * 3)
    return model.double()


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory, tokenizer):
    """A folder of a tiny GPT-2 in float32, saved by transformers."""
    folder = tmp_path_factory.mktemp("gpt2")
    hf_gpt2(len(tokenizer)).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tuned(gpt2_folder, folder, seed=0):
    """Write a policy that differs from the one in gpt2_folder in a random bias; return its folder."""
    from runtime.hub import load_policy, open_gpt2, save_gpt2

    path, config, tokenizer = open_gpt2(str(gpt2_folder))
    policy = load_policy(path, config, tokenizer)
    with torch.no_grad():
        policy.gpt2.ln_f.bias += 0.5 * torch.randn(64, generator=torch.Generator().manual_seed(seed))
    folder.mkdir(parents=True, exist_ok=True)
    save_gpt2(policy.gpt2, tokenizer, folder, policy.value_head.state_dict())
    return folder


def write_bert(folder, labels=("NEGATIVE", "POSITIVE"), seed=0, **changes):
    """Write a tiny BERT classifier with these labels and a WordPiece tokenizer; return the model.

    seed: of its weights. Reward and judge need different ones, so that tests can tell them apart.
    """
    from transformers import BertConfig, BertForSequenceClassification

    wordpiece = train_wordpiece(TEXTS, 200)
    shape = dict(
        vocab_size=len(wordpiece), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(**(shape | names | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    wordpiece.save_pretrained(folder)
    return model.eval()


def write_balanced_bert(folder, texts, seed):
    """Write a tiny BERT that finds half of the texts positive, a different half for each seed; return its folder."""
    from reward import SentimentReward

    model = write_bert(folder, seed=seed)
    odds = SentimentReward.load(str(folder)).log_odds(texts)
    with torch.no_grad():  # log-odds of standard deviation 1 and median 0
        model.classifier.bias[1] -= odds.median()
        model.classifier.weight /= odds.std()
        model.classifier.bias /= odds.std()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder)
    return folder


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory):
    """A second classifier, with other weights than the one in bert_folder."""
    folder = tmp_path_factory.mktemp("judge")
    write_bert(folder, seed=1)
    return folder


def reviews_csv(path, rows=400):
    """Write a CSV of short labelled reviews, all different, with both labels in every split; return its path."""
    words = ["good", "great", "lovely"], ["bad", "awful", "dull"]
    lines = ["text,label"]
    for i in range(rows):
        label = i % 2
        mood = words[1 - label][i % 3]
        text = f"Review {i}: a {mood} film, number {i * 7919 % 997}, with a {mood} story and {mood} acting all the way."
        lines.append(f'"{text}",{label}')
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class LogitsMemory(TorchDispatchMode):
    """Numbers of elements of logits (..., vocabulary) in the block: largest, of one tensor; most, of all at a time."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.alive, self.largest, self.most = vocabulary, [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        logits = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.shape[-1:] == (self.vocabulary,)]
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(tensor) for tensor in logits]
        tensors = [tensor for ref in self.alive if (tensor := ref()) is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in tensors}
        self.largest = max([self.largest, *storages.values()])
        self.most = max(self.most, sum(storages.values()))
        return result


def nan_after_the_end(logits, ids, first, eos_id):
    """Return logits (B, T, V) of GPT2.forward(ids, first) with nan for tokens after the first eos_id of a row."""
    ended = (ids[:, first + 1 :] == eos_id).cumsum(1) > 0  # (B, T - 1)
    return logits.masked_fill(F.pad(ended, (1, 0))[..., None], torch.nan)


def message(function, *args, **kwargs):
    """Return the message, one line, of the BadInput that a call raises."""
    with pytest.raises(BadInput) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text
