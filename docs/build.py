"""Fill README.md and docs/ from the committed results: `make docs`. A second call changes nothing.

    python -m docs.build

Draws the figures, executes the tutorial, and fills these places of the pages:

    0.93<!-- results/after/positive_by_judge -->          a number: the comment names its source, see sources()
    <!-- begin: results --> ... <!-- end -->              a table or an output, see blocks()

A number keeps its decimals. It may be followed by its interval, [low, high] or ± half-width, and by " %".
"""

import json
import re
import statistics
import sys
import textwrap
from pathlib import Path

from analysis import frontier_tables, plot
from analysis.tables import CAPTIONS, markdown, number, read_csv, table_text
from docs import build_tutorial
from runtime.errors import BadInput, print_error, printable
from runtime.log import duration

ROOT = Path(__file__).parent.parent
FRONTIER = ROOT / "asset" / "frontier"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = re.compile(r"(-?\d[\d,]*(?:\.(\d+))?)( ± [\d,.]+| \[[-\d., ]+\])?( %)?<!-- ([^:>]+) -->")
BLOCK = re.compile(r"(<!-- begin: ([^>]+) -->\n)(?:(?!<!-- begin).)*?(<!-- end -->)", re.DOTALL)
PHASES = {  # phases of analysis/bench.py, in the order of the rows
    "generate": "generate",
    "score": "score",
    "logprobs": "log-probabilities and values",
    "reference": "reference",
    "update": "update",
    "step": "whole step",
}


def read(path):
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def mean(values):
    """Return {"value", "half"}: the mean over seeds, and the half-width of its 95 % interval."""
    return {"value": statistics.mean(values), "half": frontier_tables.half_width(values) if len(values) > 1 else 0.0}


def settings(rows):
    """Return {"method, setting": {measure: mean over the seeds}} of the rows of a CSV file in asset/frontier."""
    groups = {}
    for row in rows:
        groups.setdefault(f"{row['method']}, {row['setting']}", []).append(row)
    return {name: {m: mean([run[m] for run in runs]) for m in numbers_of(runs)} for name, runs in groups.items()}


def numbers_of(runs):
    """Return the names of the numbers that every run has, without the seed."""
    return [name for name in runs[0] if name not in ("method", "setting", "seed") and all(name in run for run in runs)]


def sources():
    """Return the numbers that pages may name, as nested dicts."""
    rows, limit = (read_csv(FRONTIER / name) for name in ("frontier.csv", "limit.csv"))
    ablation = read_csv(FRONTIER / "first" / "ablation.csv")
    base = {row["seed"]: row for row in ablation if row["setting"] == frontier_tables.PRESET}
    data = {
        "results": read("asset/results.json"),
        "gpt2": read("asset/mini/gpt2/results.json"),
        "reward": read("asset/mini/reward/results.json"),
        "judge": read("asset/mini/judge/results.json"),
        "performance": read("asset/performance.json"),
        "full": read("asset/gpt2/results.json"),
        "full fine-tuning": read("asset/gpt2/finetune_results.json"),
        "medium": read("asset/medium/results.json"),
        "controlled": read("asset/controlled/results.json"),
        "frontier": settings(rows),
        "kl_efficiency": {
            f"{method}, {nats} nats": mean(values)
            for nats in frontier_tables.NATS
            for method, values in frontier_tables.efficiency_at(rows, limit, nats)[0].items()
            if values
        },
        "lead": {
            f"{method}, {nats} nats": mean(values)
            for nats in frontier_tables.NATS
            for method, values in frontier_tables.leads(rows, nats).items()
            if values
        },
        "first frontier": settings(read_csv(FRONTIER / "first" / "frontier.csv")),
        "trl": settings(trl_rows(rows, limit)),
        "ablation": {},
        "mutation": mutation(),
    }
    for name in dict.fromkeys(row["setting"] for row in ablation):
        runs = [row for row in ablation if row["setting"] == name]
        data["ablation"][name] = {
            m: mean([row[m] - (base[row["seed"]][m] if name != frontier_tables.PRESET else 0) for row in runs])
            for m in frontier_tables.measured(ablation)
        }
    return data


