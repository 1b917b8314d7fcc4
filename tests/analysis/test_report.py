"""The page of a run: true to the files it is made from, safe for any text in them, quick, and readable everywhere.

What only a browser can tell is asked of a headless Chromium; without one these tests are skipped.
"""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT

import evaluate
from analysis.report import BOTTOM, HEIGHT, LEFT, MEASURES, SIDES, TOP, WIDTH, charts, main, scale, table, write

HOSTILE = ["<script>window.hacked = 1</script>", "</script><script>window.hacked = 2</script>"]
HOSTILE += [
    "<img src=x onerror=window.hacked=1>",
    "<!--<script>",
    "{{ 7 * 7 }}",
    "\u202e\u2028&amp;",
    "'\"><b>",
    "W" * 200,
]
OPENS = 1.0  # seconds that the list of 200 samples may take, from the start of the script to its first paint
WORDS = " the a film movie great good bad dull story acting is was it and of I n't , . ! wonderful terrible ending\n"
WORDS = [" " + word for word in WORDS.split()] + ["é", "", "\n"]


def make_answer(rng, lift):
    """One side of a sample as evaluate.py writes it, of 20 to 40 tokens; lift: the mean KL of a token, nats."""
    n = int(rng.integers(20, 41))
    kl = rng.normal(lift, 0.5, n) * (rng.random(n) < 0.5)
    numbers = {"kl": kl, "ratio": np.exp(kl), "value": rng.normal(0.5, 0.4, n), "advantage": rng.normal(0, 0.3, n)}
    tokens = [WORDS[i] for i in rng.integers(0, len(WORDS), n - 1)] + ["<|endoftext|>"]
    return {"tokens": tokens} | {name: x.round(4).tolist() for name, x in numbers.items()} | {
        "score": round(rng.normal(4 * lift, 0.5), 4), "judge": round(rng.random(), 4)
    }  # fmt: skip


def make_viewer(samples=200):
    rng = np.random.default_rng(0)
    sides = [{"before": make_answer(rng, -0.1), "after": make_answer(rng, 0.2)} for _ in range(samples)]
    return {"kl_coef": 0.08, "samples": [{"prompt": f"Prompt number {i}"} | pair for i, pair in enumerate(sides)]}


def make_training(prompts=("The film", "This was a"), steps=(0, 10, 20, 30, 39)):
    """samples.jsonl as ppo.py writes it: a response to each prompt at some steps, scores that rise."""
    rng, lines = np.random.default_rng(1), []
    for step in steps:
        words = ["".join(WORDS[i] for i in rng.integers(0, len(WORDS), 30)) for _ in prompts]
        samples = [
            {"prompt": p, "response": w, "score": step / 20 + i - 0.5} for i, (p, w) in enumerate(zip(prompts, words))
        ]
        lines.append({"step": step, "samples": samples})
    return lines


def make_run(folder, viewer=None, results=None, lines=None, training=None):
    """A folder as evaluate.py leaves it: the committed results and log, and a viewer of a few samples.

    training: the lines of samples.jsonl, if there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asset = ROOT / "asset"
    (folder / "results.json").write_text(json.dumps(results or json.loads((asset / "results.json").read_text())))
    log = "".join(json.dumps(line) + "\n" for line in lines) if lines else (asset / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(log)
    (folder / "viewer.json").write_text(json.dumps(viewer or make_viewer(5)))
    if training is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in training))
    return folder


def hostile_run(folder):
    """A run whose every text is markup: prompts, tokens, names and settings in results.json."""
    viewer, results = make_viewer(len(HOSTILE)), json.loads((ROOT / "asset" / "results.json").read_text())
    for sample, text in zip(viewer["samples"], HOSTILE):
        sample["prompt"] = sample["before"]["tokens"][0] = sample["after"]["tokens"][1] = text
    for text in HOSTILE:
        results["before"][text] = results["after"][text] = results["difference"][text] = {"value": 1.0}
    results["config"] = {text: text for text in HOSTILE}
    training = [{"step": 0, "samples": [{"prompt": text, "response": text, "score": 1.0} for text in HOSTILE]}]
    return make_run(folder, viewer, results, training=training)


class Reader(HTMLParser):
    """Every tag of a page with its attributes, and the text outside and inside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], {"": ""}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        where = self.tags[-1][1].get("id", self.cdata_elem) if self.cdata_elem else ""
        self.texts[where] = self.texts.get(where, "") + data


