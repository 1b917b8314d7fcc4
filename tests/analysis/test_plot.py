"""The figures of the README: they show the data, are legible, and safe for any generated text."""

import itertools
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, StepPatch
from matplotlib.text import Text

from analysis import plot
from analysis.plot import FIGURES, PANELS, THEMES, curves, example_results, finetune_model, frontier, main, reward_model
from analysis.tables import COUNTED, JUDGED

SOURCES = ["log.jsonl", "mini/gpt2/log.jsonl", "mini/reward/results.json", "results.json"]
SHARES = ("positive_by_reward", "positive_by_judge")
NASTY = "$x_1$ $\\frac{$ ^ & \\ %\x00\x1b[31m\u202e\u2028\n\ttail"


def write_lines(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_samples(folder, *texts):
    sides = [{"text": text, "judge": judge} for text, judge in zip(texts, (0.5, 0.51))]
    samples = [{"prompt": texts[0], "before": sides[0], "after": sides[1]}] * 5
    (folder / "results.json").write_text(json.dumps({"samples": samples, "config": {"sample_temperature": 0.7}}))


def ppo_log(without=()):
    names = ["step", "kl_stderr", "score"] + [name for names, _ in PANELS for name in names]
    numbers = np.random.default_rng(0).random((6, len(names))).tolist()
    lines = [dict(zip(names, row)) | {"step": step} for step, row in enumerate(numbers)]
    return [{name: value for name, value in line.items() if name not in without} for line in lines]


@pytest.fixture
def asset(tmp_path, monkeypatch):
    """The files that all figures read, in asset/ of the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "asset"
    write_lines(folder / "log.jsonl", ppo_log())
    numbers = [{"step": i, "tokens": 1000 * i, "loss": 5.0} for i in range(5)]
    numbers[0]["val_bits_per_character"], numbers[4]["val_bits_per_character"] = 3.0, 1.5
    write_lines(folder / "mini/gpt2/log.jsonl", numbers)
    (folder / "mini/reward").mkdir()
    histogram = {"edges": [-1.5, -0.5, 0.5, 1.5], "negative": [4, 2, 1], "positive": [0, 3, 9]}
    (folder / "mini/reward/results.json").write_text(json.dumps({"after": {"histogram": histogram}}))
    write_samples(folder, "A film about a dog", "that is good")
    (folder / "frontier").mkdir()
    (folder / "frontier" / "frontier.csv").write_text(FRONTIER)
    yield folder
    plt.close("all")


FRONTIER = """method,setting,seed,score,positive_by_judge,kl_exact
fine-tuned model,0,0,0.0,0.5,0.0
PPO,0.3,0,0.1,0.60,0.9
PPO,0.3,1,0.2,0.62,1.0
PPO,0.3,2,0.3,0.64,1.1
PPO,0.1,0,0.5,0.70,2.0
PPO,0.1,1,0.5,0.70,3.0
PPO,0.1,2,0.5,0.70,4.0
best-of-n,2,0,0.4,0.8,0.2
best-of-n,2,1,0.4,0.8,0.2
"""


def test_a_frontier_has_a_marker_per_run_and_no_lines_between_them(asset):
    """A line from 8 to 40 nats would show scores that no run has."""
    for axis, column in zip(frontier(asset / "frontier").axes, (3, 4)):
        lines = {line.get_label(): line for line in axis.lines}
        assert list(lines) == ["fine-tuned model", "PPO", "best-of-n"]
        for method, line in lines.items():
            rows = [row.split(",") for row in FRONTIER.splitlines() if row.startswith(method)]
            assert line.get_xydata().tolist() == [[float(row[5]), float(row[column])] for row in rows]
            assert line.get_linestyle() == "None" and line.get_marker() != "None"
        assert not axis.collections


def test_a_frontier_also_has_the_runs_of_trl_and_ends_a_tenth_after_the_largest_kl(asset):
    """Not the run of ppo.py in trl.csv, which was only timed: it has no part in the sweep."""
    trl = ["method,setting,seed,score,positive_by_judge,kl_exact", '"TRL 0.11.4, its constants",0.2,0,1.5,0.9,9.0']
    (asset / "frontier" / "trl.csv").write_text("\n".join([*trl, "PPO,0.1,0,9.9,0.9,12.0"]))
    for axis, value in zip(frontier(asset / "frontier").axes, (1.5, 0.9)):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        assert lines["TRL 0.11.4, its constants"] == [[9.0, value]] and len(lines["PPO"]) == 6
        assert axis.get_xlim() == pytest.approx((0, 9.9)) and axis.get_xticks().tolist() == [0, 1, 2, 4, 8]


def texts_of(axis):
    """Return the texts of a drawing that are not empty, with their bounding boxes in pixels."""
    renderer = axis.figure.canvas.get_renderer()
    return [(t.get_text(), t.get_window_extent(renderer)) for t in axis.texts if t.get_text()]


def crossing(a, b):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 0 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0


def inside(a, b):
    return b.x0 <= a.x0 and a.x1 <= b.x1 and b.y0 <= a.y0 and a.y1 <= b.y1


# ---- drawings


def test_without_a_folder_all_figures_are_drawn_1500_pixels_wide_for_white_and_for_dark_pages(asset, capsys):
    assert main([]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert paths == [Path("asset/images") / f"{name}{end}.png" for name, *_ in FIGURES for end in ("", "-dark")]
    sizes = {path.stem: struct.unpack(">II", path.read_bytes()[16:24]) for path in paths}
    assert all(sizes[name] == sizes[f"{name}-dark"] for name, *_ in FIGURES)
    assert 300 < sizes.pop("example_results")[1] < 700
    assert {name: size for name, size in sizes.items() if "-dark" not in name} == {
        "learning_curves": (1500, 606), "all_curves": (1500, 825), "finetune_model": (1500, 540),
        "reward_model": (1500, 540), "ppo": (1500, 705), "frontier": (1500, 690),
    }  # fmt: skip
    for path in paths:
        paper = to_rgba("#0d1117" if "-dark" in path.stem else "#ffffff")
        assert np.allclose(plt.imread(path)[[0, -1]][:, [0, -1]], paper, atol=1e-6), path  # corners, with opacity


def test_a_second_call_changes_no_byte_and_the_files_do_not_name_the_version_of_matplotlib(asset):
    drawn = []
    for _ in range(2):
        assert main([]) == 0
        drawn.append({path.name: path.read_bytes() for path in (asset / "images").iterdir()})
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2 * len(FIGURES)
    assert not any(b"Software" in image or b"atplotlib" in image for image in drawn[0].values())


def contrast(a, b):
    """Return the contrast of two colours by WCAG 2, 1 to 21."""
    light, dark = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def linear(colour):
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("theme", THEMES.values(), ids=["light", "dark"])
@pytest.mark.parametrize("name, draw, source", [(name, draw, source) for name, draw, *source in FIGURES])
def test_every_text_has_11_pixels_in_the_readme_and_the_contrast_of_level_aa(asset, theme, name, draw, source):
    with plt.rc_context(theme):
        figure = draw(*source)
        figure.canvas.draw()
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        boxes = [box for box in figure.axes[0].patches if isinstance(box, FancyBboxPatch)]
        assert len(texts) > 10
        for text in texts:
            assert text.get_size() / 72 * 830 / figure.get_figwidth() >= 11, text
            paper = np.array(to_rgb(plot.PAPER))
            for box in boxes:
                if crossing(text.get_window_extent(), box.get_window_extent()):
                    *colour, alpha = box.get_facecolor()
                    paper = alpha * np.array(colour) + (1 - alpha) * paper
            assert contrast(text.get_color(), paper) >= 4.5, text


@pytest.mark.parametrize("theme", THEMES.values(), ids=["light", "dark"])
def test_colours_have_a_contrast_of_4_5_and_those_of_one_chart_differ_for_colour_blind_readers(theme):
    """Simulation: Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB. Distance: CIE 1976, in L*a*b*."""
    protan = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    deutan = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    tritan = [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]
    to_xyz = [[0.434, 0.376, 0.190], [0.213, 0.715, 0.072], [0.018, 0.109, 0.873]]  # white is 1, 1, 1

    def lab(colour, vision):
        x, y, z = np.cbrt(to_xyz @ np.clip(vision @ linear(colour), 0.001, 1))
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    with plt.rc_context(theme):
        colours = [plot.BLUE, plot.AMBER, plot.PURPLE, plot.GREEN, plot.RED, plot.INK, plot.GREY]
        assert min(contrast(colour, plot.PAPER) for colour in colours) >= 4.5
        for vision in map(np.array, (np.eye(3), protan, deutan, tritan)):
            for a, b in (
                (plot.AMBER, plot.PURPLE),
                (plot.BLUE, plot.INK),
                (plot.BLUE, plot.GREY),
                (plot.GREEN, plot.RED),
            ):
                assert np.linalg.norm(lab(a, vision) - lab(b, vision)) > 15, (a, b, vision)


def test_the_first_figure_of_the_readme_has_two_panels_that_are_readable_on_a_phone(asset):
    ((draw, *source),) = [figure[1:] for figure in FIGURES if figure[0] == "learning_curves"]
    figure = draw(*source)
    assert [axis.get_title(loc="left") for axis in figure.axes] == [PANELS[0][1], PANELS[1][1]]
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert min(text.get_size() / 72 * 350 / figure.get_figwidth() for text in texts) >= 7  # pixels
    figure.canvas.draw()
    for axis in figure.axes:
        assert inside(axis.get_legend().get_window_extent(), axis.bbox)


@pytest.mark.parametrize("name, draw, source", [(name, draw, source) for name, draw, *source in FIGURES[2:6]])
def test_no_text_of_a_drawing_overlaps_another_or_the_edge_of_a_box(asset, name, draw, source):
    figure = draw(*source)
    axis = figure.axes[0]
    texts = texts_of(axis)
    boxes = [patch.get_window_extent() for patch in axis.patches if isinstance(patch, FancyBboxPatch)]
    assert len(boxes) >= 7
    for (text, a), (other, b) in itertools.combinations(texts, 2):
        assert not crossing(a, b), (text, other)
    for text, extent in texts:
        assert inside(extent, figure.bbox), text
        assert all(inside(extent, b) for b in boxes if crossing(extent, b)), text
    if len(figure.axes) > 1:
        beside = figure.axes[1].get_tightbbox()
        assert inside(beside, figure.bbox)
        assert not any(crossing(extent, beside) for extent in boxes + [extent for _, extent in texts])


@pytest.mark.parametrize("name, draw, source", [(name, draw, source) for name, draw, *source in FIGURES[2:5]])
def test_every_arrow_connects_the_edges_of_two_boxes(asset, name, draw, source):
    patches = draw(*source).axes[0].patches
    boxes = [patch.get_bbox() for patch in patches if isinstance(patch, FancyBboxPatch)]
    arrows = [patch._path_original.vertices for patch in patches if isinstance(patch, FancyArrowPatch)]

    def at_edge(x, y):
        def on(b):
            across, up = b.x0 - 1e-9 <= x <= b.x1 + 1e-9, b.y0 - 1e-9 <= y <= b.y1 + 1e-9
            return across and up and min(abs(x - b.x0), abs(x - b.x1), abs(y - b.y0), abs(y - b.y1)) < 1e-9

        return [i for i, b in enumerate(boxes) if on(b)]

    assert len(arrows) >= 6
    for points in arrows:
        (start,), (end,) = at_edge(*points[0]), at_edge(*points[-1])
        assert start != end
        assert all(x == u or y == v for (x, y), (u, v) in itertools.pairwise(points.tolist()))  # horizontal or vertical


# ---- curves


def test_the_curves_are_the_numbers_of_the_log(asset):
    lines = ppo_log()
    axes = curves(asset).axes
    units = [
        "share of positive responses",
        "KL, nats per response",
        "response length, tokens",
        "entropy, nats per token",
    ]
    assert [axis.get_title(loc="left") for axis in axes] == [title for _, title in PANELS] == units
    for axis, (names, _) in zip(axes, PANELS):
        assert [curve.get_xdata().tolist() for curve in axis.lines] == [list(range(6))] * len(names)
        assert [curve.get_ydata().tolist() for curve in axis.lines] == [[x[name] for x in lines] for name in names]
    assert axes[0].get_ylim() == (0, 1)
    assert [text.get_text().split()[2].strip(",") for text in axes[0].get_legend().texts] == ["reward", "judge"]
    assert [text.get_text().split()[0].strip(",") for text in axes[1].get_legend().texts] == ["kl", "kl_exact"]


def test_a_panel_can_be_drawn_alone_with_its_numbers(asset):
    for panel in PANELS:
        (axis,) = curves(asset, [panel], width=5).axes
        assert axis.get_title(loc="left") == panel[1] and axis.get_xlabel() == "rollout"
        assert [curve.get_ydata().tolist() for curve in axis.lines] == [[x[n] for x in ppo_log()] for n in panel[0]]


def test_the_rollouts_of_a_short_run_are_whole_numbers_on_the_axis(asset):
    write_lines(asset / "log.jsonl", ppo_log()[:3])
    for axis in curves(asset).axes:
        assert all(tick == int(tick) for tick in axis.get_xticks())


def test_the_band_is_one_standard_error_of_the_kl_on_either_side(asset):
    (band,) = curves(asset).axes[1].collections
    points = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    for line in ppo_log():
        edges = [y for x, y in points if x == line["step"]]
        assert min(edges) == pytest.approx(line["kl"] - line["kl_stderr"])
        assert max(edges) == pytest.approx(line["kl"] + line["kl_stderr"])


@pytest.mark.parametrize("missing, drawn", [(SHARES, ["score"]), (SHARES[:1], SHARES[1:])], ids=["both", "reward"])
def test_the_score_is_drawn_if_the_log_has_no_share_positive(asset, missing, drawn):
    lines = ppo_log(without=missing)
    write_lines(asset / "log.jsonl", lines)
    axis = curves(asset).axes[0]
    assert [curve.get_ydata().tolist() for curve in axis.lines] == [[line[name] for line in lines] for name in drawn]
    assert axis.get_title(loc="left") == ("score" if "score" in drawn else "share of positive responses")
    assert (axis.get_ylim() == (0, 1)) == ("score" not in drawn)
    assert bool(axis.get_legend()) == ("score" not in drawn)


@pytest.mark.parametrize("config", [None, {}, {"kl_target": 0.0}, {"kl_target": 6.5}], ids=str)
def test_there_is_a_target_line_if_the_run_has_a_kl_target(asset, config):
    if config is not None:
        (asset / "run_config.json").write_text(json.dumps(config))
    targets = [line for line in curves(asset).axes[1].lines if line.get_label() == "target"]
    assert [set(line.get_ydata()) for line in targets] == ([{6.5}] if config and config["kl_target"] else [])


@pytest.mark.parametrize(("task", "word"), COUNTED.items())
def test_the_figures_name_what_the_classifiers_count_in_the_task_of_the_run(asset, task, word):
    (asset / "run_config.json").write_text(json.dumps({"task": task}))
    assert curves(asset).axes[0].get_title(loc="left") == f"share of {word} responses"
    results = json.loads((asset / "results.json").read_text())
    results["config"]["task"] = task
    (asset / "results.json").write_text(json.dumps(results))
    captions = [text.get_text() for text in example_results(asset).axes[0].texts]
    assert sum(caption.endswith(f"the judge's {JUDGED[task]}") for caption in captions) == 1


def test_the_validation_curve_is_over_millions_of_tokens(asset):
    axis = finetune_model(asset / "mini/gpt2").axes[1]
    (curve,) = axis.lines
    assert curve.get_xydata().tolist() == [[0, 3.0], [0.004, 1.5]]
    assert [text.get_text() for text in axis.texts] == ["1.50"]


def test_the_histograms_are_the_counts_of_each_label_with_positive_in_green(asset):
    steps = [patch for patch in reward_model(asset / "mini/reward").axes[1].patches if isinstance(patch, StepPatch)]
    assert [step.get_data().values.tolist() for step in steps] == [[4, 2, 1], [0, 3, 9]]
    assert all(step.get_data().edges.tolist() == [-1.5, -0.5, 0.5, 1.5] for step in steps)
    colours = [step.get_edgecolor() for step in steps]
    assert colours == [to_rgba(colour) for colour in (plot.RED, plot.GREEN)]


# ---- samples


def test_four_samples_are_shown_with_the_probabilities_of_the_judge_in_colour(asset):
    axis = example_results(asset).axes[0]
    shown = [text for text, _ in texts_of(axis)]
    assert {text for text, extent in texts_of(axis) if extent.x0 > 0.6 * axis.bbox.x1} == {
        "after PPO", "that is good", "0.51"
    }  # fmt: skip
    assert shown.count("A film about a dog") == 4 * 2  # as the prompt and as the response before
    assert shown.count("that is good") == shown.count("0.50") == shown.count("0.51") == 4
    before, after = (to_rgba(colour) for colour in (plot.RED, plot.GREEN))
    assert [patch.get_facecolor() for patch in axis.patches] == [before, after] * 4


def test_generated_text_is_never_drawn_as_mathematics(asset):
    write_samples(asset, NASTY, NASTY)
    figure = example_results(asset)
    figure.canvas.draw()
    shown = " ".join(text for text, _ in texts_of(figure.axes[0]))
    assert shown.isprintable()
    letters = [c for c in NASTY if c.isprintable() and c != " "]
    assert "".join(letters * 2) in shown.replace(" ", "")


@pytest.mark.parametrize("text", ["W" * 150, "A GREAT " * 25, "i" * 150, "\u0301" * 20, "word " * 30, ""])
def test_any_text_stays_in_its_column_and_row(asset, text):
    write_samples(asset, text, text)
    figure = example_results(asset)
    texts, tags = texts_of(figure.axes[0]), [patch.get_window_extent() for patch in figure.axes[0].patches]
    assert all(inside(extent, figure.bbox) for _, extent in texts)
    assert all(extent.width < 3.2 * figure.dpi for _, extent in texts[:-1])  # the last one is the caption
    for words, extent in texts:
        assert words[0].isdigit() or not any(crossing(extent, tag) for tag in tags)
    assert not any(crossing(a, b) for (_, a), (_, b) in itertools.combinations(texts, 2) if text.isascii())
    rules = [figure.axes[0].transData.transform((0, line.get_ydata()[0]))[1] for line in figure.axes[0].lines]
    assert not any(extent.y0 < y < extent.y1 for _, extent in texts for y in rules)


def test_a_response_is_broken_at_spaces_and_drawn_completely(asset):
    words = "one film about a dog " * 12
    write_samples(asset, "prompt", words)
    lines = [text for text, _ in texts_of(example_results(asset).axes[0]) if "film" in text or "dog" in text]
    assert " ".join(lines).split() == 4 * words.split() and 32 < max(map(len, lines)) <= 37


# ---- the command


def test_with_a_folder_only_its_learning_curves_are_drawn(asset, tmp_path, capsys):
    write_lines(tmp_path / "run" / "log.jsonl", ppo_log())
    assert main(["run"]) == 0
    assert capsys.readouterr().out.split() == [str(Path("run/learning_curves.png"))]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["learning_curves.png", "log.jsonl"]
    assert not (asset / "images").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_a_missing_file_is_named_in_one_line(asset, capsys, source):
    (asset / source).unlink()
    assert main([]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {Path('asset', source)}: No such file or directory"]


def test_an_incomplete_last_line_of_a_log_is_ignored(asset):
    """As after a crash, or while the run is writing it."""
    with open(asset / "log.jsonl", "a") as file:
        file.write('{"step": 6, "sc')
    assert [len(curve.get_xdata()) for curve in curves(asset).axes[0].lines] == [6, 6]


def test_metrics_that_are_not_finite_are_not_drawn(asset):
    write_lines(asset / "log.jsonl", [*ppo_log(), ppo_log()[0] | {"step": 6, "kl": math.nan, "kl_stderr": math.inf}])
    assert plot.learning_curves(asset).is_file()


@pytest.mark.parametrize(
    "name, text",
    [
        ("log.jsonl", '{"step": 0, "kl"\n{}\n'),
        ("log.jsonl", '{"step": 0, "kl": "x"}\n'),
        ("run_config.json", "[]"),
    ],
)
def test_a_damaged_file_of_a_run_is_refused_in_one_line(asset, capsys, name, text):
    (asset / name).write_text(text)
    assert main(["asset"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: asset/{name} is damaged, or of another version")
    assert not (asset / "learning_curves.png").exists()


@pytest.mark.parametrize(
    "arguments, word", [(["nowhere"], "nowhere"), (["a", "b"], "usage"), (["asset/log.jsonl"], "log")]
)
def test_bad_usage_is_reported_in_one_line_with_status_2(asset, capsys, arguments, word):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert word in line


def test_redrawing_needs_no_torch():
    code = "import sys, analysis.plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
