"""The constants: presets, flags, ranges, and the errors of wrong flags."""

import re
import shlex
from types import SimpleNamespace

import pytest
from conftest import ROOT

from config import (
    PRESETS,
    RANGES,
    BenchConfig,
    DPOConfig,
    EvaluateConfig,
    FinetuneConfig,
    FrontierConfig,
    GenerateConfig,
    PPOConfig,
    PreflightConfig,
    QualityConfig,
    RewardConfig,
    defaults,
    fields,
)
from runtime import cli
from runtime.cli import comment, differing, evaluation, parse
from runtime.errors import BadInput

CLASSES = (
    FinetuneConfig,
    RewardConfig,
    PPOConfig,
    DPOConfig,
    EvaluateConfig,
    GenerateConfig,
    PreflightConfig,
    BenchConfig,
    FrontierConfig,
    QualityConfig,
)
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def without_spaces(text):
    """Return the text without the line breaks of --help."""
    return re.sub(r"\s", "", text)


def test_every_constant_is_read_somewhere():
    """A constant that nothing reads is a knob without effect."""
    files = [file for file in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if file.parent.name != "tests"]
    source = "".join(file.read_text(encoding="utf-8") for file in files if file.name != "config.py")
    names = {f.name for cls in CLASSES for f in fields(cls)}
    assert not [name for name in names if not re.search(rf"\b(cfg|given|ppo|run)\.{name}\b", source)]