# ---- the page as text


def test_every_text_of_a_run_stays_text(tmp_path):
    page = Reader(write(hostile_run(tmp_path)).read_text())
    assert not {tag for tag, _ in page.tags} & {"img", "b", "iframe", "link", "base"}
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "data"}, {}
    ]  # fmt: skip
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    # a setting, its value, a row of the table, a prompt and a response during training
    assert all(page.texts[""].count(text) == 5 for text in HOSTILE)
    samples = json.loads(page.texts["data"])["samples"]
    assert [sample["prompt"] for sample in samples] == HOSTILE
    assert [sample["after"]["tokens"][1] for sample in samples] == HOSTILE


def test_half_a_letter_in_a_text_does_not_stop_the_page(tmp_path):
    viewer = make_viewer(1)
    viewer["samples"][0]["prompt"] = "\ud800"
    page = write(make_run(tmp_path, viewer, {"before": {"\ud800": {"value": 1}}, "after": {"\ud800": {"value": 1}}}))
    assert json.loads(Reader(page.read_text()).texts["data"])["samples"][0]["prompt"] == "\ud800"


def test_the_page_points_nowhere_and_lets_in_its_own_script_and_style_alone(tmp_path):
    text = write(make_run(tmp_path)).read_text()
    assert "://" not in text
    page = Reader(text)
    assert [value for _, tag in page.tags for name, value in tag.items() if name in ("src", "href")] == ["#viewer"]
    (policy,) = [tag["content"] for _, tag in page.tags if tag.get("http-equiv") == "Content-Security-Policy"]
    allowed = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    hashes = {
        tag: base64.b64encode(hashlib.sha256(page.texts[tag].encode()).digest()).decode() for tag in ("script", "style")
    }
    assert allowed.pop("script-src") == f"'sha256-{hashes['script']}'"
    assert allowed.pop("style-src") == f"'sha256-{hashes['style']}'"
    assert allowed == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"}


def test_the_page_has_every_sample_with_its_numbers(tmp_path):
    viewer = make_viewer(5)
    data = json.loads(Reader(write(make_run(tmp_path, viewer)).read_text()).texts["data"])
    for shown, sample in zip(data["samples"], viewer["samples"], strict=True):
        assert shown["prompt"] == sample["prompt"]
        for side in SIDES:
            assert shown[side].keys() == {"tokens", "score", "judge", *MEASURES}
            assert shown[side]["tokens"] == sample[side]["tokens"]
            for name in ("score", "judge", *MEASURES):
                assert shown[side][name] == pytest.approx(sample[side][name], abs=1e-9)


def without_values(viewer):
    """viewer.json of a policy trained by RLOO or GRPO."""
    del viewer["kl_coef"]
    for sample in viewer["samples"]:
        for side in SIDES:
            del sample[side]["value"], sample[side]["advantage"]
    return viewer


def test_a_policy_trained_without_a_value_head_has_no_column_for_value_or_advantage(tmp_path):
    page = Reader(write(make_run(tmp_path, without_values(make_viewer(5)))).read_text())
    radios = [tag["value"] for name, tag in page.tags if name == "input" and tag["type"] == "radio"]
    data = json.loads(page.texts["data"])
    assert radios == list(data["scales"]) == ["kl", "ratio"]
    assert "advantage" not in page.texts[""] and "value head" not in page.texts[""]
    assert {*data["samples"][0]["after"]} == {"tokens", "score", "judge", "kl", "ratio"}


def test_a_viewer_without_samples_has_a_page(tmp_path):
    page = Reader(write(make_run(tmp_path, {"samples": []})).read_text())
    assert list(json.loads(page.texts["data"])["scales"]) == ["kl", "ratio"]


# ---- the table


