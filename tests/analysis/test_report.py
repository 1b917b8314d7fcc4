"""The page of a run: it shows the files of the run, is safe for any text in them, fast and accessible.

Tests in a browser use a headless Chromium, and are skipped without one.
"""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT
from matplotlib.colors import to_rgba

from analysis.plot import PANELS
from analysis.report import MEASURES, SIDES, main, scale, write
from analysis.tables import results_rows

HOSTILE = ["<script>window.hacked = 1</script>", "</script><script>window.hacked = 2</script>"]
HOSTILE += [
    "<img src=x onerror=window.hacked=1>",
    "<!--<script>",
    "{{ 7 * 7 }}",
    "\u202e\u2028&amp;",
    "'\"><b>",
    "W" * 200,
]
MAX_SECONDS = 1.0  # from the start of the script to the first paint of 200 samples
WORDS = " the a film movie great good bad dull story acting is was it and of I n't , . ! wonderful terrible ending\n"
WORDS = [" " + word for word in WORDS.split()] + ["é", "", "\n"]


def make_response(rng, lift):
    """A response in viewer.json, of 20 to 40 tokens; lift: the mean KL of a token, nats."""
    n = int(rng.integers(20, 41))
    kl = rng.normal(lift, 0.5, n) * (rng.random(n) < 0.5)
    numbers = {"kl": kl, "ratio": np.exp(kl), "value": rng.normal(0.5, 0.4, n), "advantage": rng.normal(0, 0.3, n)}
    tokens = [WORDS[i] for i in rng.integers(0, len(WORDS), n - 1)] + ["<|endoftext|>"]
    return {"tokens": tokens} | {name: x.round(4).tolist() for name, x in numbers.items()} | {
        "score": round(rng.normal(4 * lift, 0.5), 4), "judge": round(rng.random(), 4)
    }  # fmt: skip


def make_viewer(samples=200):
    rng = np.random.default_rng(0)
    sides = [{"before": make_response(rng, -0.1), "after": make_response(rng, 0.2)} for _ in range(samples)]
    return {"kl_coef": 0.08, "samples": [{"prompt": f"Prompt number {i}"} | pair for i, pair in enumerate(sides)]}


def make_training(prompts=("The film", "This was a"), steps=(0, 10, 20, 30, 39)):
    """The lines of samples.jsonl: a response to each prompt at some steps, with increasing scores."""
    rng, lines = np.random.default_rng(1), []
    for step in steps:
        words = ["".join(WORDS[i] for i in rng.integers(0, len(WORDS), 30)) for _ in prompts]
        samples = [
            {"prompt": p, "response": w, "score": step / 20 + i - 0.5} for i, (p, w) in enumerate(zip(prompts, words))
        ]
        lines.append({"step": step, "samples": samples})
    return lines


def make_run(folder, viewer=None, results=None, training=None):
    """Write the files of a run into a folder: the committed results, and a viewer.json with a few samples.

    training: the lines of samples.jsonl, None without such a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    committed = (ROOT / "asset" / "results.json").read_text()
    (folder / "results.json").write_text(json.dumps(results) if results else committed)
    (folder / "viewer.json").write_text(json.dumps(viewer or make_viewer(5)))
    if training is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in training))
    return folder


def hostile_run(folder):
    """Write a run in which every text is markup: prompts, tokens, names and settings in results.json."""
    viewer, results = make_viewer(len(HOSTILE)), json.loads((ROOT / "asset" / "results.json").read_text())
    for sample, text in zip(viewer["samples"], HOSTILE):
        sample["prompt"] = sample["before"]["tokens"][0] = sample["after"]["tokens"][1] = text
    for text in HOSTILE:
        results["before"][text] = results["after"][text] = results["difference"][text] = {"value": 1.0}
    results["config"] = {text: text for text in HOSTILE}
    training = [{"step": 0, "samples": [{"prompt": text, "response": text, "score": 1.0} for text in HOSTILE]}]
    return make_run(folder, viewer, results, training=training)


class Reader(HTMLParser):
    """The tags of a page with their attributes, and the text outside and inside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], {"": ""}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        element = self.tags[-1][1].get("id", self.cdata_elem) if self.cdata_elem else ""
        self.texts[element] = self.texts.get(element, "") + data


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


