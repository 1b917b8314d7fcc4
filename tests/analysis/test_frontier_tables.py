"""The tables and CSV files of the sweep."""

import pytest
from conftest import ROOT

from analysis.frontier_tables import (
    MEASURES,
    NEAR,
    PRESET,
    START,
    ablation_table,
    add_efficiency,
    at_equal_kl,
    efficiency_table,
    lead_table,
    leads,
    mean_text,
    methods_table,
    runs_table,
    summary,
)
from analysis.tables import csv_text, read_csv
from config import FrontierConfig

LIMIT = [{"kl": kl, "gain": 2 * kl, "positive_by_judge": 0.5 + kl / 10} for kl in (0.0, 1.0, 3.0)]


def point(method, kl, score, seed=0, setting="1"):
    numbers = dict.fromkeys(set(MEASURES) - {"kl_efficiency"}, 0.0) | {"kl_exact": kl, "score": score}
    return {"method": method, "setting": setting, "seed": seed} | numbers


def test_a_value_at_a_kl_is_interpolated_if_a_run_is_near():
    """Linear in the root of the KL: between (0, 1), (2, 3), (3, 4), and on the last line above 9 nats.

    Near is within a fifth of the KL.
    """
    rows = [point(START, 0, 1), point("PPO", 9, 4), point("PPO", 4, 3, setting="2")]
    for nats, score in (
        (4, 3),
        (3.4, 1 + 3.4**0.5),
        (4.8, 1 + 4.8**0.5),
        (7.6, 1 + 7.6**0.5),
        (9, 4),
        (9.8, 1 + 9.8**0.5),
        (11.2, 1 + 11.2**0.5),
    ):
        assert at_equal_kl(rows, "score", nats)["PPO"] == pytest.approx([score])
    rows[1]["score"] = 5  # the slope of the last line is 2
    assert at_equal_kl(rows, "score", 7.6)["PPO"] == pytest.approx([3 + 2 * (7.6**0.5 - 2)])
    assert at_equal_kl(rows, "score", 9.8)["PPO"] == pytest.approx([5 + 2 * (9.8**0.5 - 3)])
    assert NEAR == 1 / 5


@pytest.mark.parametrize("nats", [1, 1.65, 2.6, 3, 3.3, 5.1, 8])
def test_a_value_at_a_kl_needs_a_run_within_a_fifth_of_it(nats):
    rows = [point(START, 0, 1), point("PPO", 4, 4), point("PPO", 2, 3, setting="2")]
    assert at_equal_kl(rows, "score", nats) == {"PPO": []}


def test_runs_at_6_and_38_nats_give_no_value_at_8_nats():
    """Interpolated over that range, the value was .1 too low, and GRPO seemed worse than PPO."""
    rows = [point(START, 0, 0), *(point("PPO", 8.1, 1.25, seed) for seed in (0, 1))]
    rows += [point("GRPO", kl, score, seed) for kl, score in ((6.3, 1.15), (38, 1.54)) for seed in (0, 1)]
    assert at_equal_kl(rows, "score", 8)["GRPO"] == []
    assert cells(methods_table(rows, "score", LIMIT))["GRPO"] == ["-"] * 4
    assert cells(runs_table(rows, LIMIT))["GRPO, 1"][:2] == ["4", "22.150 ± 29.100"]  # the runs themselves are reported


def test_the_lead_of_ppo_is_a_difference_within_a_seed_and_needs_the_same_seeds():
    """PPO is ahead by 2 with both seeds, although the scores differ by 4 between seeds: there is no spread."""
    rows = [point(START, 0, 1), *(point("PPO", 4, 5 + 4 * seed, seed) for seed in (0, 1))]
    rows += [point("RLOO", 4, 3 + 4 * seed, seed) for seed in (0, 1)] + [point("DPO", 4, 3)]
    assert leads(rows, 4) == {"RLOO": [2, 2], "DPO": []} and leads(rows, 8) == {"RLOO": [], "DPO": []}
    assert cells(lead_table(rows)) == {
        "lead of PPO in score at a KL of": ["1 nats", "2 nats", "4 nats", "8 nats"],
        "RLOO": ["-", "-", "2.000 ± 0.000", "-"],
    }