def test_the_table_has_the_numbers_of_the_evaluation_and_the_paired_differences():
    results = json.loads((ROOT / "asset" / "results.json").read_text())
    markdown = [line.strip("| ").split(" | ") for line in evaluate.table_text(results).splitlines()[2:]]
    rows = table(results)
    assert [[caption, *(" ".join(cell).strip().lstrip("+") for cell in cells)] for caption, cells in rows] == [
        [text.strip() for text in line] for line in markdown
    ]
    differences = {caption: cells[2] for caption, cells in rows}
    score = results["difference"]["score"]
    assert differences["score"] == (f"+{score['value']:.2f}", f"[{score['low']:.2f}, {score['high']:.2f}]")
    assert any(value.startswith("-") for value, _ in differences.values())


def test_a_name_that_is_new_is_shown_as_it_is_and_one_that_is_missing_is_no_row():
    side = {"novelty": {"value": 2.0, "low": 1.0, "high": 3.0}, "score": {"value": 1.0}}
    assert table({"before": side, "after": side}) == [
        ("score", [("1.00", "")] * 2 + [("–", "")]),
        ("novelty", [("2.00", "[1.00, 3.00]")] * 2 + [("–", "")]),
    ]


# ---- the curves


def points(text):
    return [tuple(map(float, point.split(","))) for point in text.split()]


def log_line(step, **changes):
    names = ("kl", "kl_stderr", "kl_exact", "response_length", "entropy", "positive_by_reward", "positive_by_judge")
    return {"step": step, "score": 1.0} | dict.fromkeys(names, 0.5) | changes


def test_a_curve_goes_through_the_numbers_of_the_log():
    lines = [log_line(0, positive_by_reward=0.0), log_line(5), log_line(10, positive_by_reward=1.0)]
    share, kl, length, entropy = charts(lines, target=0)
    (name, drawn), (judge, level) = share["curves"]
    assert (name, judge) == ("positive_by_reward", "positive_by_judge")
    bottom, right = HEIGHT - BOTTOM, WIDTH - 10
    assert points(drawn) == [(LEFT, bottom), ((LEFT + right) / 2, (bottom + TOP) / 2), (right, TOP)]
    assert {y for _, y in points(level)} == {(bottom + TOP) / 2}
    assert [text for _, text in share["y_ticks"]] == ["0", "0.25", "0.5", "0.75", "1"]
    assert [[name for name, _ in chart["curves"]] for chart in (kl, length, entropy)] == [
        ["kl", "kl_exact"], ["response_length"], ["entropy"]
    ]  # fmt: skip
    assert [len(chart["legend"]) for chart in (share, kl, length, entropy)] == [2, 2, 0, 0]


def test_the_band_is_one_standard_error_to_either_side_and_the_target_a_line():
    (_, kl, *_) = charts([log_line(step, kl=2.0, kl_stderr=0.5, kl_exact=0.0) for step in range(3)], target=4.0)
    heights = {text: y for y, text in kl["y_ticks"]}
    low, high = ((heights["2"] * 3 + heights[text]) / 4 for text in ("0", "4"))
    assert [y for _, y in points(kl["band"])] == pytest.approx([low] * 3 + [high] * 3, abs=0.06)
    assert kl["target"] == heights["4"]
    assert kl["legend"][-1] == ("target", "target")


def test_a_skipped_rollout_leaves_no_mark_and_a_log_without_shares_has_the_score():
    lines = [log_line(0), log_line(1, kl=float("nan"), kl_stderr=float("inf")), log_line(2)]
    lines = [{name: x for name, x in line.items() if not name.startswith("positive")} for line in lines]
    score, kl, *_ = charts(lines, target=0)
    assert score["label"] == "score"
    assert len(points(kl["curves"][0][1])) == 2
    assert "nan" not in repr((score, kl))
    assert "inf" not in repr((score, kl))


def test_a_policy_without_a_log_has_a_page_without_curves(tmp_path):
    (make_run(tmp_path) / "log.jsonl").unlink()
    text = write(tmp_path).read_text()
    assert "no log.jsonl" in text
    assert "polyline" not in text.partition("<body>")[2]


# ---- the samples during training


def shown_in_training(page):
    """[(prompt, [(step, score, response)])] of a page's section."""
    found = []
    for prompt, rows in re.findall(
        r'<details class="training" open>\n<summary>(.*?) …</summary>(.*?)</details>', page, re.S
    ):
        row = r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td class="text">(.*?)</td></tr>'
        found.append(
            (html.unescape(prompt), [tuple(map(html.unescape, cells)) for cells in re.findall(row, rows, re.S)])
        )
    return found


