"""The tables and CSV files of frontier.py, which also fill docs/results.md.

The row of a run is a dict: method, setting, seed and its MEASURES.
"""

import statistics

import numpy as np

from analysis.limit import kl_needed
from analysis.tables import markdown

START = "fine-tuned model"  # the method of the row of the reference
LIMIT = "limit"  # the best possible policy
PRESET = "as the preset"  # the ablation that changes nothing
NEAR = 1 / 5  # a value at a KL needs a run within this share of that KL, because curves bend between distant runs
MEASURES = (
    "score", "positive_by_reward", "positive_by_judge", "positive_by_words", "kl", "kl_exact", "perplexity",
    "bits_per_character", "distinct_2", "response_length", "kl_efficiency",
)  # fmt: skip
AT_EQUAL_KL = ("score", "positive_by_judge", "positive_by_words", "perplexity", "bits_per_character")
NATS = (1, 2, 4, 8)  # KLs at which methods are compared
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # {seeds: t} for 95 %


def measured(rows, names=MEASURES):
    """Return the measures that some rows have. Without a second language model, there are no bits per character."""
    return [name for name in names if any(name in row for row in rows)]


def value_at(rows, method, seed, measure, nats):
    """Return a measure at a KL, interpolated between the runs of a method and seed and the fine-tuned model.

    Linear in the square root of the KL, to which the score is nearly proportional at first; above the last run, the
    line through the last two continues. None if the method or the fine-tuned model lacks the measure, or if no run has
    a KL within NEAR of this one.
    """
    rows = [row for row in rows if measure in row]
    runs = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
    start = [row for row in rows if row["method"] == START]
    points = sorted((row["kl_exact"] ** 0.5, row[measure]) for row in [*start, *runs])
    near = any(abs(row["kl_exact"] - nats) <= NEAR * nats for row in runs)
    root = nats**0.5
    if not near or len(points) < 2:
        return None
    (before, value), (last, last_value) = points[-2:]
    if root > last:
        return last_value + (root - last) * (last_value - value) / (last - before)
    return float(np.interp(root, *zip(*points)))


def limit_at(limit, start, measure, nats):
    """Return [score or judge's share of the best possible policy at a KL], or [] beyond its curve."""
    if nats > limit[-1]["kl"] or measure not in ("score", "positive_by_judge"):
        return []
    values = [start["score"] + row["gain"] if measure == "score" else row[measure] for row in limit]
    return [float(np.interp(nats, [row["kl"] for row in limit], values))]


def at_equal_kl(rows, measure, nats):
    """Return {method: [value at a KL per seed]}, with an empty list if a seed has no value; see value_at."""
    methods = {}
    for method, seed in dict.fromkeys((row["method"], row["seed"]) for row in rows if row["method"] != START):
        methods.setdefault(method, []).append(value_at(rows, method, seed, measure, nats))
    return {method: [] if None in values else values for method, values in methods.items()}


def half_width(values):
    """Return the half-width of the 95 % interval of a mean over at least two seeds, by Student's t."""
    return STUDENT_T.get(len(values), 2.2) * statistics.stdev(values) / len(values) ** 0.5


def mean_text(values):
    """Return the mean of the values of all seeds and its 95 % interval as text; "-" without values."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{statistics.mean(values):.3f} ± {half_width(values):.3f}"


def table(header, lines):
    """Return a Markdown table of {first cell: [values of all seeds, per column]}."""
    return markdown([header, *([name, *map(mean_text, columns)] for name, columns in lines.items())])


def start_of(frontier):
    """Return the row of the fine-tuned model."""
    return next(row for row in frontier if row["method"] == START)


def add_efficiency(rows, start, limit):
    """Add kl_efficiency to rows: the KL that the limit needs for the gain in score over the start, over the KL."""
    curve = [[point[name] for point in limit] for name in ("kl", "gain")]
    for row in rows:
        if row["kl_exact"] > 0:
            row["kl_efficiency"] = kl_needed(row["score"] - start["score"], *curve) / row["kl_exact"]


def is_bound(row, start, limit):
    """Return whether the KL efficiency of a row is a lower bound, as the limit does not show a score that high."""
    return row["score"] - start["score"] > limit[-1]["gain"]


def bounded_text(values, bound):
    """Return the mean of KL efficiencies as text; bound: whether one is a lower bound, which makes the mean one."""
    return f"at least {statistics.mean(values):.3f}" if bound else mean_text(values)


def runs_table(frontier, limit):
    """Return the table of all runs: a line per method and setting, with the number of its runs."""
    names, start, groups = measured(frontier, ("kl_exact", *AT_EQUAL_KL, "distinct_2")), start_of(frontier), {}
    for row in frontier:
        groups.setdefault(START if row is start else f"{row['method']}, {row['setting']}", []).append(row)
    lines = [["method, setting", "runs", *names, "kl_efficiency"]]
    for name, rows in groups.items():
        cells = [mean_text([row[m] for row in rows if m in row]) for m in names]
        efficiencies = [row["kl_efficiency"] for row in rows if "kl_efficiency" in row]
        bound = any(is_bound(row, start, limit) for row in rows)
        lines.append([name, str(len(rows)), *cells, bounded_text(efficiencies, bound)])
    return markdown(lines)


def methods_table(frontier, measure, limit):
    """Return the table of a measure at equal KL: a line per method, and one of the best possible policy."""
    start = start_of(frontier)
    columns = [at_equal_kl(frontier, measure, n) | {LIMIT: limit_at(limit, start, measure, n)} for n in NATS]
    lines = {method: [column[method] for column in columns] for method in columns[0]}
    lines = {method: line for method, line in lines.items() if any(line) or method != LIMIT}
    return table([f"{measure} at a KL of", *(f"{n} nats" for n in NATS)], lines)


def efficiency_at(frontier, limit, nats):
    """Return {method: [KL efficiency at a KL per seed]}, from the scores of at_equal_kl, and {method: is it a bound}.

    It is a lower bound if the limit does not show the score of every seed; see kl_needed in limit.py.
    """
    start = start_of(frontier)
    curve = [[point[name] for point in limit] for name in ("kl", "gain")]
    gains = {
        method: [score - start["score"] for score in scores]
        for method, scores in at_equal_kl(frontier, "score", nats).items()
    }
    values = {method: [kl_needed(gain, *curve) / nats for gain in row] for method, row in gains.items()}
    return values, {method: any(gain > limit[-1]["gain"] for gain in row) for method, row in gains.items()}


def efficiency_table(frontier, limit):
    """Return the table of the KL efficiency at equal KL."""
    columns = [efficiency_at(frontier, limit, n) for n in NATS]
    lines = [["kl_efficiency at a KL of", *(f"{n} nats" for n in NATS)]]
    lines += [
        [method, *(bounded_text(values[method], bound[method]) for values, bound in columns)]
        for method in columns[0][0]
    ]
    return markdown(lines)


def leads(frontier, nats):
    """Return {method: [PPO's score minus the method's at a KL per seed]} of the methods that have PPO's seeds."""
    scores = at_equal_kl(frontier, "score", nats)
    ppo = scores.pop("PPO", [])
    return {
        method: [x - y for x, y in zip(ppo, values)] if len(values) == len(ppo) else []
        for method, values in scores.items()
    }


