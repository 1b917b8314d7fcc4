"""A page to look into a run: the table, the learning curves, and every token of 200 responses before and after PPO.

    python report.py ppo_checkpoints/mini

Reads results.json, viewer.json and, where there are, log.jsonl and samples.jsonl of the folder and writes report.html
there: one file that needs no network. No torch here, so a page can be written anywhere. The page itself is
report.html.jinja.
"""

import base64
import hashlib
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.ticker import MaxNLocator

from analysis.plot import CAPTIONS, CURVES, DIGITS, kl_target, panels, read_jsonl, read_metrics, read_results
from runtime.errors import BadInput, printable

PAGE = "report.html"
TRAINING = "samples.jsonl"  # of ppo.py: responses to the same few prompts every sample_every rollouts
MEASURES = {  # of a token: (text of the switch, the number that has no colour)
    "kl": ("KL, nats", 0),
    "value": ("value", 0),
    "advantage": ("advantage", 0),
    "ratio": ("ratio", 1),
}
ALWAYS = ("kl", "ratio")  # of MEASURES; a policy that was trained without a value head has no others
SIDES = ("before", "after")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 230, 54, 10, 12, 40  # of a chart and its margins, in SVG units


@contextmanager
def reading(folder, name):
    """BadInput, one line that names the file, where it is not there or what it holds is not what was written."""
    file = Path(folder) / name
    try:
        yield
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}: python evaluate.py writes it") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{file} is damaged, or of another version: {error!r}") from None


# ---- the table


def cell(entry, digits, sign=""):
    """A number of results.json and its interval, both as text; with sign "+" the number shows its sign."""
    interval = f"[{entry['low']:z.{digits}f}, {entry['high']:z.{digits}f}]" if "low" in entry else ""
    return f"{entry['value']:{sign}z.{digits}f}", interval


def table(results):
    """The rows of the table: (caption, [a cell each for before, after, difference]).

    A name that CAPTIONS does not have is its own caption; one that an older run does not have is no row.
    """
    before, after, difference = results["before"], results["after"], results.get("difference", {})
    names = [name for name in CAPTIONS if name in before] + [name for name in before if name not in CAPTIONS]
    return [
        (
            CAPTIONS.get(name, name),
            [
                cell(before[name], DIGITS.get(name, 2)),
                cell(after[name], DIGITS.get(name, 2)),
                cell(difference[name], DIGITS.get(name, 2), "+") if name in difference else ("–", ""),
            ],
        )
        for name in names
    ]


# ---- the learning curves


def charts(lines, target):
    """plot.PANELS as what an SVG of WIDTH x HEIGHT draws: ticks (position, text), curves and a band as points.

    lines: those of log.jsonl; a number that is not finite is left out. target: of the KL, 0 for none.
    """
    return [chart(names, label, lines, target) for names, label in panels(lines)]


def chart(names, label, lines, target):
    band = [(x["step"], x["kl"], x["kl_stderr"]) for x in lines if "kl" in names and "kl_stderr" in x]
    edges = [[(step, kl + sign * error) for step, kl, error in band] for sign in (-1, 1)]
    target = target if "kl" in names else 0
    curves = {name: [(x["step"], x[name]) for x in lines if name in x and math.isfinite(x[name])] for name in names}
    points = [point for curve in (*curves.values(), *edges) for point in curve if math.isfinite(point[1])]
    x_ticks = MaxNLocator(5, steps=[1, 2, 5, 10], integer=True).tick_values(
        0, max([step for step, _ in points], default=0) or 1
    )
    heights = [0, 1] if label == "share positive" else [y for _, y in points] + [target] * (target > 0)
    y_ticks = MaxNLocator(4).tick_values(min(heights, default=0), max(heights, default=1))

    def place(x, y):
        across, up = (x - x_ticks[0]) / np.ptp(x_ticks), (y - y_ticks[0]) / np.ptp(y_ticks)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def path(points):
        return " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points if math.isfinite(y))

    return {
        "label": label,
        "x_ticks": [(place(x, 0)[0], f"{x:g}") for x in x_ticks],
        "y_ticks": [(place(0, y)[1], f"{y:g}") for y in y_ticks],
        "curves": [(name, path(curve)) for name, curve in curves.items()],
        "legend": [(name, CURVES[name][1]) for name in names if name in CURVES] + [("target", "target")] * (target > 0),
        "band": path(edges[0] + edges[1][::-1]),
        "target": place(0, target)[1] if target > 0 else None,
    }


# ---- the samples during training