def test_the_page_shows_the_responses_to_each_prompt_by_step_with_their_scores(tmp_path):
    training = make_training(["The film", "<b>"])
    page = write(make_run(tmp_path, training=training)).read_text()
    expected = [
        (
            prompt,
            [
                (str(line["step"]), f"{line['samples'][i]['score']:.2f}", line["samples"][i]["response"])
                for line in training
            ],
        )
        for i, prompt in enumerate(["The film", "<b>"])
    ]
    assert shown_in_training(page) == expected
    assert page.index("<h2>Learning curves") < page.index("<h2>Samples during training") < page.index('<h2 id="viewer"')


def test_the_steps_are_in_order_and_one_that_was_done_again_is_there_once(tmp_path):
    """A run that goes on from a checkpoint repeats the steps after it."""
    lines = [
        {"step": s, "samples": [{"prompt": "A", "response": r, "score": -0.001}]}
        for s, r in ((9, "x"), (0, "y"), (9, "z"))
    ]
    page = write(make_run(tmp_path, training=lines)).read_text()
    assert shown_in_training(page) == [("A", [("0", "0.00", "y"), ("9", "0.00", "z")])]


@pytest.mark.parametrize("training", [None, []])
def test_a_run_without_samples_has_no_such_section(tmp_path, training):
    assert "Samples during training" not in write(make_run(tmp_path, training=training)).read_text()


@pytest.mark.parametrize("name", ["log.jsonl", "samples.jsonl"])
@pytest.mark.parametrize(
    "rest", ['{"step": 40, "sam', '{"step": 40, "samples": [{"prompt": "\u00e9'[:-1] + "\u00c3", "{"]
)
def test_a_half_written_last_line_is_ignored(tmp_path, name, rest):
    """What a crash leaves, or a run that is writing at this moment."""
    before = write(make_run(tmp_path, training=make_training())).read_text()
    with open(tmp_path / name, "ab") as file:
        file.write(rest.encode("latin-1"))
    assert write(tmp_path).read_text() == before


# ---- the colours


def test_the_colours_are_even_around_the_centre_and_a_few_outliers_do_not_wash_them_out():
    assert scale([-1.0] * 99 + [50.0], 0) == [-1.0, 0, 1.0]
    assert scale([0.5, 1.5] * 50, 1) == [0.5, 1, 1.5]
    assert scale([1.0, 9.0], 1) == [0, 1, 2]  # no ratio is below 0
    assert scale([0.0] * 9, 0) == scale([], 0) == [-1, 0, 1]


# ---- the command


def test_a_folder_gets_its_page_and_the_path_is_printed(tmp_path, capsys):
    make_run(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "report.html")]


def changed(change):
    viewer = make_viewer(2)
    change(viewer, viewer["samples"][1]["after"])
    return json.dumps(viewer)


DAMAGED = [
    ("results.json", None),
    ("results.json", "{"),
    ("results.json", "[]"),
    ("results.json", '{"before": {"kl": {"value": 1}}}'),
    ("results.json", '{"before": {"kl": {"value": "x"}}, "after": {"kl": {"value": 1}}}'),
    ("viewer.json", None),
    ("viewer.json", "[]"),
    ("viewer.json", changed(lambda viewer, _: viewer.pop("kl_coef"))),
    ("viewer.json", changed(lambda viewer, _: viewer["samples"][0].pop("before"))),
    ("viewer.json", changed(lambda _, answer: answer.pop("kl"))),
    ("viewer.json", changed(lambda _, answer: answer.pop("advantage"))),
    ("viewer.json", changed(lambda viewer, _: viewer["samples"][0].update(prompt=3))),
    ("viewer.json", changed(lambda _, answer: answer["kl"].pop())),
    ("viewer.json", changed(lambda _, answer: answer["value"].__setitem__(0, float("nan")))),
    ("viewer.json", changed(lambda _, answer: answer.update(ratio=["1"] * len(answer["tokens"])))),
    ("viewer.json", changed(lambda _, answer: answer.update(tokens=list(range(len(answer["tokens"])))))),
    ("log.jsonl", '{"step": 0, "kl"\n'),
    ("log.jsonl", '{"step": 0, "kl"\n{}\n'),
    ("log.jsonl", '{"step": 0, "kl": "x"}'),
    ("run_config.json", "[]"),
    ("samples.jsonl", "{\n"),
    ("samples.jsonl", "[]\n"),
    ("samples.jsonl", '{"step": 0}\n'),
    ("samples.jsonl", '{"step": "0", "samples": []}\n'),
    ("samples.jsonl", '{"step": 0, "samples": [{"prompt": 3, "response": "", "score": 1}]}\n'),
    ("samples.jsonl", '{"step": 0, "samples": [{"prompt": "", "response": null, "score": 1}]}\n'),
    ("samples.jsonl", '{"step": 0, "samples": [{"prompt": "", "response": "", "score": "1"}]}\n'),
    ("samples.jsonl", '{"step": 0, "samples": [{"prompt": "", "response": "", "score": NaN}]}\n'),
]


