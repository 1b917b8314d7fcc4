"""The constants: presets, flags, ranges, and what a wrong flag says."""

import ast
import io
import re
import tokenize

import pytest
from conftest import ROOT

from config import (
    FROM_SCRATCH,
    PRESETS,
    BenchConfig,
    EvaluateConfig,
    FinetuneConfig,
    FrontierConfig,
    GenerateConfig,
    PPOConfig,
    RewardConfig,
    fields,
)
from runtime.cli import differing, parse, sources
from runtime.errors import BadInput

SHARED = ("checkpoint", "data", "device", "log", "model")
READERS = {  # the modules that get a config of the class
    FinetuneConfig: ("finetune_gpt2", *SHARED),
    RewardConfig: ("reward", *SHARED),
    PPOConfig: ("ppo", "reward", *SHARED),
    EvaluateConfig: ("evaluate", "metrics", "card", "reward", *SHARED),
    GenerateConfig: ("generate", "reward", *SHARED),
    BenchConfig: ("bench", *SHARED),
    FrontierConfig: ("frontier", *SHARED),
}
every_class = pytest.mark.parametrize("cls", READERS, ids=lambda cls: cls.__name__)


def comments(cls):
    """{field: its comment} of a class, read from config.py."""
    source = (ROOT / "config.py").read_text()
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = next(node for node in ast.parse(source).body if getattr(node, "name", "") == cls.__name__).body
    lines = {
        node.target.id: range(node.lineno, node.end_lineno + 1) for node in body if isinstance(node, ast.AnnAssign)
    }
    return {name: " ".join(by_line[line] for line in at if line in by_line) for name, at in lines.items()}


def letters(text):
    """Without spaces and the frame of --help, so that a line break there does not matter."""
    return re.sub(r"[\s│]", "", text)


@every_class
def test_every_constant_is_read_somewhere(cls):
    """A constant that nothing reads is a knob that does nothing. `preset` is read by parse."""
    source = "".join((ROOT / f"{name}.py").read_text() for name in READERS[cls])
    unread = [f.name for f in fields(cls) if not re.search(rf"\bcfg\.{f.name}\b", source) and f.name != "preset"]
    assert not unread


