"""Tables of results as Markdown and CSV, and the captions of the metrics, without torch."""

import csv
import io

CAPTIONS = {  # metrics of evaluate.py, in the order of the rows
    "score": "score",
    "positive_by_reward": "share positive, by the reward",
    "positive_by_judge": "share positive, by the judge",
    "agrees_negative": "share negative after [negative], by the judge",
    "agrees_positive": "share positive after [positive], by the judge",
    "judge": "probability of positive, by the judge",
    "kl": "KL, nats per response",
    "kl_k3": "KL, estimator k3",
    "kl_exact": "KL, whole vocabulary",
    "perplexity": "perplexity, fine-tuned model",
    "bits_per_character": "bits per character, second model",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "repetition": "repetition, 4-grams",
    "response_length": "length, tokens",
}
COUNTED = {"positive": "positive", "controlled": "agreeing"}  # task: the texts that a share counts
JUDGED = {  # task: what the judge's probability of a text means
    "positive": "probability of POSITIVE",
    "controlled": "probability that the text agrees with its control",
}
DIGITS = {"repetition": 4}  # decimals; 2 for the other metrics
KLS = ("kl", "kl_k3", "kl_exact")
KL_NOTE = (
    "All three estimate the same KL. kl, which PPO penalizes, is the log-ratio of the sampled tokens (k1): unbiased, "
    "but negative for every response that is more likely under the fine-tuned model than under the policy, so the mean "
    "of a few responses can be negative too. kl_k3 adds a term with mean 0 and is never negative, but a rare token can "
    "make it large. kl_exact sums over the whole vocabulary at each sampled position."
)


def markdown(rows):
    """Return rows of texts as an aligned Markdown table. The first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def csv_text(rows):
    """Return dicts as the text of a CSV with the columns that any of them has, in the order in which they appear."""
    text, names = io.StringIO(), list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path):
    """Return the rows of a CSV as dicts, without empty cells; numbers are floats, but settings are texts."""
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    texts = ("method", "setting")
    return [{k: v if k in texts else int(v) if k == "seed" else float(v) for k, v in row.items() if v} for row in rows]


def number(entry, digits=2):
    """Return an entry of results.json as text: its value, followed by its interval if it has one."""
    value, *bounds = (f"{entry[name]:z.{digits}f}" for name in ("value", "low", "high") if name in entry)
    return f"{value} [{', '.join(bounds)}]" if bounds else value


def caption(metric, task="positive"):
    """Return the caption of a metric, or its name without one. In the task "controlled", classifiers find agreement."""
    return CAPTIONS.get(metric, metric).replace("positive, by", f"{COUNTED[task]}, by")


def results_rows(results):
    """Return the rows of the table before/after: the header, then one row per metric, with "-" for a missing number.

    A metric without a caption is shown by its name.
    """
    sides = results["before"], results["after"], results.get("difference", {})
    names = [name for name in CAPTIONS if name in sides[0]] + [name for name in sides[0] if name not in CAPTIONS]
    task = results.get("config", {}).get("task", "positive")
    rows = [["", "before PPO", "after PPO", "difference"]]
    for name in names:
        cells = [number(side[name], DIGITS.get(name, 2)) if name in side else "-" for side in sides]
        rows.append([caption(name, task), *cells])
    return rows


def table_text(results):
    """Return the table before/after as Markdown, which is readable in a terminal too."""
    return markdown(results_rows(results))


def kl_text(results):
    """Return the three estimates of the KL after PPO, with their spread over responses, as Markdown."""
    rows = [["nats per response", "mean", "standard deviation", "share below 0"]]
    for name in KLS:
        entry = results["after"][name]
        rows.append([name, number(entry), f"{entry['std']:.2f}", f"{entry['below_0']:.2f}"])
    return markdown(rows)


def efficiency_text(entry):
    """Return an entry of results.json as a sentence; see kl_efficiency in limit.py."""
    if entry is None:
        return "KL efficiency: not defined, because the policy has no KL"
    value, more = (f">= {entry['value']:.2f}", " or more") if entry["at_least"] else (number(entry), "")
    return (
        f"KL efficiency {value}: the score is {entry['gain']:z.2f} above the reference's. The KL of this policy is "
        f"{entry['kl']:.2f} nats; the best possible policy needs {entry['kl_needed']:.2f}{more} for this score"
    )
