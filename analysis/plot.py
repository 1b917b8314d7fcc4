"""The figures of the README, drawn from the files of committed runs, without torch.

    python -m analysis.plot                        # all of them, from asset/ into asset/images/
    python -m analysis.plot ppo_checkpoints/mini   # the learning curves of one run, into its folder

In asset/images/ every figure is drawn twice: NAME.png for white pages and NAME-dark.png for GitHub's dark mode. All are
1500 pixels wide. Positions in drawings are in inches from the lower left corner, font sizes in points.
"""

import contextlib
import io
import json
import sys
import textwrap
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import matplotlib
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

matplotlib.use("Agg")  # files only, no screen
import matplotlib.pyplot as plt

from analysis.tables import COUNTED, JUDGED, read_csv
from runtime.errors import BadInput, print_error, printable

ASSET = Path("asset")
WIDTH, SMALL, LINE = 10, 10, 0.19  # inches; points, 11.5 pixels in GitHub's README; inches between lines of text

# GPT-2, the reward, the judge, POSITIVE, NEGATIVE, texts and arrows, axes, background: the n-th colours of a theme
BLUE, AMBER, PURPLE, GREEN, RED, INK, GREY, PAPER = (f"C{n}" for n in range(8))
THEMES = {  # end of a file's name: the colours. Hues of Okabe and Ito 2008, safe for colour-blind readers
    "": "#0072b2 #a66300 #93478f #007d5a #c24e00 #222222 #6b6b6b #ffffff",
    "-dark": "#58b4f0 #e3b341 #d193cf #35c29a #ff7f50 #e6edf3 #9198a1 #0d1117",
}
THEMES = {end: {"axes.prop_cycle": plt.cycler(color=colours.split())} for end, colours in THEMES.items()}

plt.rcParams.update({
    "text.parse_math": False,  # generated texts may contain $
    "text.hinting": "none",  # with hinting, letters are wider
    "font.family": "DejaVu Sans", "font.size": 11, "text.color": INK, "axes.labelcolor": INK,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": SMALL,
    "legend.facecolor": PAPER, "legend.edgecolor": "none", "legend.handlelength": 1.3,
    "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.grid": True, "grid.color": GREY,
    "grid.alpha": 0.2, "axes.facecolor": "none", "axes.titlelocation": "left", "axes.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.4,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
    "figure.dpi": 150, "savefig.facecolor": PAPER, **THEMES[""],
})  # fmt: skip

PANELS = (  # (metrics of a panel, its title)
    (("positive_by_reward", "positive_by_judge"), "share of positive responses"),
    (("kl", "kl_exact"), "KL, nats per response"),
    (("response_length",), "response length, tokens"),
    (("entropy",), "entropy, nats per token"),
)
DPO_PANELS = (  # of a run of dpo.py
    (("loss",), "loss, nats"),
    (("accuracy", "effective_samples"), "pairs in the order of their scores, or responses that count"),
)
CURVES = {  # metric of a panel with a legend: (colour, label)
    "positive_by_reward": (AMBER, "by the reward model"),
    "positive_by_judge": (PURPLE, "by the judge, not used in training"),
    "kl": (BLUE, "kl ± standard error"),
    "kl_exact": (INK, "kl_exact, whole vocabulary"),
}


