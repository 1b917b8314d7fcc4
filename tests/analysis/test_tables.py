"""Tables of results."""

import re

from analysis.tables import CAPTIONS, KLS, kl_text, results_rows, table_text


def test_the_table_is_rectangular_and_shows_each_value_with_its_interval():
    side = {name: {"value": i, "low": i - 0.5, "high": i + 100} for i, name in enumerate(CAPTIONS)}
    side["distinct_1"] = {"value": 0.25}
    lines = table_text({"before": side, "after": side, "difference": side}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert {line.count("|") for line in lines} == {5}
    assert len(lines) == 2 + len(CAPTIONS)
    row = list(CAPTIONS).index("kl")
    assert f"| {row}.00 [{row - 0.5:.2f}, {row + 100}.00] " in lines[2 + row]
    assert re.search(r"distinct-1 +\| 0.25 +\| 0.25 +\| 0.25 +\|", "\n".join(lines))


def test_each_column_has_its_own_numbers_and_small_ones_have_more_digits():
    sides = {name: {"repetition": {"value": x}} for name, x in (("before", 1e-3), ("after", 3e-4), ("difference", -1))}
    assert results_rows(sides)[1] == ["repetition, 4-grams", "0.0010", "0.0003", "-1.0000"]


def test_a_metric_without_a_caption_is_shown_by_its_name_and_a_missing_difference_as_a_dash():
    side = {"novelty": {"value": 2.0, "low": 1.0, "high": 3.0}, "score": {"value": 1.0}}
    results = {"before": side, "after": side, "difference": {"score": {"value": -0.001}}}
    assert results_rows(results)[1:] == [
        ["score", "1.00", "1.00", "0.00"],
        ["novelty", *["2.00 [1.00, 3.00]"] * 2, "-"],
    ]


def test_the_captions_of_the_controlled_task_name_the_agreement_with_the_control():
    side = {name: {"value": 1} for name in ("positive_by_judge", "judge", "agrees_negative")}
    results = {"before": side, "after": side, "config": {"task": "controlled"}}
    assert [caption for caption, *_ in results_rows(results)[1:]] == [
        "share agreeing, by the judge", "share negative after [negative], by the judge",
        "probability of agreeing, by the judge",
    ]  # fmt: skip


def test_the_kl_table_has_a_row_per_estimator_for_the_policy_after_ppo():
    entry = {"value": 4, "low": 3, "high": 5, "std": 2.5, "below_0": 0.125}
    lines = kl_text({"after": dict.fromkeys(KLS, entry)}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert re.fullmatch(r"\| nats per response +\| mean +\| standard deviation +\| share below 0 +\|", lines[0])
    assert [line.split()[1] for line in lines[2:]] == list(KLS)
    assert all(re.search(r"\| 4.00 \[3.00, 5.00\] +\| 2.50 +\| 0.12 +\|", line) for line in lines[2:])