@pytest.mark.parametrize("name, text", DAMAGED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(DAMAGED)])
def test_a_missing_or_damaged_file_is_one_line_that_names_it_and_the_old_page_stays(tmp_path, capsys, name, text):
    make_run(tmp_path)
    (tmp_path / "report.html").write_text("the old page")
    (tmp_path / name).unlink(missing_ok=True)
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / name}")
    assert "python evaluate.py" in line or "damaged" in line
    assert (tmp_path / "report.html").read_text() == "the old page"


@pytest.mark.parametrize("arguments", [[], ["a", "b"]], ids=len)
def test_bad_usage_is_one_line_and_status_2(capsys, arguments):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: usage: python report.py FOLDER")


def test_a_page_needs_no_torch():
    code = "import sys, report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- the page in a browser


@pytest.fixture(scope="module")
def driver():
    """A headless Chromium that keeps a record of its console and of what it asks the network for."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("no browser: the packages chromium and chromium-driver of Debian have one")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{name: (path of a page, the viewer.json that it was made from)}."""
    folder, viewer, few = tmp_path_factory.mktemp("runs"), make_viewer(200), make_viewer(20)
    viewer["samples"][3]["after"]["tokens"][:2] = [" Zeb", "ra"]
    rloo = without_values(make_viewer(3))
    hostile = hostile_run(folder / "hostile")
    return {
        "run": (write(make_run(folder / "run", viewer, training=make_training())), viewer),
        "few": (write(make_run(folder / "few", few, training=make_training())), few),
        "rloo": (write(make_run(folder / "rloo", rloo)), rloo),
        "hostile": (write(hostile), json.loads((hostile / "viewer.json").read_text())),
    }


@pytest.fixture
def browser(driver, pages):
    """open(name, width, scheme) shows a page; in the end none may have left an error or asked for another file."""
    from selenium.webdriver.support.wait import WebDriverWait

    opened = []

    def show(name="run", width=1200, scheme="light"):
        path, viewer = pages[name]
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        driver.get(path.as_uri())
        WebDriverWait(driver, 60).until(lambda _: driver.execute_script(PAINTED))
        opened.append(path.as_uri())
        return driver, viewer["samples"]

    yield show
    assert [line["message"] for line in driver.get_log("browser")] == []
    events = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked == opened


PAINTED = "return performance.getEntriesByName('list painted')[0]?.duration"
PROMPTS = "return [...document.querySelectorAll('#list h3')].map((h3) => parseInt(h3.textContent) - 1)"
CHOOSE = """
const [id, value] = arguments;
document.getElementById(id).value = value;
document.getElementById(id).dispatchEvent(new Event("input"));
"""
RIGHTMOST = """
const right = (token) => token.getBoundingClientRect().right;
[...document.querySelectorAll(".token")].reduce((a, b) => (right(b) > right(a) ? b : a)).focus();
"""
TOKENS = """
return [...document.querySelectorAll(".token")].map((span) => ({
  number: span.dataset.number, below: span.classList.contains("below"), ink: getComputedStyle(span).color,
  paper: getComputedStyle(span).backgroundColor, share: Number(getComputedStyle(span).getPropertyValue("--share")),
}));
"""