def test_a_lone_surrogate_in_a_text_is_no_error(tmp_path):
    viewer = make_viewer(1)
    viewer["samples"][0]["prompt"] = "\ud800"
    page = write(make_run(tmp_path, viewer, {"before": {"\ud800": {"value": 1}}, "after": {"\ud800": {"value": 1}}}))
    assert json.loads(Reader(page.read_text()).texts["data"])["samples"][0]["prompt"] == "\ud800"


def test_the_page_needs_no_network_and_may_not_use_it(tmp_path):
    text = write(make_run(tmp_path)).read_text()
    assert "://" not in text
    page = Reader(text)
    assert [value for _, tag in page.tags for name, value in tag.items() if name in ("src", "href")] == ["#viewer"]
    (policy,) = [tag["content"] for _, tag in page.tags if tag.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    inline = dict.fromkeys(("script-src", "style-src"), "'unsafe-inline'")
    assert rules == {"default-src": "'none'", "img-src": "data:"} | inline


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


def test_a_policy_trained_without_a_value_head_has_no_value_or_advantage(tmp_path):
    page = Reader(write(make_run(tmp_path, without_values(make_viewer(5)))).read_text())
    radios = [tag["value"] for name, tag in page.tags if name == "input" and tag["type"] == "radio"]
    data = json.loads(page.texts["data"])
    assert radios == list(data["scales"]) == ["kl", "ratio"]
    assert "advantage" not in page.texts[""] and "value head" not in page.texts[""]
    assert {*data["samples"][0]["after"]} == {"tokens", "score", "judge", "kl", "ratio"}


def test_a_viewer_without_samples_has_a_page(tmp_path):
    page = Reader(write(make_run(tmp_path, {"samples": []})).read_text())
    assert list(json.loads(page.texts["data"])["scales"]) == ["kl", "ratio"]


# ---- results and learning curves


def test_the_page_has_the_table_of_the_results(tmp_path):
    page = write(make_run(tmp_path)).read_text()
    results = json.loads((ROOT / "asset" / "results.json").read_text())
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page)
    shown = [[caption, *re.findall(r"<td>(\S+) <span>(.*?)</span></td>", cells)] for caption, cells in rows]
    assert [[caption, *map(" ".join, cells)] for caption, *cells in shown] == results_rows(results)[1:]


