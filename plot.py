"""Learning curves from a run's metrics.jsonl; no torch here, so figures can be redrawn anywhere.

python plot.py ppo_checkpoints/mini
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no screen
import matplotlib.pyplot as plt

PANELS = (  # (metrics of one panel, label of its y axis)
    (("score",), "score"),
    (("kl", "kl_exact"), "KL, nats a response"),
    (("entropy",), "entropy, nats a token"),
    (("response_length",), "response length, tokens"),
    (("clip_frac", "vf_clip_frac"), "clipped share"),
    (("explained_variance",), "explained variance of the values"),
)


def read_metrics(folder):
    """The lines of metrics.jsonl as dicts."""
    with open(Path(folder) / "metrics.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def learning_curves(folder):
    """Draw PANELS against the rollout into learning_curves.png in the folder; returns its path."""
    lines = read_metrics(folder)
    steps = [line["step"] for line in lines]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained", sharex=True)
    for axis, (names, label) in zip(axes.flat, PANELS):
        for name in names:
            axis.plot(steps, [line[name] for line in lines], label=name, linewidth=1.5)
        if names[0] == "kl":
            spread = [line["kl_stderr"] for line in lines]
            low, high = zip(*((line["kl"] - s, line["kl"] + s) for line, s in zip(lines, spread)))
            axis.fill_between(steps, low, high, alpha=0.2, linewidth=0)
        if len(names) > 1:
            axis.legend(frameon=False)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("rollout")
    path = Path(folder) / "learning_curves.png"
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        print("error: usage: python plot.py FOLDER, a folder of ppo.py with its metrics.jsonl", file=sys.stderr)
        sys.exit(2)
    print(learning_curves(sys.argv[1]))
