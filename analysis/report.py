"""A page to inspect a run: results, learning curves, and the responses before and after PPO token by token.

    python -m analysis.report ppo_checkpoints/mini

Reads results.json and viewer.json in the folder and, if they exist, log.jsonl and samples.jsonl, and writes report.html
there: a single file that needs no network. The page itself is report.html.jinja.
"""

import base64
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.plot import THEMES, curves, panels_of, png, read_jsonl, read_results, reading
from analysis.tables import JUDGED, efficiency_text, results_rows
from runtime.errors import BadInput, print_error

PAGE = "report.html"
# measure of a token: (label, value without colour)
MEASURES = {"kl": ("KL, nats", 0), "value": ("value", 0), "advantage": ("advantage", 0), "ratio": ("ratio", 1)}
ALWAYS = ("kl", "ratio")  # measures that every policy has; without a trained value head there are no others
SIDES = ("before", "after")


def training_samples(lines):
    """Return the lines of samples.jsonl as {prompt: [(step, score, response), ...]} in the order of the steps.

    If a step occurs twice, as after a resume, the later line counts.
    """
    steps, prompts = {}, {}
    for line in lines:
        steps[int(line["step"])] = line["samples"]
    for step in sorted(steps):
        for sample in steps[step]:
            score = "not finite" if sample["score"] is None else f"{sample['score']:z.2f}"
            prompts.setdefault(sample["prompt"], []).append((step, score, sample["response"]))
    return prompts


def pictures(folder):
    """Return the learning curves of a run as [(title, PNG in base64, the same for dark mode), ...], one per panel."""
    rows = []
    for panel in panels_of(folder):
        row = []
        for theme in THEMES.values():
            with plt.rc_context(theme):
                figure = curves(folder, [panel], width=5)
                row.append(base64.b64encode(png(figure, 1000)).decode())
        rows.append((figure.axes[0].get_title(loc="left"), *row))
    return rows


def check_side(side, measures):
    """Raise ValueError or TypeError unless a response in viewer.json has a text and finite measures for each token."""
    "".join(side["tokens"])
    for name in measures:
        if len(side[name]) != len(side["tokens"]):
            raise ValueError(f"{len(side['tokens'])} tokens, {len(side[name])} numbers of {name}")
    if not np.isfinite([side["score"], side["judge"], *(x for name in measures for x in side[name])]).all():
        raise ValueError("a number is not finite")


def scale(values, centre):
    """Return the range of the colours, [low, centre, high]: symmetric, and wide enough for 98 % of the values.

    The range of a ratio does not extend below 0. Values outside the range have the colour of its end.
    """
    spread = float(np.quantile(np.abs(np.array(values) - centre), 0.98)) if values else 0
    spread = round(min(spread, centre or spread), 4) or 1.0
    return [centre - spread, centre, centre + spread]


def token_data(viewer):
    """Return what the script of the page reads: the samples of viewer.json, and {measure: range of its colours}."""
    samples = [{name: sample[name] for name in ("prompt", *SIDES)} for sample in viewer["samples"]]
    sides = [sample[side] for sample in samples for side in SIDES]
    measures = [name for name in MEASURES if name in ALWAYS or any(name in side for side in sides)]
    for side in sides:
        check_side(side, measures)
    scales = {name: scale([x for side in sides for x in side[name]], MEASURES[name][1]) for name in measures}
    coefficient = float(viewer["kl_coef"]) if "advantage" in measures else None  # used for the advantages
    return {"kl_coef": coefficient, "scales": scales, "samples": samples}


def write(folder):
    """Write the page of a run into its folder; return the path. BadInput names a file that is missing or damaged."""
    folder, hint = Path(folder), ": python evaluate.py writes it"
    log, training = folder / "log.jsonl", folder / "samples.jsonl"
    with reading(folder / "results.json", hint):
        results = read_results(folder)
        rows, config = results_rows(results), dict(results.get("config", {}))
        efficiency = efficiency_text(results["kl_efficiency"]) if "kl_efficiency" in results else ""
    with reading(folder / "viewer.json", hint):
        viewer = token_data(json.loads((folder / "viewer.json").read_text(encoding="utf-8")))
    with reading(log):
        panels = pictures(folder) if log.is_file() else []
    with reading(training):
        samples = training_samples(read_jsonl(training)) if training.is_file() else {}
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(f"{PAGE}.jinja")
    page = template.render(
        folder=folder.as_posix(),
        rows=rows,
        config=config,
        efficiency=efficiency,
        judged=JUDGED[config.get("task", "positive")],
        prompts=results.get("prompts"),
        panels=panels,
        training=samples,
        measures={name: MEASURES[name][0] for name in viewer["scales"]},
        viewer=viewer,
    )
    path = folder / PAGE
    temporary = folder / f".{PAGE}.tmp"  # a page is complete or not there: with it, an evaluation is finished
    temporary.write_text(page, encoding="utf-8", errors="replace")  # a lone surrogate in a name becomes "?"
    temporary.replace(path)
    return path


def main(argv):
    """Write the page and print its path. Return the exit status: 2 after one line on bad usage or a bad file."""
    try:
        if len(argv) != 1:
            raise BadInput("usage: python -m analysis.report FOLDER, with the results of evaluate.py")
        print(write(argv[0]))
        return 0
    except BadInput as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