@every_class
def test_every_constant_has_a_comment_and_help_shows_it(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse(cls, ["--help"])
    shown = letters(capsys.readouterr().out)
    hidden = [name for name, text in comments(cls).items() if not text or letters(text) not in shown]
    assert stop.value.code == 0
    assert list(comments(cls)) == [f.name for f in fields(cls)]
    assert not hidden


def test_a_preset_overrides_only_fields_that_exist():
    wrong = [
        (preset, cls.__name__, name)
        for table in (PRESETS, FROM_SCRATCH)
        for preset, overrides in table.items()
        for cls, values in overrides.items()
        for name in values
        if name not in {f.name for f in fields(cls)}
    ]
    assert not wrong


@every_class
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_its_own_checks(cls, preset):
    assert parse(cls, ["--preset", preset]).preset == preset
    if cls in (FinetuneConfig, RewardConfig):
        assert parse(cls, ["--preset", preset, "--init_from", "scratch"]).init_from == "scratch"


def test_a_flag_beats_the_preset_and_the_preset_beats_the_default():
    assert parse(PPOConfig, []).steps == PPOConfig().steps == 200
    assert parse(PPOConfig, ["--preset", "mini"]).steps == PRESETS["mini"][PPOConfig]["steps"] == 40
    assert parse(PPOConfig, ["--steps", "3", "--preset", "mini"]).steps == 3
    assert parse(PPOConfig, ["--preset=mini", "--steps", "200"]).steps == 200  # the default's value, given as a flag


def test_from_scratch_has_more_overrides_that_a_flag_beats_too():
    """Catches the constants of the short run in the long one."""
    long = FROM_SCRATCH["mini"][FinetuneConfig]
    cfg = parse(FinetuneConfig, ["--preset", "mini", "--init_from", "scratch", "--lr", "0.5"])
    assert (cfg.epochs, cfg.optimizer, cfg.out, cfg.lr) == (long["epochs"], "muon", long["out"], 0.5)
    assert cfg.dataset == PRESETS["mini"][FinetuneConfig]["dataset"]  # what both share stands in one place
    assert parse(FinetuneConfig, ["--init_from", "scratch"]) == FinetuneConfig(init_from="scratch")


def test_a_config_cannot_be_changed_after_it_was_checked():
    with pytest.raises(AttributeError):
        PPOConfig().lr = -1.0


@pytest.mark.parametrize(
    ("cls", "argv", "named"),
    [
        (PPOConfig, "--no_such_flag 1", ["no_such_flag"]),
        (PPOConfig, "--steps many", ["steps", "many"]),
        (PPOConfig, "--steps 2.5", ["steps", "2.5"]),
        (PPOConfig, "--force maybe", ["force", "maybe"]),
        (PPOConfig, "--device tpu", ["device", "tpu"]),
        (PPOConfig, "--preset huge", ["preset", "huge"]),
        (PPOConfig, "--steps", ["steps"]),
        (PPOConfig, "--kl_coef -0.1", ["kl_coef", "-0.1"]),
        (PPOConfig, "--kl_coef nan", ["kl_coef", "nan"]),
        (PPOConfig, "--lr inf", ["lr", "inf"]),
        (PPOConfig, "--temperature 0", ["temperature"]),
        (PPOConfig, "--clip_eps 0", ["clip_eps"]),
        (PPOConfig, "--gamma 1.01", ["gamma", "1.01"]),
        (PPOConfig, "--lam -0.01", ["lam", "-0.01"]),
        (PPOConfig, "--response_len 0", ["response_len"]),
        (PPOConfig, "--min_prompt_len 0", ["min_prompt_len"]),
        (PPOConfig, "--min_prompt_len 9", ["min_prompt_len 9", "max_prompt_len 8"]),
        (PPOConfig, "--minibatch_size 48", ["minibatch_size 48", "batch_size 128"]),
        (PPOConfig, "--micro_batch_size 3", ["micro_batch_size 3", "minibatch_size 128"]),
        (PPOConfig, "--advantage grpo --samples_per_prompt 1", ["samples_per_prompt", "1"]),
        (PPOConfig, "--advantage rloo --samples_per_prompt 3", ["samples_per_prompt 3", "batch_size 128"]),
        (FrontierConfig, "--kl_coefs 0.1 -1", ["kl_coefs", "-1"]),
        (FrontierConfig, "--seeds 1", ["seeds", "1"]),
        (FinetuneConfig, "--micro_batch_size 5", ["micro_batch_size 5", "batch_size 32"]),
        (FinetuneConfig, "--beta1 1", ["beta1"]),
        (FinetuneConfig, "--epochs nan", ["epochs", "nan"]),
        (FinetuneConfig, "--preset mini --init_from scratch --n_head 3", ["n_head 3", "n_embd 256"]),
        (FinetuneConfig, "--preset mini --init_from scratch --vocab_size 256", ["vocab_size", "257"]),
        (FinetuneConfig, "--init_from scratch --block_size 513", ["block_size 513", "n_positions 512"]),
        (RewardConfig, "--dropout 1", ["dropout"]),
        (RewardConfig, "--crop_share 1.5", ["crop_share", "1.5"]),
        (RewardConfig, "--seed -1", ["seed", "-1"]),
        (EvaluateConfig, "--prompts 0", ["prompts"]),
        (EvaluateConfig, "--judge=", ["judge is empty"]),
        (GenerateConfig, "--judge=", ["judge is empty"]),
        (PPOConfig, "--save_share 0", ["save_share"]),
        (PPOConfig, "--sample_prompts -1", ["sample_prompts"]),
        (GenerateConfig, "--response_len 0", ["response_len"]),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(cls, argv, named):
    with pytest.raises(BadInput) as error:
        parse(cls, argv.split())
    message = str(error.value)
    assert all(word in message for word in named), message
    assert "\n" not in message


def test_bounds_that_are_allowed_pass():
    """An off-by-one in the range checks would refuse these."""
    cfg = PPOConfig(kl_coef=0.0, kl_target=0.0, gamma=1.0, lam=0.0, lr_end=0.0, min_prompt_len=8, max_prompt_len=8)
    assert (cfg.kl_coef, cfg.lam, cfg.gamma) == (0.0, 0.0, 1.0)


def test_differing_names_what_changed_and_only_what_changes_the_result():
    """Where a run computes, how much at once and where it reports do not make it another run."""
    saved = {f.name: getattr(PPOConfig(), f.name) for f in fields(PPOConfig)}
    same = PPOConfig(force=True, device="cpu", report_to="none", micro_batch_size=8, compile=True, keep=7)
    assert differing(same, saved) == []
    assert differing(PPOConfig(steps=7), saved) == ["steps 200 -> 7"]
    older = {k: v for k, v in saved.items() if k != "lam"}  # of a version without the field
    assert differing(PPOConfig(), older) == [] and differing(PPOConfig(lam=0.9), older) == ["lam 0.95 -> 0.9"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--resume"], (True, False, True)),
        (["--resume", "--steps", "3"], (True, False, True)),
        (["--resume", "True", "--force"], (True, True, True)),
        (["--resume", "False"], (False, False, True)),
        (["--self_check", "False", "--force"], (False, True, False)),
        (["--self-check", "False", "--resume"], (True, False, False)),
        (["--self_check=False"], (False, False, False)),
    ],
)
def test_a_boolean_flag_needs_no_value(argv, expected):
    cfg = parse(PPOConfig, argv)
    assert (cfg.resume, cfg.force, cfg.self_check) == expected


def test_sources_names_the_fields_that_the_preset_and_the_flags_set():
    """Someone who edits a default sees why preset mini does not follow."""
    text = sources(parse(PPOConfig, ["--preset", "mini", "--gamma", "0.9", "--steps", "3", "--resume"]))
    preset, flags = text.split("; ")
    shown = set(PRESETS["mini"][PPOConfig]) - {"out", "sample_every", "steps"}  # those that change results, each once
    assert preset.startswith("preset mini sets ") and set(preset[17:].split(", ")) == shown
    assert set(flags.removeprefix("flags set ").split(", ")) == {"steps", "gamma"}  # --resume changes no result
    scratch = sources(parse(FinetuneConfig, ["--preset", "mini", "--init_from", "scratch"]))
    assert "muon_lr" in scratch and "flags set init_from" in scratch
    assert sources(PPOConfig()) == "all defaults"