def test_a_measure_is_in_the_tables_and_files_if_a_run_has_it(tmp_path):
    """Earlier sweeps have no share positive by words, those without second_lm no bits, best-of-n neither of both."""
    rows = [point(START, 0, 0), *(point("PPO", 2, 3, seed) for seed in (0, 1))]
    new = {"positive_by_words", "bits_per_character"}
    old = [{name: value for name, value in row.items() if name not in new} for row in rows]
    for table, present in ((rows, new), (old, set()), ([*old[:2], rows[2]], new)):
        (tmp_path / "frontier.csv").write_text(csv_text(table))
        assert {*(tmp_path / "frontier.csv").read_text().splitlines()[0].split(",")} & new == present
        assert {*table_rows(runs_table(table, LIMIT))[0]} & new == present
        headers = {first for first, *_ in table_rows(summary(table, [], LIMIT, FrontierConfig()))}
        assert {name for name in new if f"{name} at a KL of" in headers} == present


def test_the_efficiency_at_a_kl_is_the_kl_that_the_limit_needs_for_the_interpolated_score():
    """The limit gains 2 per nat: a gain of 2 needs 1 nat. Beyond its end at 3 nats, it counts as 3."""
    rows = [point(START, 0, 1), point("PPO", 2, 3, 0), point("PPO", 4, 99, 0)]
    add_efficiency(rows, rows[0], LIMIT)
    assert [row.get("kl_efficiency") for row in rows] == [None, 0.5, 0.75]
    lines = cells(efficiency_table(rows, LIMIT))
    assert lines["PPO"] == ["-", "0.500", "at least 0.750", "-"] and "limit" not in lines


def test_a_run_beyond_the_curve_of_the_limit_has_a_lower_bound_in_the_table_of_runs():
    """The mean of several seeds too, if one is beyond the curve: it has no interval."""
    rows = [point(START, 0, 1), point("PPO", 2, 3, 0), point("PPO", 2, 4, 1)]
    rows += [point("PPO", 4, 8, seed, setting="2") for seed in (0, 1)]
    rows[-1]["score"] = 6
    add_efficiency(rows, rows[0], LIMIT)
    lines = cells(runs_table(rows, LIMIT))
    assert lines[START][-1] == "-" and lines["PPO, 1"][-1].startswith("0.625 ± ")
    assert lines["PPO, 2"][-1] == "at least 0.688"  # of 3 / 4, a bound, and 2.5 / 4


def test_the_line_of_the_limit_ends_with_its_curve_and_is_that_of_score_and_judge():
    rows = [point(START, 0, 1), point("PPO", 2, 3, 0)]
    assert cells(methods_table(rows, "score", LIMIT))["limit"] == ["3.000", "5.000", "-", "-"]
    assert cells(methods_table(rows, "positive_by_judge", LIMIT))["limit"] == ["0.600", "0.700", "-", "-"]
    assert "limit" not in cells(methods_table(rows, "perplexity", LIMIT))
    text = summary(rows, [], LIMIT, FrontierConfig())
    assert "scores of up to 6.00 above" in text and "kl_efficiency at a KL of" in text


def test_a_method_without_a_measure_has_none_at_any_kl():
    """Best-of-n has no perplexity: its texts are not kept."""
    rows = [point(START, 0, 1), {"method": "best-of-n", "setting": "4", "seed": 0, "kl_exact": 1.0, "score": 2.0}]
    assert at_equal_kl(rows, "score", 1) == {"best-of-n": [2]} and at_equal_kl(rows, "perplexity", 1) == {
        "best-of-n": []
    }
    assert cells(runs_table(rows, LIMIT))["best-of-n, 4"][:3] == ["1", "1.000", "2.000"]
    assert cells(runs_table(rows, LIMIT))["best-of-n, 4"][3] == "-"


def test_a_csv_is_read_as_it_was_written(tmp_path):
    """A number that a row lacks is missing, not 0 or nan."""
    rows = [
        {"method": "PPO", "setting": "0.1", "seed": 3, "score": 0.1},
        {"method": "a", "setting": "2", "seed": 0, "kl": 1.5},
    ]
    (tmp_path / "rows.csv").write_text(csv_text(rows))
    assert read_csv(tmp_path / "rows.csv") == rows