def test_the_page_embeds_the_learning_curves_of_the_log_for_light_and_dark_mode(tmp_path):
    assert "Learning curves" not in write(make_run(tmp_path)).read_text()
    shutil.copy(ROOT / "asset" / "log.jsonl", tmp_path)
    tags = Reader(write(tmp_path).read_text()).tags
    images = [tag for name, tag in tags if name == "img"]
    assert [image["alt"] for image in images] == [f"{title}, over the rollouts" for _, title in PANELS]
    dark = [tag["srcset"] for name, tag in tags if name == "source" if tag["media"] == "(prefers-color-scheme: dark)"]
    for urls, paper in (([image["src"] for image in images], "#ffffff"), (dark, "#0d1117")):
        assert len(set(urls)) == len(PANELS)
        for url in urls:
            picture = plt.imread(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
            assert picture.shape[1] == 1000 and np.allclose(picture[0, 0], to_rgba(paper), atol=1e-6)


def test_a_setting_without_a_value_is_not_shown(tmp_path):
    results = json.loads((ROOT / "asset" / "results.json").read_text())
    results["config"] = {"second_lm": "", "seed": 0}
    page = write(make_run(tmp_path, results=results)).read_text()
    assert "second_lm" not in page and "; seed 0</p>" in page


# ---- the samples during training


def shown_in_training(page):
    """Return the samples during training on a page as [(prompt, [(step, score, response)])]."""
    prompts = []
    for prompt, rows in re.findall(
        r'<details class="training" open>\n<summary>(.*?) …</summary>(.*?)</details>', page, re.S
    ):
        row = r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td class="text">(.*?)</td></tr>'
        prompts.append(
            (html.unescape(prompt), [tuple(map(html.unescape, cells)) for cells in re.findall(row, rows, re.S)])
        )
    return prompts


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
    assert page.index("<h2>Samples during training") < page.index('<h2 id="viewer"')


def test_the_steps_are_in_order_and_a_repeated_step_is_shown_once(tmp_path):
    """A run that is resumed from a checkpoint repeats the steps after it."""
    lines = [
        {"step": s, "samples": [{"prompt": "A", "response": r, "score": -0.001}]}
        for s, r in ((9, "x"), (0, "y"), (9, "z"))
    ]
    page = write(make_run(tmp_path, training=lines)).read_text()
    assert shown_in_training(page) == [("A", [("0", "0.00", "y"), ("9", "0.00", "z")])]


@pytest.mark.parametrize("training", [None, []])
def test_a_run_without_samples_has_no_such_section(tmp_path, training):
    assert "Samples during training" not in write(make_run(tmp_path, training=training)).read_text()


@pytest.mark.parametrize(
    "rest", ['{"step": 40, "sam', '{"step": 40, "samples": [{"prompt": "\u00e9'[:-1] + "\u00c3", "{"]
)
def test_an_incomplete_last_line_is_ignored(tmp_path, rest):
    """As after a crash, or while the run is writing it."""
    before = write(make_run(tmp_path, training=make_training())).read_text()
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(rest.encode("latin-1"))
    assert write(tmp_path).read_text() == before


# ---- the colours


def test_the_colours_are_symmetric_around_the_centre_and_robust_to_outliers():
    assert scale([-1.0] * 99 + [50.0], 0) == [-1.0, 0, 1.0]
    assert scale([0.5, 1.5] * 50, 1) == [0.5, 1, 1.5]
    assert scale([1.0, 9.0], 1) == [0, 1, 2]  # a ratio is never negative
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
    ("viewer.json", changed(lambda _, response: response.pop("kl"))),
    ("viewer.json", changed(lambda _, response: response.pop("advantage"))),
    ("viewer.json", changed(lambda _, response: response["kl"].pop())),
    ("viewer.json", changed(lambda _, response: response["value"].__setitem__(0, float("nan")))),
    ("viewer.json", changed(lambda _, response: response.update(ratio=["1"] * len(response["tokens"])))),
    ("viewer.json", changed(lambda _, response: response.update(tokens=list(range(len(response["tokens"])))))),
    ("log.jsonl", "{\n"),
    ("log.jsonl", '{"step": 0, "kl": "x"}\n'),
    ("samples.jsonl", "{\n"),
    ("samples.jsonl", "[]\n"),
    ("samples.jsonl", '{"step": 0}\n'),
    ("samples.jsonl", '{"step": 0, "samples": [{"prompt": "", "response": "", "score": "1"}]}\n'),
]


@pytest.mark.parametrize("name, text", DAMAGED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(DAMAGED)])
def test_a_missing_or_damaged_file_is_named_in_one_line_and_the_old_page_is_kept(tmp_path, capsys, name, text):
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
def test_bad_usage_is_reported_in_one_line_with_status_2(capsys, arguments):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: usage: python -m analysis.report FOLDER")


def test_a_page_needs_no_torch():
    code = "import sys, analysis.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- the page in a browser


@pytest.fixture(scope="module")
def driver():
    """A headless Chromium that records its console and its network requests."""
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
    """{name: (path of a page, its viewer.json)}."""
    folder, viewer, few = tmp_path_factory.mktemp("runs"), make_viewer(200), make_viewer(20)
    viewer["samples"][3]["after"]["tokens"][:2] = [" Zeb", "ra"]
    rloo = without_values(make_viewer(3))
    hostile = hostile_run(folder / "hostile")
    for name in ("run", "few"):
        (folder / name).mkdir()
        shutil.copy(ROOT / "asset" / "log.jsonl", folder / name)
    return {
        "run": (write(make_run(folder / "run", viewer, training=make_training())), viewer),
        "few": (write(make_run(folder / "few", few, training=make_training())), few),
        "rloo": (write(make_run(folder / "rloo", rloo)), rloo),
        "hostile": (write(hostile), json.loads((hostile / "viewer.json").read_text())),
    }