def test_markup_in_a_run_is_shown_and_not_run(browser):
    page, _ = browser("hostile")
    assert page.execute_script("return window.hacked") is None
    shown = page.execute_script("return document.body.innerText")
    responses = page.execute_script("return [...document.querySelectorAll('.response')].map((p) => p.textContent)")
    headings = page.execute_script("return [...document.querySelectorAll('h3')].map((h3) => h3.textContent)")
    for i, text in enumerate(HOSTILE):
        assert text.replace("\u2028", "") in shown.replace("\u2028", "")
        assert text in responses[2 * i]
        assert text in responses[2 * i + 1]
        assert headings[i] == f"{i + 1}. {text} …"


def test_the_samples_of_a_prompt_fold_by_the_keyboard(browser):
    from selenium.webdriver import ActionChains, Keys

    page, _ = browser("few")
    row = page.find_element("css selector", ".training .text")
    assert row.is_displayed()
    for displayed in (False, True):
        page.execute_script("document.querySelector('.training summary').focus()")
        ActionChains(page).send_keys(Keys.ENTER).perform()
        assert row.is_displayed() == displayed


def test_200_samples_open_within_a_second(browser):
    """The best of three, since other programs may run beside the test: one look under a second is proof enough."""
    assert min(browser()[0].execute_script(PAINTED) for _ in range(3)) < 1000 * OPENS


def test_the_switch_changes_the_colours_and_the_numbers(browser):
    page, samples = browser("few")
    papers = []
    for name, (_, centre) in MEASURES.items():
        page.execute_script(f"document.querySelector('[value={name}]').click()")
        numbers = [x for sample in samples for side in SIDES for x in sample[side][name]]
        low, _, high = scale(numbers, centre)
        tokens = page.execute_script(TOKENS)
        assert [float(token["number"]) for token in tokens] == pytest.approx(numbers, abs=0.0051)
        assert [token["below"] for token in tokens] == [x < centre for x in numbers]
        shares = [min(1, abs(x - centre) / (high - centre)) for x in numbers]
        assert [token["share"] for token in tokens] == pytest.approx(shares, abs=0.0251)  # 20 steps a side
        ends = page.execute_script("return ['low', 'high'].map((id) => document.getElementById(id).textContent)")
        assert ends == [f"{low:.2f} or less", f"{high:.2f} or more"]
        papers.append([token["paper"] for token in tokens])
        strong = {paper for paper, share in zip(papers[-1], shares) if share == 1}
        assert len(strong) == 1 + any(token["below"] for token in tokens if token["share"] == 1)
    assert all(papers[i] != papers[j] for i in range(4) for j in range(i))


def test_without_values_the_page_colours_by_kl_and_ratio(browser):
    page, samples = browser("rloo")
    for name in ("ratio", "kl"):
        page.execute_script(f"document.querySelector('[value={name}]').click()")
        numbers = [x for sample in samples for side in SIDES for x in sample[side][name]]
        assert [float(token["number"]) for token in page.execute_script(TOKENS)] == pytest.approx(numbers, abs=0.0051)
    page.execute_script("document.querySelector('.after .token').focus()")
    tip = page.find_element("id", "tip").text.splitlines()
    assert [line.split()[0] for line in tip[1:]] == ["KL,", "ratio"]


def test_the_samples_are_sorted_by_what_was_chosen_in_both_directions(browser):
    page, samples = browser()
    score = {side: np.array([sample[side]["score"] for sample in samples]) for side in SIDES}
    kl = {side: np.array([sum(sample[side]["kl"]) for sample in samples]) for side in SIDES}
    for key, values in {
        "score": score["after"],
        "score_change": score["after"] - score["before"],
        "kl": kl["after"],
        "kl_change": kl["after"] - kl["before"],
        "order": np.arange(200),
    }.items():
        for direction in (1, -1):
            page.execute_script(CHOOSE, "key", key)
            page.execute_script(CHOOSE, "direction", str(direction))
            order = page.execute_script(PROMPTS)
            assert sorted(order) == list(range(200))
            assert (np.diff(direction * values[order]) > -1e-9).all(), key