def lead_table(frontier):
    """Return the table of the lead of PPO at equal KL."""
    columns = [leads(frontier, n) for n in NATS]
    lines = {method: [column[method] for column in columns] for method in columns[0]}
    header = ["lead of PPO in score at a KL of", *(f"{n} nats" for n in NATS)]
    return table(header, {method: line for method, line in lines.items() if any(line)})


def ablation_table(frontier, ablation):
    """Return a table with the means of the preset's runs, and each change's differences from them, seed by seed.

    The last column is the score minus that of PPO's frontier at the KL of the run, because most changes move the KL
    too. It is "-" unless value_at returns a value for every run, with and without the change.
    """
    names = ("score", "positive_by_judge", "kl_exact", "perplexity", "distinct_2", "above")
    levels = [value_at(frontier, "PPO", row["seed"], "score", row["kl_exact"]) for row in ablation]
    above = [None if level is None else row["score"] - level for row, level in zip(ablation, levels)]
    ablation = [row | {"above": value} for row, value in zip(ablation, above)]
    base, lines = {row["seed"]: row for row in ablation if row["setting"] == PRESET}, {}
    for detail in dict.fromkeys(row["setting"] for row in ablation):
        rows = [row for row in ablation if row["setting"] == detail]
        reference = {seed: dict.fromkeys(names, 0.0) for seed in base} if detail == PRESET else base
        pairs = [[(row[name], reference[row["seed"]][name]) for row in rows] for name in names]
        lines[detail] = [[] if None in sum(column, ()) else [x - y for x, y in column] for column in pairs]
    return table(["changed", *names[:-1], "score above PPO's frontier"], lines)


def summary(frontier, ablation, limit, cfg):
    """Return the text of frontier.md. limit: from limit_rows."""
    parts = [
        f"Means over the runs, which differ in the seed, and 95 % intervals; {cfg.prompts} held-out prompts. The "
        "intervals are over seeds: the prompts, the fine-tuned model's score and the limit are the same for all runs. "
        "The setting of PPO, RLOO and GRPO is the KL coefficient, that of DPO and reward-weighted fine-tuning is beta, "
        "that of best-of-n is n, that of positive-only fine-tuning is the number of epochs.",
        runs_table(frontier, limit),
        "Values at equal KL, interpolated between the runs of a seed, linearly in the square root of the KL. A value "
        f"is given only if every seed has a run within {100 * NEAR:g} % of that KL; above the last run, the line "
        "through the last two is continued.",
        *(methods_table(frontier, name, limit) for name in measured(frontier, AT_EQUAL_KL)),
        "The lead of PPO is its score minus that of another method at the same KL, seed by seed.",
        lead_table(frontier),
        "The limit is the best possible policy, estimated from responses of the fine-tuned model; see "
        "analysis/limit.py. KL efficiency is the KL that it needs for the score of a run, divided by the KL of the "
        f"run. It shows scores of up to {limit[-1]['gain']:.2f} above the fine-tuned model's; for higher ones, the "
        "efficiency is at least the number given.",
        efficiency_table(frontier, limit),
    ]
    if ablation:
        parts += [
            "One detail changed: differences from the run of the preset with the same seed. The last column is the "
            "score minus that of PPO's frontier at the KL of the run, under the same condition.",
            ablation_table(frontier, ablation),
        ]
    return "\n\n".join(parts) + "\n"