@pytest.fixture
def browser(driver, pages):
    """A function that opens a page. After the test, there must be no error in the console and no other request."""
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
    requests = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == opened


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
  number: span.dataset.number, below: span.classList.contains("below"), foreground: getComputedStyle(span).color,
  background: getComputedStyle(span).backgroundColor, share: Number(getComputedStyle(span).getPropertyValue("--share")),
}));
"""


def test_markup_in_a_run_is_shown_and_not_executed(browser):
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


def test_the_samples_of_a_prompt_can_be_folded_by_the_keyboard(browser):
    from selenium.webdriver import ActionChains, Keys

    page, _ = browser("few")
    row = page.find_element("css selector", ".training .text")
    assert row.is_displayed()
    for displayed in (False, True):
        page.execute_script("document.querySelector('.training summary').focus()")
        ActionChains(page).send_keys(Keys.ENTER).perform()
        assert row.is_displayed() == displayed


def test_200_samples_are_painted_within_a_second(browser):
    """The best of three, because other programs may run at the same time."""
    assert min(browser()[0].execute_script(PAINTED) for _ in range(3)) < 1000 * MAX_SECONDS


def test_the_switch_changes_the_colours_and_the_numbers(browser):
    page, samples = browser("few")
    backgrounds = []
    for name, (_, centre) in MEASURES.items():
        page.execute_script(f"document.querySelector('[value={name}]').click()")
        numbers = [x for sample in samples for side in SIDES for x in sample[side][name]]
        low, _, high = scale(numbers, centre)
        tokens = page.execute_script(TOKENS)
        assert [float(token["number"]) for token in tokens] == pytest.approx(numbers, abs=0.0051)
        assert [token["below"] for token in tokens] == [x < centre for x in numbers]
        shares = [min(1, abs(x - centre) / (high - centre)) for x in numbers]
        assert [token["share"] for token in tokens] == pytest.approx(shares, abs=0.0251)  # 20 steps on each side
        ends = page.execute_script("return ['low', 'high'].map((id) => document.getElementById(id).textContent)")
        assert ends == [f"{low:.2f} or less", f"{high:.2f} or more"]
        backgrounds.append([token["background"] for token in tokens])
        strong = {background for background, share in zip(backgrounds[-1], shares) if share == 1}
        assert len(strong) == 1 + any(token["below"] for token in tokens if token["share"] == 1)
    assert all(backgrounds[i] != backgrounds[j] for i in range(4) for j in range(i))


def test_without_values_the_page_colours_by_kl_and_ratio(browser):
    page, samples = browser("rloo")
    for name in ("ratio", "kl"):
        page.execute_script(f"document.querySelector('[value={name}]').click()")
        numbers = [x for sample in samples for side in SIDES for x in sample[side][name]]
        assert [float(token["number"]) for token in page.execute_script(TOKENS)] == pytest.approx(numbers, abs=0.0051)
    page.execute_script("document.querySelector('.after .token').focus()")
    tip = page.find_element("id", "tip").text.splitlines()
    assert [line.split()[0] for line in tip[1:]] == ["KL,", "ratio"]


def test_the_samples_are_sorted_by_each_key_in_both_directions(browser):
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


def test_the_search_finds_texts_in_prompts_and_across_the_tokens_of_responses(browser):
    page, _ = browser()
    for words, matches in (("NUMBER 7", [7, *range(70, 80)]), ("zebra", [3]), ("nothing", []), ("", list(range(200)))):
        page.execute_script(CHOOSE, "search", words)
        assert page.execute_script(PROMPTS) == matches
        assert page.find_element("id", "count").text == f"{len(matches)} of 200 samples"


def test_the_numbers_of_a_token_are_shown_on_hover_focus_and_tap(browser):
    from selenium.webdriver import ActionChains, Keys

    page, samples = browser()
    tip, tokens = page.find_element("id", "tip"), page.find_elements("css selector", ".after .token")[:3]
    expected = [
        [json.dumps(response["tokens"][i], ensure_ascii=False) + f", token {i + 1} of {len(response['tokens'])}"]
        + [f"{text} {response[name][i]:.3f}" for name, (text, _) in MEASURES.items()]
        for response in [samples[0]["after"]]
        for i in range(3)
    ]
    assert not tip.is_displayed()
    ActionChains(page).move_to_element(tokens[0]).perform()
    assert tip.text.splitlines() == expected[0]
    ActionChains(page).move_to_element(page.find_element("tag name", "h2")).perform()
    assert not tip.is_displayed()
    page.execute_script("arguments[0].focus()", tokens[0])
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    assert tip.text.splitlines() == expected[1]
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not tip.is_displayed()
    place = page.execute_script("const box = arguments[0].getBoundingClientRect(); return [box.x, box.y]", tokens[2])
    page.execute_cdp_cmd("Input.synthesizeTapGesture", {"x": place[0] + 3, "y": place[1] + 3})
    assert tip.text.splitlines() == expected[2]


def test_a_mouse_that_leaves_something_else_does_not_hide_the_numbers_of_the_focused_token(browser):
    from selenium.webdriver import ActionChains

    page, _ = browser()
    tip = page.find_element("id", "tip")
    ActionChains(page).move_to_element(page.find_element("tag name", "h2")).perform()
    page.execute_script("document.querySelector('.after .token').focus()")
    for heading in ("h1", "h2"):
        ActionChains(page).move_to_element(page.find_element("tag name", heading)).perform()
        assert tip.is_displayed()


@pytest.mark.parametrize("name", ["run", "hostile"])
def test_on_a_phone_nothing_scrolls_sideways_and_the_responses_are_below_each_other(browser, name):
    page, _ = browser(name, width=390)
    page.execute_script("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    page.execute_script("document.getElementById('numbers').click()")
    page.execute_script(RIGHTMOST)
    assert page.find_element("id", "tip").is_displayed()
    assert page.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    boxes = f"return [...document.querySelectorAll('article, .training{', .table, img' if name == 'run' else ''}')]"
    assert page.execute_script(f"{boxes}.filter((box) => box.scrollWidth > box.clientWidth).length") == 0
    boxes = "return ['before', 'after'].map((side) => document.querySelector(`.${side}`).getBoundingClientRect().y)"
    before, after = page.execute_script(boxes)
    assert before < after


def test_the_learning_curves_have_the_background_of_the_page_and_are_in_two_columns_or_one(browser):
    for scheme in ("light", "dark"):
        for width, columns in ((1280, 2), (390, 1)):
            page, _ = browser("few", width, scheme)
            shown, places = page.execute_script(CURVES)
            assert len(shown) == len(PANELS) and all(complete for _, complete in shown)
            assert all(chosen == (scheme == "light") for chosen, _ in shown)  # the file of <img>, not of <source>
            assert len(set(places)) == columns
        paper = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert np.allclose(rgb(paper), to_rgba("#ffffff" if scheme == "light" else "#0d1117"), atol=1e-6)


CURVES = """
const images = [...document.querySelectorAll("img")];
return [images.map((img) => [img.currentSrc === img.src, img.complete && img.naturalWidth === 1000]),
        images.map((img) => img.getBoundingClientRect().left)];
