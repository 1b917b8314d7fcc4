"""The model card: it parses, it has the results, and untrusted text does not become markup."""

import html
import json
import re
import shlex
from dataclasses import asdict, replace

import pytest
from conftest import message
from huggingface_hub import ModelCard

from analysis import card
from analysis.card import base_model, card_text, command, policy_run, samples_markdown, write_card
from analysis.tables import CAPTIONS, KLS, table_text
from config import EvaluateConfig, FinetuneConfig, PPOConfig
from runtime.checkpoint import CARD_MARK, delete_earlier_files
from runtime.cli import parse
from runtime.errors import BadInput

NASTY = "<script>alert('a')</script> | `code` **bold** [x](y) ![i](j) $m$ a\nb\r\u2028c @you www.x.org\n---\n# h\n```\n"
SPREAD = {"std": 2.5, "below_0": 0.125}
SIDE = {name: {"value": i + 0.5, "low": i, "high": i + 1} for i, name in enumerate(CAPTIONS)}
SIDE |= {name: SIDE[name] | SPREAD for name in KLS}
AFTER = {name: row | {"value": row["value"] + 100} for name, row in SIDE.items()}
RESULTS = {
    "before": SIDE, "after": AFTER, "difference": SIDE | {"perplexity_ratio": {"value": 0.9, "low": 0.8, "high": 1.1}},
    "prompts": 1024,
}  # fmt: skip
LOG = [{"step": 39, "seconds": 170.0, "score": 1.0, "kl": 4.1, "kl_coef": 0.05}]
SAMPLES = [(NASTY, [(NASTY, 0.2), ("fine", 0.9)])]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes the card of a config and a run, and loads it with huggingface_hub."""

    def load(cfg, run, log=LOG):
        return ModelCard.load(write_card(tmp_path, card_text(RESULTS, SAMPLES, cfg, run, log)))

    return load


def test_the_card_has_the_metadata_of_the_hub_and_the_results(write):
    cfg = replace(EvaluateConfig(), after="ppo_checkpoints/gpt2")
    loaded = write(cfg, PPOConfig(policy="gpt2"))
    data = loaded.data.to_dict()
    expected = dict(language="en", license="mit", pipeline_tag="text-generation", library_name="transformers")
    assert data | expected | dict(base_model="gpt2", datasets=["stanfordnlp/imdb"]) == data
    (index,) = data["model-index"]
    (result,) = index["results"]
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert index["name"] == "gpt2"
    assert values == {name: entry["value"] for name, entry in AFTER.items()}  # after PPO, not before
    assert table_text(RESULTS) in loaded.text
    assert "25,600: 200 rollouts of 128" in loaded.text


def test_the_card_names_reward_and_judge_of_the_training_and_of_the_evaluation(write):
    run, cfg = PPOConfig(reward="a/b", judge="c/d"), EvaluateConfig(reward="e/f", judge="g/h")
    text = write(cfg, run).text
    assert re.search(r"\| reward +\| a/b, logit +\|", text) and re.search(r"\| judge during training +\| c/d +\|", text)
    assert "The score is given by e/f, the judge is g/h." in " ".join(text.split())


def test_untrusted_text_does_not_become_markup(write):
    """All headings, fences and tags are those of the card, and the values are still readable."""
    run = PPOConfig(policy=NASTY, reward=NASTY, judge=NASTY, dataset=NASTY)
    cfg = EvaluateConfig(after=f"x/{NASTY.replace('/', '')}", reward=NASTY, judge=NASTY, dataset=NASTY)
    loaded = write(cfg, run)
    prose = re.sub(r"```(python|bash)\n.*?\n```\n", "", loaded.text, flags=re.DOTALL)
    headings = re.findall(r"^#.*", loaded.text, re.MULTILINE)
    assert [line for line in headings if line.startswith("## ")] == [
        "## Training", "## Evaluation", "## Samples", "## Use", "## Limits", "## Reproduce"
    ]  # fmt: skip
    assert len(headings) == 7
    assert loaded.text.count("\n```") == 4
    assert re.findall(r"<[^>]*>", prose) == [CARD_MARK]
    assert not re.search(r"[\[!]\w*\]?\(|\*\*|\$|@|www\.|`code`", prose)
    assert " ".join(NASTY.split())[:40] in html.unescape(prose)
    assert "base_model" not in loaded.data.to_dict()
    assert "\n" not in loaded.data.to_dict()["model-index"][0]["name"]


def test_the_samples_are_a_table_without_markup():
    """A reader sees the text as it was generated."""
    header, rule, line = samples_markdown([("A film", [(NASTY, 0.5), (NASTY, 0.5)])]).splitlines()
    cells = line.split("|")[1:-1]
    assert header.count("|") == rule.count("|") == line.count("|") == 6
    assert not re.search(r"[<>`*\[\]!$@]|www\.|&(?!#\d+;|\w+;)", line)
    assert html.unescape(cells[1]).strip() == " ".join(NASTY.split())


def test_a_policy_of_an_unknown_run_has_a_card(write, tmp_path):
    file = tmp_path / "reviews.csv"
    file.touch()
    loaded = write(EvaluateConfig(after="asset", dataset=str(file)), None, [])
    assert "how the policy was trained is not known" in loaded.text
    assert "ppo.py --" not in loaded.text
    assert {"datasets", "base_model"}.isdisjoint(loaded.data.to_dict())
    assert loaded.data.to_dict()["model-index"][0]["results"][0]["dataset"]["name"] == "reviews.csv"


def test_the_commands_reproduce_the_configs():
    cfg = parse(PPOConfig, ["--preset", "mini", "--kl_coef", "0.5", "--policy", "a b'c", "--self_check", "False"])
    program, script, *flags = shlex.split(command("ppo.py", replace(cfg, force=True)))
    assert (program, script) == ("python", "ppo.py")
    assert flags[:2] == ["--preset", "mini"]
    assert len(flags) == 8
    assert parse(PPOConfig, flags) == cfg
    assert command("evaluate.py", parse(EvaluateConfig, ["--preset", "mini"])) == "python evaluate.py --preset mini"


def test_the_base_model_is_a_name_on_the_hub_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, start in (("tuned", "openai-community/gpt2"), ("trained", "scratch"), ("local", "trained")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run_config.json").write_text(json.dumps(asdict(FinetuneConfig(init_from=start))))
    (tmp_path / "bare").mkdir()
    names = {name: base_model(name) for name in ("tuned", "trained", "local", "bare", "gpt2", "a b", "asset/mini/gpt2")}
    assert names == dict.fromkeys(names) | {"tuned": "openai-community/gpt2", "gpt2": "gpt2"}


def test_the_run_of_a_policy_is_read_from_its_folder_and_that_of_the_best_policy_from_the_parent(tmp_path):
    run = PPOConfig(kl_coef=0.5, judge="", self_check=False, out="a b")
    (tmp_path / "best").mkdir()
    (tmp_path / "run_config.json").write_text(json.dumps(asdict(run) | {"of_another_version": 1}))
    (tmp_path / "log.jsonl").write_text('{"step": 0, "skipped_steps": 1}\n{"step": 1, "score": 2.0}\n')
    assert policy_run(tmp_path) == policy_run(tmp_path / "best") == (run, [{"step": 1, "score": 2.0}])
    (tmp_path / "best" / "run_config.json").write_text("{}")
    (tmp_path / "run_config.json").write_text(json.dumps(asdict(FinetuneConfig())))
    assert policy_run(tmp_path) == (None, [])
    (tmp_path / "run_config.json").write_text(json.dumps(asdict(run) | {"lam": "much"}))
    error = message(policy_run, tmp_path)
    assert "run_config.json" in error
    assert "much" in error


def test_a_readme_of_the_user_is_kept_and_ours_is_replaced(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("mine\n")
    assert write_card(tmp_path, f"\n{CARD_MARK}\n1").name == "MODEL_CARD.md"
    assert "MODEL_CARD.md" in capsys.readouterr().out
    delete_earlier_files(tmp_path)  # as a new run in this folder does
    assert readme.read_text() == "mine\n"
    readme.unlink()
    for text in ("1", "2"):
        assert write_card(tmp_path, f"\n{CARD_MARK}\n{text}") == readme
    assert readme.read_text().endswith("2")
    delete_earlier_files(tmp_path)
    assert not readme.exists()


def test_a_broken_run_config_is_refused(tmp_path):
    (tmp_path / "run_config.json").write_text("{")
    with pytest.raises(BadInput, match=r"run_config\.json"):
        policy_run(tmp_path)


def test_the_card_names_the_commits_of_what_was_read_from_the_hub(tmp_path, write, monkeypatch):
    """Those recorded by the training, those read by the evaluation, and none for a local folder."""
    run = PPOConfig(policy="trained", reward="lvwerra/bert-imdb", judge="", dataset="stanfordnlp/imdb@v1")
    (tmp_path / "run_config.json").write_text(
        json.dumps(asdict(run) | {"revisions": {"lvwerra/bert-imdb": "abc123", "stanfordnlp/imdb@v1": "def456"}})
    )
    monkeypatch.setattr(card, "REVISIONS", {"some/judge": "789aaa", "lvwerra/bert-imdb": "newer"})
    for after in (tmp_path, tmp_path / "best"):
        text = write(EvaluateConfig(after=str(after), judge="some/judge", reward="lvwerra/bert-imdb"), run).text
        rows = dict(re.findall(r"^\| (.+?) +\| (.+?) +\|$", text, re.MULTILINE))
        assert (
            rows["reward"].startswith("lvwerra/bert-imdb (commit abc123)") and rows["judge during training"] == "none"
        )
        assert "imdb&#64;v1 (commit def456)" in rows["prompts"] and rows["initial policy and reference"] == "trained"
        prose = " ".join(text.split())
        assert (
            "The score is given by lvwerra/bert-imdb (commit newer), the judge is some/judge (commit 789aaa)" in prose
        )