@every_class
def test_every_constant_has_a_comment_and_help_shows_it(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse(cls, ["--help"])
    shown = without_spaces(capsys.readouterr().out)
    hidden = [f.name for f in fields(cls) if without_spaces(comment(cls, f.name)) not in shown]
    assert stop.value.code == 0 and not hidden


def test_help_shows_the_defaults_of_the_preset(capsys):
    for preset, value in (("gpt2", "1.41e-05"), ("mini", "0.0001")):
        with pytest.raises(SystemExit):
            parse(PPOConfig, ["--preset", preset, "--help"])
        assert f"(default:{value})" in without_spaces(capsys.readouterr().out)


@every_class
def test_every_number_has_a_range(cls):
    ranged = " ".join(RANGES.values()).split()
    numbers = [
        f.name
        for f in fields(cls)
        if f.type in (int, float) or "tuple[float" in str(f.type) or "tuple[int" in str(f.type)
    ]
    assert not [name for name in numbers if name not in ranged]
    assert len(ranged) == len(set(ranged))


@every_class
def test_values_are_given_only_for_presets_that_exist(cls):
    allowed = {key for preset in PRESETS for key in (preset, f"{preset}_scratch")}
    assert {key for f in fields(cls) for key in f.metadata} <= allowed


@every_class
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_its_own_checks(cls, preset):
    assert parse(cls, ["--preset", preset]) == defaults(cls, preset)
    if cls in (FinetuneConfig, RewardConfig):
        cfg = parse(cls, ["--preset", preset, "--init_from", "scratch"])
        assert (cfg.preset, cfg.init_from) == (preset, "scratch")


def test_a_flag_overrides_the_preset_and_the_preset_overrides_the_default():
    assert parse(PPOConfig, []).steps == PPOConfig().steps == 200
    assert parse(PPOConfig, ["--preset", "mini"]).steps == defaults(PPOConfig, "mini").steps == 40
    assert parse(PPOConfig, ["--steps", "3", "--preset", "mini"]).steps == 3
    assert parse(PPOConfig, ["--preset=mini", "--steps", "200"]).steps == 200  # the default's value, given as a flag


def test_init_from_scratch_sets_more_constants_and_a_flag_overrides_them():
    """Catches a training from scratch with the constants of further training."""
    cfg = parse(FinetuneConfig, ["--preset", "mini", "--init_from", "scratch", "--lr", "0.5"])
    assert (cfg.epochs, cfg.optimizer, cfg.out, cfg.lr) == (9.0, "muon", "finetune_checkpoints/scratch", 0.5)
    assert cfg.dataset == "movie-reviews" and cfg.save_dtype == "fp16"  # as without --init_from scratch
    assert parse(FinetuneConfig, ["--init_from", "scratch"]) == FinetuneConfig(init_from="scratch")


def test_preset_medium_has_the_constants_of_mini_except_its_own():
    """It is trained from scratch without a flag, and without a teacher, which it is itself."""
    medium, mini = defaults(FinetuneConfig, "medium"), defaults(FinetuneConfig, "mini", "scratch")
    assert (medium.init_from, medium.teacher, medium.out) == ("scratch", "", "finetune_checkpoints/medium")
    assert (medium.optimizer, medium.dataset, medium.lr) == (mini.optimizer, mini.dataset, mini.lr)
    assert medium.n_embd > mini.n_embd and mini.teacher == medium.out
    medium, mini = defaults(PPOConfig, "medium"), defaults(PPOConfig, "mini")
    different = {name for name, value in vars(mini).items() if getattr(medium, name) != value}
    assert different == {"preset", "policy", "out"}
    assert defaults(EvaluateConfig, "medium").after == medium.out


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
        (PPOConfig, "--kl_target 6 --kl_horizon 25.6", ["kl_horizon is 25.6", "over 25.6"]),
        (DPOConfig, "--beta 0", ["beta"]),
        (DPOConfig, "--method rlhf", ["method", "rlhf"]),
        (DPOConfig, "--samples_per_prompt 1", ["samples_per_prompt is 1", "dpo needs at least 2"]),
        (DPOConfig, "--samples_per_prompt 3", ["samples_per_prompt 3", "minibatch_size 128"]),
        (DPOConfig, "--micro_batch_size 2", ["samples_per_prompt 4", "micro_batch_size 2"]),
        (DPOConfig, "--minibatch_size 48", ["minibatch_size 48", "batch_size 128"]),
        (DPOConfig, "--micro_batch_size 12", ["micro_batch_size 12", "minibatch_size 128"]),
        (DPOConfig, "--min_prompt_len 9", ["min_prompt_len 9", "max_prompt_len 8"]),
        (FrontierConfig, "--kl_coefs 0.1 -1", ["kl_coefs", "-1"]),
        (FrontierConfig, "--seeds 1", ["seeds", "1"]),
        (FinetuneConfig, "--micro_batch_size 5", ["micro_batch_size 5", "batch_size 32"]),
        (FinetuneConfig, "--beta1 1", ["beta1"]),
        (FinetuneConfig, "--epochs nan", ["epochs", "nan"]),
        (FinetuneConfig, "--preset mini --init_from scratch --n_head 3", ["n_head 3", "n_embd 320"]),
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
def test_the_error_for_a_wrong_flag_is_one_line_that_names_it(cls, argv, named):
    with pytest.raises(BadInput) as error:
        parse(cls, argv.split())
    message = str(error.value)
    assert all(word in message for word in named), message
    assert "\n" not in message


def test_values_at_inclusive_bounds_are_accepted():
    """An off-by-one in the range checks would refuse these."""
    cfg = PPOConfig(kl_coef=0.0, kl_target=0.0, gamma=1.0, lam=0.0, lr_end=0.0, min_prompt_len=8, max_prompt_len=8)
    assert (cfg.kl_coef, cfg.lam, cfg.gamma) == (0.0, 0.0, 1.0)
    assert PPOConfig(kl_target=6.0, kl_horizon=25.7).kl_horizon == 25.7


@pytest.mark.parametrize("cls", [PPOConfig, DPOConfig])
@pytest.mark.parametrize("flags", [[], ["--reward", "my rewards.py:f", "--policy", "a", "--response_len", "7"]])
def test_a_run_prints_the_command_that_evaluates_it_with_its_models_and_prompts(cls, flags):
    cfg = parse(cls, ["--preset", "mini", "--out", "runs/a b", "--seed", "3", *flags])
    program, script, *argv = shlex.split(evaluation(cfg))
    evaluated = parse(EvaluateConfig, argv)
    assert (program, script, evaluated.after, evaluated.before) == ("python", "evaluate.py", cfg.out, cfg.policy)
    shared = [name for name in ("reward", "response_len", "dataset", "task", "judge") if hasattr(cfg, name)]
    assert all(getattr(evaluated, name) == getattr(cfg, name) for name in shared)
    assert len(argv) == 2 * (2 + len(flags) // 2) and evaluated.seed == 0  # no more flags than needed


def test_the_command_that_evaluates_a_run_without_a_judge_has_the_judge_of_the_preset():
    cfg = PPOConfig(judge="", judge_positive_label="GOOD")
    assert evaluation(cfg) == "python evaluate.py --preset gpt2 --after ppo_checkpoints/gpt2"


def test_on_windows_that_command_is_quoted_as_its_console_reads_it(monkeypatch):
    monkeypatch.setattr(cli, "os", SimpleNamespace(name="nt"))  # pathlib of pytest reads os.name too
    cfg = PPOConfig(out="runs\\a", reward="C:\\my rewards.py:f")
    assert evaluation(cfg).endswith('--after runs\\a --reward "C:\\my rewards.py:f"')


def test_differing_names_what_changed_and_only_what_changes_the_result():
    """The device, the micro-batch size and the log do not change the result of a run."""
    saved = {f.name: getattr(PPOConfig(), f.name) for f in fields(PPOConfig)}
    same = PPOConfig(force=True, device="cpu", report_to="none", micro_batch_size=8, compile=True, keep=7)
    assert differing(same, saved) == []
    assert differing(PPOConfig(steps=7), saved) == ["steps 200 -> 7"]
    older = {k: v for k, v in saved.items() if k != "lam"}  # of a version without the field
    assert differing(PPOConfig(), older) == [] and differing(PPOConfig(lam=0.9), older) == ["lam 0.95 -> 0.9"]


def test_a_field_that_an_earlier_version_did_not_have_counts_as_the_default_of_the_preset():
    for flags in ([], ["--preset", "mini"], ["--preset", "mini", "--init_from", "scratch"]):
        cfg = parse(FinetuneConfig, flags)
        assert differing(cfg, {"preset": cfg.preset, "init_from": cfg.init_from}) == []


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