@contextlib.contextmanager
def reading(path, hint=""):
    """Raise BadInput, which names the file, if it is missing or its contents are not what the block expects."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{error.filename or path}: {error.strerror}{hint}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is damaged, or of another version: {error!r}") from None


def read_jsonl(file):
    """Return the JSON values of the lines of a file. A last line that a crash left incomplete is ignored."""
    *lines, rest = Path(file).read_bytes().split(b"\n")
    values = [json.loads(line) for line in lines]
    with contextlib.suppress(ValueError):
        values.append(json.loads(rest))
    return values


def read_results(folder):
    return json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))


def columns(lines, *names):
    """Return a list of numbers for each name, from the lines that have all names."""
    return [[float(line[name]) for line in lines if all(n in line for n in names)] for name in names]


def constant(folder, name, default):
    """Return a constant of the run in a folder; the default if the run, or run_config.json, does not have it."""
    file = Path(folder) / "run_config.json"
    with reading(file):
        return json.loads(file.read_text(encoding="utf-8")).get(name, default) if file.is_file() else default


def panels_of(folder):
    """Return the panels for the log of a folder, which depend on the script that wrote it."""
    return DPO_PANELS if any("loss" in line for line in read_jsonl(Path(folder) / "log.jsonl")) else PANELS


def curves(folder, panels=None, width=WIDTH):
    """Draw panels over the rollouts in the log of a folder, two in a row. Without shares of positive texts: the score.

    width: of the figure, in inches. The narrower it is, the larger its text is on a page. panels: default panels_of.
    """
    lines, panels = read_jsonl(Path(folder) / "log.jsonl"), panels or panels_of(folder)
    rows = -(-len(panels) // 2)
    figure = plt.figure(figsize=(width, 2.75 * rows), layout="constrained")
    axes = figure.subplots(rows, min(2, len(panels)), squeeze=False, sharex=True)
    for axis, (names, title) in zip(axes.flat, panels):
        names = [name for name in names if any(name in line for line in lines)]
        if not names:
            names, title = ["score"], "score"
        for name in names:
            colour, text = CURVES.get(name, (BLUE, None))
            axis.plot(*columns(lines, "step", name), color=colour, label=text)
        if "kl" in names:
            steps, kl, stderr = columns(lines, "step", "kl", "kl_stderr")
            low, high = ([k + sign * s for k, s in zip(kl, stderr)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=BLUE, alpha=0.2, linewidth=0)
            if (target := constant(folder, "kl_target", 0)) > 0:
                axis.axhline(target, color=GREY, linestyle="--", label="target")
        if title == PANELS[0][1]:
            axis.set_ylim(0, 1)
            title = title.replace("positive", COUNTED[constant(folder, "task", "positive")])
        if names[0] in CURVES:
            axis.legend()
        axis.set_title(title)
        axis.locator_params(axis="x", integer=True)
    for axis in axes[-1]:
        axis.set_xlabel("rollout")
    return figure


def learning_curves(folder):
    """Draw the learning curves of a run into learning_curves.png in its folder; return the path."""
    with reading(Path(folder, "log.jsonl")):
        figure = curves(folder)
    return save(figure, Path(folder) / "learning_curves.png")


def png(figure, pixels=1500):
    """Close a figure; return it as the bytes of a PNG of that width, which do not depend on date or version."""
    file = io.BytesIO()
    figure.savefig(file, dpi=pixels / figure.get_figwidth(), metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))
    return path


# ---- drawings


def canvas(height, title=""):
    """Return a figure, and axes over all of it with inches as units."""
    figure = plt.figure(figsize=(WIDTH, height))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
    axis.axis("off")
    note(axis, 0.3, height - 0.35, title, ha="left", size=14, weight="bold")
    return figure, axis


def chart(figure, xlabel, ylabel):
    """Return axes for data, to the right of a drawing."""
    height = figure.get_figheight()
    return figure.add_axes((0.725, 0.7 / height, 0.25, 1 - 1.25 / height), xlabel=xlabel, ylabel=ylabel)


def note(axis, x, y, text, **style):
    y += 0.02  # so that capitals and digits look centred
    axis.text(x, y, text, **{"size": SMALL, "ha": "center", "va": "center_baseline", "linespacing": 1.3} | style)


def box(axis, x, y, width, height, text, colour=GREY, frozen=False, solid=False, size=11):
    """Draw a box with its centre at (x, y), dashed if it is frozen; return the midpoint of each side."""
    dx, dy = width / 2, height / 2
    face, line = to_rgba(colour, 1 if solid else 0.1), "--" if frozen else "-"
    shape = dict(boxstyle="round,pad=0,rounding_size=0.08", facecolor=face, edgecolor=colour, linestyle=line)
    axis.add_patch(FancyBboxPatch((x - dx, y - dy), width, height, linewidth=1.4, **shape))
    note(axis, x, y, text, size=size, color=PAPER if solid else INK)
    return SimpleNamespace(left=(x - dx, y), right=(x + dx, y), top=(x, y + dy), bottom=(x, y - dy))


def arrow(axis, *points):
    """Draw an arrow along straight lines through points (x, y)."""
    path = matplotlib.path.Path(points)
    axis.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=13, color=INK, linewidth=1.2))


def finetune_model(folder):
    """Draw fine-tuning: each token predicts the next one; and the validation loss in the log of a folder."""
    tokens, bits = columns(read_jsonl(Path(folder) / "log.jsonl"), "tokens", "val_bits_per_character")
    figure, axis = canvas(3.6, "1. Fine-tuning")
    gpt2 = box(axis, 3.88, 1.75, 4.76, 0.6, "GPT-2", BLUE)
    for i, (token, target) in enumerate(pairwise(("This", "movie", "was", "great", "<|endoftext|>"))):
        x = 2.05 + 1.22 * i
        arrow(axis, box(axis, x, 0.85, 1.1, 0.4, token, size=SMALL).top, (x, gpt2.bottom[1]))
        arrow(axis, (x, gpt2.top[1]), box(axis, x, 2.65, 1.1, 0.4, target, size=SMALL).bottom)
    note(axis, 0.3, 0.85, "review", ha="left")
    note(axis, 0.3, 2.65, "next token", ha="left")
    note(axis, 3.88, 0.3, "loss = cross-entropy of the next token, mean over all tokens")

    axis = chart(figure, "training tokens, millions", "validation bits per character")
    axis.plot([n / 1e6 for n in tokens], bits, color=BLUE, marker=".", clip_on=False)
    axis.annotate(f"{bits[-1]:.2f}", (tokens[-1] / 1e6, bits[-1]), (0, 8), textcoords="offset points", ha="center")
    axis.set_xlim(left=0)
    return figure


def reward_model(folder):
    """Draw the reward: the score of a text; and the log-odds of held-out short texts in the results of a folder."""
    histogram = read_results(folder)["after"]["histogram"]
    figure, axis = canvas(3.6, "2. Reward")
    bert = box(axis, 3.3, 2.1, 1.3, 1.3, "BERT", AMBER)
    for y, text, label, colour in ((2.45, "prompt", "NEGATIVE", GREY), (1.75, "response", "POSITIVE", GREEN)):
        logit = box(axis, 5.4, y, 1.8, 0.5, f"logit of {label}", colour)
        arrow(axis, box(axis, 1.1, y, 1.6, 0.5, text).right, (bert.left[0], y))
        arrow(axis, (bert.right[0], y), logit.left)
    arrow(axis, logit.bottom, box(axis, 5.4, 0.65, 1.8, 0.5, "score", GREEN, solid=True).top)
    arrow(axis, box(axis, 3.3, 0.65, 1.8, 0.5, "labelled reviews").top, bert.bottom)
    note(axis, 3.2, 1.15, "training", ha="right")

    axis = chart(figure, "log-odds of POSITIVE", "held-out short texts")
    for name, colour, x, side in (("negative", RED, 0, "left"), ("positive", GREEN, 1, "right")):
        style = dict(facecolor=to_rgba(colour, 0.3), edgecolor=colour, linewidth=1.4)
        axis.stairs(histogram[name], histogram["edges"], fill=True, **style)
        note(axis, x, 1.05, f"{name} reviews", color=colour, ha=side, transform=axis.transAxes)
    return figure


def ppo():
    """Draw PPO: from a prompt to the new weights of the policy."""
    figure, axis = canvas(4.7, "3. PPO")
    prompt = box(axis, 0.9, 3.05, 1.2, 0.6, "prompt")
    policy = box(axis, 2.8, 3.05, 1.8, 1.0, "policy GPT-2,\nwith value head", BLUE)
    response = box(axis, 4.7, 3.05, 1.2, 0.7, "prompt +\nresponse")
    reward = box(axis, 6.75, 4.05, 1.9, 0.7, "reward BERT\nfrozen", AMBER, frozen=True)
    reference = box(axis, 6.75, 3.05, 1.9, 0.7, "reference GPT-2\nfrozen", BLUE, frozen=True)
    judge = box(axis, 6.75, 2.05, 1.9, 0.7, "judge\nfrozen, only logged", PURPLE, frozen=True, size=SMALL)
    rewards = box(axis, 8.95, 3.55, 1.5, 1.7, "rewards\nscore − β KL")
    advantages = box(axis, 8.95, 0.75, 1.5, 0.7, "advantages\nGAE")
    update = box(axis, 5.2, 0.75, 2.2, 0.7, "clipped update\na few epochs")

    arrow(axis, prompt.right, policy.left)
    arrow(axis, policy.right, response.left)
    for model in (reward, reference, judge):
        arrow(axis, response.right, (5.55, 3.05), (5.55, model.left[1]), model.left)
    for model, text in ((reward, "score"), (reference, "KL")):
        x, y = model.right
        arrow(axis, (x, y), (rewards.left[0], y))
        note(axis, x + 0.23, y + 0.15, text)
    arrow(axis, (9.3, rewards.bottom[1]), (9.3, advantages.top[1]))
    arrow(axis, (3.3, policy.bottom[1]), (3.3, 1.4), (8.7, 1.4), (8.7, advantages.top[1]))
    note(axis, 4.2, 1.55, "values")
    arrow(axis, advantages.left, update.right)
    arrow(axis, update.left, (2.3, 0.75), (2.3, policy.bottom[1]))
    note(axis, 2.2, 1.6, "new weights", ha="right")
    return figure


def example_results(folder):
    """Draw the first four samples in the results of a folder: prompts, responses, and the judge's probabilities."""
    results = read_results(folder)
    samples, temperature = results["samples"][:4], results["config"]["sample_temperature"]
    layout = ((0.3, 20, "bold", "prompt"), (2.75, 37, "normal", "before PPO"), (6.6, 37, "normal", "after PPO"))
    rows = []  # the lines of each cell: in a monospaced font, all lines of a length are equally wide
    for sample in samples:
        texts = sample["prompt"], sample["before"]["text"], sample["after"]["text"]
        rows.append([textwrap.wrap(printable(text), width) for text, (_, width, _, _) in zip(texts, layout)])
    heights = [0.3 + LINE * max(1, *map(len, row)) for row in rows]
    y = sum(heights) + 0.4
    figure, axis = canvas(y + 0.5)
    for x, _, _, title in layout:
        note(axis, x, y + 0.16, title, ha="left", va="baseline", size=11, weight="bold")
    for sample, row, height in zip(samples, rows, heights):
        axis.axhline(y, 0.03, 0.97, color=GREY, linewidth=0.6)
        for (x, _, weight, _), lines in zip(layout, row):
            for i, line in enumerate(lines):
                style = dict(ha="left", va="baseline", weight=weight, family=["DejaVu Sans Mono", "DejaVu Sans"])
                note(axis, x, y - 0.3 - i * LINE, line, **style)
        for x, p in ((2.4, sample["before"]["judge"]), (6.25, sample["after"]["judge"])):
            box(axis, x, y - 0.25, 0.5, 0.24, f"{p:.2f}", GREEN if p > 0.5 else RED, solid=True, size=SMALL)
        y -= height
    axis.axhline(y, 0.03, 0.97, color=GREY, linewidth=0.6)
    judged = JUDGED[results["config"].get("task", "positive")]
    caption = f"temperature {temperature}; in colour: the judge's {judged}"
    note(axis, 0.3, y - 0.2, caption, ha="left", color=GREY)
    return figure