def mutation():
    """Return the last row of tests/mutation/report.md: numbers of mutants, and the share that is caught."""
    lines = (ROOT / "tests/mutation/report.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    rows = {name: cells for name, *cells in table}
    values = {name: float(cell.rstrip("%")) for name, cell in zip(rows["file"], rows["all"])}
    return values | {"score": values["score"] / 100, "tested": values["generated"] - values["equivalent"]}


def value_of(data, path):
    """Return the value at a path of keys in nested dicts. Raise BadInput, with the keys there are, if it has none."""
    for name in path.split("/"):
        if not isinstance(data, dict) or name not in data:
            known = ", ".join(data)[:300] if isinstance(data, dict) else data
            raise BadInput(f"no number {path!r}: {name!r} is not one of {known}")
        data = data[name]
    return data


def fill_numbers(text, data):
    """Return a text with the numbers that its comments name."""

    def fill(match):
        old, decimals, interval, percent, path = match.groups()
        entry = value_of(data, path)
        entry = entry if isinstance(entry, dict) else {"value": entry}
        scale = 100 if percent else 1
        comma, digits = "," if entry["value"] * scale >= 1000 else "", len(decimals or "")

        def shown(name, digits=digits):
            return f"{entry[name] * scale:z{comma}.{digits}f}"

        if interval:
            interval = f" ± {shown('half')}" if "±" in interval else f" [{shown('low')}, {shown('high')}]"
        return f"{shown('value')}{interval or ''}{percent or ''}<!-- {path} -->"

    return NUMBER.sub(fill, text)


# ---- blocks


def performance(data):
    """Return {"bench", "peers"}: the tables of docs/performance.md. data: the object in performance.json."""
    bench = [["phase, ms", "124M", "of the peak", "mini", "of the peak"]]
    for name, label in PHASES.items():
        phases = data["bench"]["gpt2"][name], data["bench"]["mini"][name]
        bench.append([label, *(text for p in phases for text in (f"{p['ms']:,.0f}", f"{p['of_peak']:.2f}"))])
    peers = [["work", "library", "ours", "theirs", "times as fast", "memory, ours and theirs, GiB", "commit"]]
    for row in data["peers"]:
        seconds = (f"{row[name]:#.3g} s" for name in ("ours_s", "theirs_s"))
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        memory = f"{row['memory_ours']:.1f}, {row['memory_theirs']:.1f}"
        peers.append([row["work"], row["library"], *seconds, ratio, memory, row["commit"]])
    return {"bench": markdown(bench), "peers": markdown(peers)}


def trl_rows(frontier, limit):
    """Return the rows of trl.csv, of runs of tests/trl_learning.py, with their KL efficiency."""
    rows = read_csv(FRONTIER / "trl.csv")
    frontier_tables.add_efficiency(rows, frontier_tables.start_of(frontier), limit)
    return rows


def trl_table(frontier, limit):
    """Return the table of the rows of trl.csv."""
    names, start = ("kl_exact", "score", "positive_by_judge", "distinct_2"), frontier_tables.start_of(frontier)
    lines = [["run, KL coefficient", *names, "kl_efficiency", "seconds to 0.85 positive", "seconds"]]
    for row in trl_rows(frontier, limit):
        bound = "at least " if frontier_tables.is_bound(row, start, limit) else ""
        cells = [f"{row[name]:.2f}" for name in names] + [f"{bound}{row['kl_efficiency']:.2f}"]
        seconds = [f"{row[name]:.0f}" for name in ("seconds_to_share", "seconds")]
        lines.append([f"{row['method']}, {row['setting']}", *cells, *seconds])
    return markdown(lines)


def blocks():
    """Return {name: text} of the tables and outputs that pages may have."""
    results, recorded = read("asset/results.json"), read("asset/recorded.json")
    rows, limit = (read_csv(FRONTIER / name) for name in ("frontier.csv", "limit.csv"))
    first = (read_csv(FRONTIER / "first" / name) for name in ("frontier.csv", "ablation.csv"))
    names = ("score", "positive_by_judge", "kl", "perplexity", "distinct_2", "response_length")
    sides = [results["before"], results["after"]]
    lines = [[CAPTIONS[name], *(number(side[name]) for side in sides)] for name in names]
    table = markdown([["", "before PPO", "after PPO"], *lines])
    rises = sorted(results["samples"], key=lambda sample: sample["after"]["judge"] - sample["before"]["judge"])
    sample = rises[len(rises) // 2]
    example = [("prompt", sample["prompt"])]
    example += [
        (f"{side} PPO", f"({sample[side]['judge']:.2f}) {sample[side]['text']}") for side in ("before", "after")
    ]
    example = [
        textwrap.fill(
            printable(text),
            width=116,
            initial_indent=f"{name:12}",
            subsequent_indent=" " * 12,
            max_lines=2,
            placeholder=" …",
        )
        for name, text in example
    ]
    return {
        "results": f"{table}\n\nMeasured {recorded['date']} on {recorded['machine']}, commit {recorded['commit']}.",
        "demo": table_text(results),
        "full": table_text(read("asset/gpt2/results.json")),
        "controlled": table_text(read("asset/controlled/results.json")),
        "example": "\n".join(["```text", *example, "```"]),
        "runs": frontier_tables.runs_table(rows, limit),
        **{name: frontier_tables.methods_table(rows, name, limit) for name in frontier_tables.AT_EQUAL_KL},
        "kl_efficiency": frontier_tables.efficiency_table(rows, limit),
        "lead": frontier_tables.lead_table(rows),
        "trl": trl_table(rows, limit),
        "ablation": frontier_tables.ablation_table(*first),
    } | performance(read("asset/performance.json"))


def fill_blocks(text, known, recorded):
    """Return a text with its blocks. A block "run NAME 0:3 -2:" has a recorded command, its time and these lines."""

    def fill(match):
        begin, name, end = match.groups()
        kind, *words = name.split()
        if kind != "run":
            return f"{begin}{value_of(known, name)}\n{end}"
        run = value_of(recorded["runs"], words[0])
        lines, shown = run["output"].splitlines(), [f"$ python {run['command']}    # {duration(run['seconds'])}"]
        chosen = [
            i for part in words[1:] for i in range(len(lines))[slice(*(int(x) if x else None for x in part.split(":")))]
        ]
        for before, i in zip(chosen[:1] + chosen, chosen):
            shown += ["..."] * (i > before + 1) + [lines[i]]
        return "\n".join([f"{begin}```console", *shown, "```", end])

    return BLOCK.sub(fill, text)


# ---- links


def broken_links():
    """Return "page: link" for every link into the repository that leads to no file or to no heading."""
    broken = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
        for link in links:
            if not link.startswith(("http://", "https://", "../../actions/")):  # the last one is GitHub's own page
                name, _, anchor = link.partition("#")
                target = (page.parent / name).resolve() if name else page
                if not target.exists() or anchor and anchor not in anchors(target):
                    broken.append(f"{page.relative_to(ROOT)}: {link}")
    return broken


def anchors(page):
    """Return the anchors that GitHub gives the headings of a page: lower case, spaces as hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def fill(text, data, known, recorded):
    return fill_numbers(fill_blocks(text, known, recorded), data)


def main():
    try:
        if plot.main([]):
            return 2
        build_tutorial.main()
        data, known, recorded = sources(), blocks(), read("asset/recorded.json")
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            filled = fill(text, data, known, recorded)
            if filled != text:
                page.write_text(filled, encoding="utf-8")
                print(f"filled: {page.relative_to(ROOT)}")
        if broken := broken_links():
            raise BadInput("broken links: " + ", ".join(broken))
        return 0
    except BadInput as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main())