"""


def rgb(text):
    """Return a computed colour as four numbers between 0 and 1."""
    numbers = [float(x) for x in re.findall(r"[\d.]+(?:e-?\d+)?", text.removeprefix("color(srgb"))]
    colour = np.array(numbers[:3]) / (1 if text.startswith("color(") else 255)
    return np.append(colour, numbers[3] if len(numbers) > 3 else 1)


def contrast(foreground, background, page):
    """Return the contrast of two colours by WCAG 2, 1 to 21; background may be transparent, on the page."""
    foreground, background, page = rgb(foreground), rgb(background), rgb(page)
    background = background[:3] * background[3] + page[:3] * (1 - background[3])
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in (foreground[:3], background)]
    light, dark = sorted((float(c @ [0.2126, 0.7152, 0.0722]) for c in linear), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_text_has_the_contrast_of_level_aa_in_light_and_dark_mode(browser):
    backgrounds = []
    for scheme in ("light", "dark"):
        page, _ = browser("few", scheme=scheme)
        backgrounds.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
        pairs = {(token["foreground"], token["background"]) for token in page.execute_script(TOKENS)}
        assert len(pairs) == 41  # 20 steps on each side, and the centre
        texts = "p, td, td span, th, summary, h3, label"
        script = f"return [...document.querySelectorAll('{texts}')].map((element) => "
        pairs |= {(x, "rgba(0, 0, 0, 0)") for x in page.execute_script(script + "getComputedStyle(element).color)")}
        assert min(contrast(*pair, backgrounds[-1]) for pair in pairs) >= 4.5
        search = "const search = document.getElementById('search'); return [getComputedStyle(search, '::placeholder')"
        pair = page.execute_script(f"{search}.color, getComputedStyle(search).backgroundColor]")
        assert contrast(*pair, backgrounds[-1]) >= 4.5
    white, (light, dark) = "rgb(255, 255, 255)", backgrounds
    assert contrast(white, dark, dark) > 15 > 2 > contrast(white, light, light)