def test_the_fine_tuned_model_is_not_a_run_of_a_method():
    assert at_equal_kl([point(START, 0, 1), point("PPO", 4, 4)], "score", 0) == {"PPO": []}


def test_each_seed_is_interpolated_separately_and_a_method_needs_a_value_of_every_seed():
    """Catches runs of another seed or method, and a mean over fewer seeds than stated."""
    rows = [point(START, 0, 0), point("PPO", 2, 3, 0), point("PPO", 2, 5, 1), point("RLOO", 2, 7, 0)]
    assert at_equal_kl(rows, "score", 2) == {"PPO": [3, 5], "RLOO": [7]}
    assert at_equal_kl([*rows, point("RLOO", 3, 9, 1)], "score", 2) == {"PPO": [3, 5], "RLOO": []}


def table_rows(text):
    """Return the rows of Markdown tables as tuples of cells, without the lines below the headers."""
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if "|" in line]
    return [row for row in rows if set("".join(row)) != {"-"}]


def cells(text):
    """Return {first cell: [other cells]} of the rows of Markdown tables."""
    return {first: others for first, *others in table_rows(text)}


def test_the_ablation_reports_differences_within_a_seed():
    """Two seeds that differ by 1, and a detail that adds .5 to both: a difference of .5 without any spread."""
    rows = [point("ablation", 1, seed, seed, PRESET) for seed in (0, 1)]
    rows += [point("ablation", 1, seed + 0.5, seed, "a detail") for seed in (0, 1)]
    lines = cells(ablation_table([point(START, 0, 0), point("PPO", 9, 9), point("PPO", 9, 9, 1)], rows))
    assert lines["a detail"][0] == "0.500 ± 0.000"


def test_the_score_above_the_frontier_is_relative_to_the_same_seed_at_the_kl_of_the_run():
    """PPO's frontier rises by 1 and by 2 per nat; the preset is .25 above it at 2 nats, the detail .75 at 4."""
    ppo = [point(START, 0, 0), *(point("PPO", kl, kl * (seed + 1), seed) for kl in (2, 4) for seed in (0, 1))]
    rows = [point("ablation", 2, 2 * (seed + 1) + 0.25, seed, PRESET) for seed in (0, 1)]
    rows += [point("ablation", 4, 4 * (seed + 1) + 0.75, seed, "a detail") for seed in (0, 1)]
    lines = cells(ablation_table(ppo, rows))
    assert (lines[PRESET][-1], lines["a detail"][-1]) == ("0.250 ± 0.000", "0.500 ± 0.000")


@pytest.mark.parametrize("far", [PRESET, "a detail"])
def test_the_score_above_the_frontier_is_empty_if_no_run_of_the_frontier_is_near(far):
    """A difference needs both runs. The other columns are not affected."""
    ppo = [point(START, 0, 0), *(point("PPO", kl, kl, seed) for kl in (2, 8) for seed in (0, 1))]
    kls = {PRESET: 2, "a detail": 2} | {far: 4.5}
    rows = [point("ablation", kl, 1, seed, detail) for detail, kl in kls.items() for seed in (0, 1)]
    lines = cells(ablation_table(ppo, rows))
    assert lines["a detail"][-1] == "-" and lines["a detail"][0] == "0.000 ± 0.000"
    assert (lines[PRESET][-1] == "-") == (far == PRESET)


def test_the_published_tables_are_computed_from_the_committed_runs():
    """frontier.md is the output for the two CSV files. docs/results.md has the same tables, see test_docs.py."""
    folder = ROOT / "asset" / "frontier"
    runs = read_csv(folder / "frontier.csv")
    limit = read_csv(folder / "limit.csv")
    text = summary(runs, [], limit, FrontierConfig(prompts=512))
    assert (folder / "frontier.md").read_text(encoding="utf-8") == text
    near = f"within {100 * NEAR:g} % of that KL"
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert near in text and near in " ".join(page.split())


def test_the_interval_of_three_seeds_uses_student_s_t():
    """Of 1, 2, 3: 4.30 x 1 / sqrt(3). The 1.96 of the normal distribution would be too narrow."""
    assert mean_text([1.0, 2.0, 3.0]) == "2.000 ± 2.483"
    assert (mean_text([1.0]), mean_text([])) == ("1.000", "-")