def test_the_search_finds_texts_in_prompts_and_over_the_tokens_of_responses(browser):
    page, _ = browser()
    for words, found in (("NUMBER 7", [7, *range(70, 80)]), ("zebra", [3]), ("nothing", []), ("", list(range(200)))):
        page.execute_script(CHOOSE, "search", words)
        assert page.execute_script(PROMPTS) == found
        assert page.find_element("id", "count").text == f"{len(found)} of 200 samples"


def test_the_numbers_of_a_token_appear_under_the_mouse_the_focus_and_a_finger(browser):
    from selenium.webdriver import ActionChains, Keys

    page, samples = browser()
    tip, tokens = page.find_element("id", "tip"), page.find_elements("css selector", ".after .token")[:3]
    told = [
        [json.dumps(answer["tokens"][i], ensure_ascii=False) + f", token {i + 1} of {len(answer['tokens'])}"]
        + [f"{text} {answer[name][i]:.3f}" for name, (text, _) in MEASURES.items()]
        for answer in [samples[0]["after"]]
        for i in range(3)
    ]
    assert not tip.is_displayed()
    ActionChains(page).move_to_element(tokens[0]).perform()
    assert tip.text.splitlines() == told[0]
    ActionChains(page).move_to_element(page.find_element("tag name", "h2")).perform()
    assert not tip.is_displayed()
    page.execute_script("arguments[0].focus()", tokens[0])
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    assert tip.text.splitlines() == told[1]
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not tip.is_displayed()
    place = page.execute_script("const box = arguments[0].getBoundingClientRect(); return [box.x, box.y]", tokens[2])
    page.execute_cdp_cmd("Input.synthesizeTapGesture", {"x": place[0] + 3, "y": place[1] + 3})
    assert tip.text.splitlines() == told[2]


@pytest.mark.parametrize("name", ["run", "hostile"])
def test_a_phone_has_no_sideways_scroll_and_one_response_below_the_other(browser, name):
    page, _ = browser(name, width=390)
    page.execute_script("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    page.execute_script("document.getElementById('numbers').click()")
    page.execute_script(RIGHTMOST)
    assert page.find_element("id", "tip").is_displayed()
    assert page.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    boxes = "return [...document.querySelectorAll('article, .training')]"
    assert page.execute_script(f"{boxes}.filter((box) => box.scrollWidth > box.clientWidth).length") == 0
    boxes = "return ['before', 'after'].map((side) => document.querySelector(`.${side}`).getBoundingClientRect().y)"
    before, after = page.execute_script(boxes)
    assert before < after


def rgb(text):
    """A computed colour as four numbers between 0 and 1."""
    numbers = [float(x) for x in re.findall(r"[\d.]+(?:e-?\d+)?", text.removeprefix("color(srgb"))]
    colour = np.array(numbers[:3]) / (1 if text.startswith("color(") else 255)
    return np.append(colour, numbers[3] if len(numbers) > 3 else 1)


def contrast(ink, paper, page):
    """Contrast of two colours by WCAG 2, 1 to 21, where paper lies half transparent on the page."""
    ink, paper, page = rgb(ink), rgb(paper), rgb(page)
    paper = paper[:3] * paper[3] + page[:3] * (1 - paper[3])
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in (ink[:3], paper)]
    light, dark = sorted((float(c @ [0.2126, 0.7152, 0.0722]) for c in linear), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_text_has_the_contrast_of_aa_in_a_light_and_in_a_dark_scheme(browser):
    papers = []
    for scheme in ("light", "dark"):
        page, _ = browser("few", scheme=scheme)
        papers.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
        pairs = {(token["ink"], token["paper"]) for token in page.execute_script(TOKENS)}
        assert len(pairs) == 41  # 20 steps a side, and none
        texts = "p, td, td span, th, summary, figcaption, h3, label"
        quiet = f"return [...document.querySelectorAll('{texts}')].map((element) => "
        pairs |= {(ink, "rgba(0, 0, 0, 0)") for ink in page.execute_script(quiet + "getComputedStyle(element).color)")}
        assert min(contrast(*pair, papers[-1]) for pair in pairs) >= 4.5
    assert (
        contrast("rgb(255, 255, 255)", papers[1], papers[1]) > 15 > 2 > contrast("rgb(255, 255, 255)", *papers[:1] * 2)
    )