def training_samples(lines):
    """The lines of samples.jsonl by prompt: {prompt: [(step, score, response) by rising step]}, scores as text.

    Of a step that is there twice, as after a crash, the later line counts.
    """
    steps, prompts = {}, {}
    for line in lines:
        if not isinstance(line["step"], int):
            raise TypeError(f"step {line['step']!r} is not an int")
        steps[line["step"]] = line["samples"]
    for step in sorted(steps):
        for sample in steps[step]:
            prompt, response = sample["prompt"] + "", sample["response"] + ""  # TypeError unless they are texts
            prompts.setdefault(prompt, []).append((step, score_text(sample["score"]), response))
    return prompts


def score_text(score):
    """A score as text; ppo.py writes null for one that is not finite."""
    return "not finite" if score is None else f"{number(score):z.2f}"


# ---- the tokens


def number(x):
    """x to four decimals. The page's JSON knows no nan: ValueError; of what is no number TypeError."""
    if not math.isfinite(x):
        raise ValueError(f"{x} is not finite")
    return round(x, 4)


def response(answer, measures):
    """One side of a sample in viewer.json, checked: its tokens, a list of numbers for each measure, two scores."""
    tokens = answer["tokens"]
    "".join(tokens)  # TypeError unless all are texts
    checked = {"tokens": tokens, "score": number(answer["score"]), "judge": number(answer["judge"])}
    for name in measures:
        checked[name] = [number(x) for x in answer[name]]
        if len(checked[name]) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens, {len(checked[name])} numbers of {name}")
    return checked


def scale(values, centre):
    """Range of the colours, (low, centre, high): even to both sides and as wide as 98 % of the values need.

    Of a ratio it ends at 0, which none is below. Values farther out have the last colour.
    """
    spread = float(np.quantile(np.abs(np.array(values) - centre), 0.98)) if values else 0
    spread = number(min(spread, centre or spread)) or 1.0
    return [centre - spread, centre, centre + spread]


def tokens(viewer):
    """viewer.json as the page's script reads it: samples, and by measure the range of its colours.

    The measures are those of MEASURES that the file has. kl_coef is that of the advantages, None without them.
    """
    sides = [sample[side] for sample in viewer["samples"] for side in SIDES]
    measures = [name for name in MEASURES if name in ALWAYS or any(name in side for side in sides)]
    samples = []
    for sample in viewer["samples"]:
        prompt = sample["prompt"] + ""  # TypeError unless it is a text
        samples.append({"prompt": prompt} | {side: response(sample[side], measures) for side in SIDES})
    scales = {}
    for name in measures:
        numbers = [x for sample in samples for side in SIDES for x in sample[side][name]]
        scales[name] = scale(numbers, MEASURES[name][1])
    coefficient = number(viewer["kl_coef"]) if "advantage" in measures else None
    return {"kl_coef": coefficient, "scales": scales, "samples": samples}


# ---- the page


def sha256(template, block):
    """The hash by which the page's Content-Security-Policy lets its own script and style in, and no others."""
    text = "".join(template.blocks[block](template.new_context()))
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write(folder):
    """Write the page of a run into its folder; returns its path. BadInput names a file that is missing or damaged.

    A policy without a log, best/ or somebody else's, has no learning curves, and one without samples.jsonl no samples
    during training.
    """
    drawn, training = [], {}
    with reading(folder, "results.json"):
        results = read_results(folder)
        rows, config, prompts = table(results), dict(results.get("config", {})), results.get("prompts")
    with reading(folder, "viewer.json"):
        viewer = tokens(json.loads(Path(folder, "viewer.json").read_text(encoding="utf-8")))
    with reading(folder, "run_config.json"):
        target = kl_target(folder)
    if Path(folder, "log.jsonl").is_file():
        with reading(folder, "log.jsonl"):
            drawn = charts(read_metrics(folder), target)
    if Path(folder, TRAINING).is_file():
        with reading(folder, TRAINING):
            training = training_samples(read_jsonl(Path(folder, TRAINING)))
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(f"{PAGE}.jinja")
    page = template.render(
        folder=Path(folder).as_posix(), rows=rows, config=config, prompts=prompts, charts=drawn, viewer=viewer,
        training=training,
        measures={name: MEASURES[name][0] for name in viewer["scales"]}, box=(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM),
        script_hash=sha256(template, "script"), style_hash=sha256(template, "style"),
    )  # fmt: skip
    path = Path(folder, PAGE)
    path.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair in a name is a "?"
    return path


def main(argv):
    """Write the page and print its path. Returns the exit status: 2 after one line on bad usage or a bad file."""
    try:
        if len(argv) != 1:
            raise BadInput("usage: python report.py FOLDER, one that evaluate.py has written to")
        print(write(argv[0]))
        return 0
    except BadInput as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