METHODS = {  # method in frontier.csv: (colour, marker)
    "PPO": (BLUE, "o"), "PPO, first constants": (BLUE, "x"), "RLOO": (AMBER, "s"), "GRPO": (GREEN, "^"),
    "best-of-n": (PURPLE, "D"), "positive-only fine-tuning": (GREY, "v"),
    "DPO": (RED, "P"), "reward-weighted": (GREY, "X"),
    "TRL 0.11.4, its constants": (INK, "<"), "TRL 0.11.4, our constants": (INK, ">"),
}  # fmt: skip


def frontier(folder):
    """Draw score and judge against KL in frontier.csv of a folder: a marker per run, without lines between them.

    If there is a limit.csv, also the curve of the best possible policy, with the interval of its score. If there is a
    trl.csv, also the runs of TRL in it.
    """
    rows = read_csv(Path(folder) / "frontier.csv")
    if (file := Path(folder) / "trl.csv").is_file():
        rows += [row for row in read_csv(file) if row["method"].startswith("TRL")]
    start = next(row["method"] for row in rows if row["method"] not in METHODS)
    limit, file = {}, Path(folder) / "limit.csv"
    if file.is_file():
        points = read_csv(file)
        limit = {name: [point[name] for point in points] for name in points[0]}
        score = next(row["score"] for row in rows if row["method"] == start)
        limit |= {name: [score + x for x in limit[name]] for name in ("gain", "low", "high")}
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.6), layout="constrained")
    for axis, (name, label) in zip(axes, (("score", "score"), ("positive_by_judge", "share positive by the judge"))):
        if limit:
            curve = limit["gain" if name == "score" else name]
            axis.plot(limit["kl"], curve, color=INK, label="limit: the best possible policy")
        if limit and name == "score":
            axis.fill_between(limit["kl"], limit["low"], limit["high"], color=INK, alpha=0.15, linewidth=0)
        for method, (colour, marker) in ({start: (INK, "*")} | METHODS).items():
            runs = [row for row in rows if row["method"] == method]
            if runs:
                style = dict(markersize=11, clip_on=False) if method == start else dict(markersize=5, alpha=0.7)
                kl, values = ([row[n] for row in runs] for n in ("kl_exact", name))
                axis.plot(kl, values, marker, color=colour, label=method, **style)
        # square root, as in Gao et al. 2022: most changes happen in the first nats
        end = 1.1 * max(row["kl_exact"] for row in rows)
        axis.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
        axis.set_xticks([kl for kl in (0, 1, 2, 4, 8, 16, 32, 64) if kl < end])
        axis.set(xlabel="KL, nats per response, square-root scale", ylabel=label, xlim=(0, end))
    axes[1].legend(loc="lower right", title="one marker per run")
    return figure


FIGURES = [  # (name in asset/images, function that draws it, what it reads)
    ("learning_curves", curves, ASSET, (PANELS[0], (("kl",), PANELS[1][1])), 6.8),  # for beginners, and on phones
    ("all_curves", curves, ASSET),
    ("finetune_model", finetune_model, ASSET / "mini" / "gpt2"),
    ("reward_model", reward_model, ASSET / "mini" / "reward"),
    ("ppo", ppo),
    ("example_results", example_results, ASSET),
    ("frontier", frontier, ASSET / "frontier"),
]


def main(argv):
    """Draw the figures and print their paths. Return the exit status: 2 after one line on bad usage or a bad file."""
    try:
        if len(argv) > 1:
            raise BadInput("usage: python -m analysis.plot [FOLDER], the folder of a run")
        if argv:
            print(learning_curves(argv[0]))
            return 0
        for (name, draw, *source), (end, theme) in product(FIGURES, THEMES.items()):
            with plt.rc_context(theme):
                with reading(*source[:1] or [ASSET]):
                    figure = draw(*source)
                print(save(figure, ASSET / "images" / f"{name}{end}.png"))
        return 0
    except BadInput as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
