"""Bad input ends a script with one line on stderr and exit status 2, before anything is written."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
from conftest import ROOT, hf_gpt2, reviews_csv, write_bert

from config import DPOConfig, EvaluateConfig, FinetuneConfig, GenerateConfig, PPOConfig, RewardConfig
from runtime import cli
from runtime.errors import Finished

CONFIGS = {
    "finetune_gpt2": FinetuneConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "dpo": DPOConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
}
SMALL = "--vocab_size 300 --n_layer 1 --n_head 1 --n_embd 8 --report_to none --device cpu"
FINETUNE = f"--preset mini --init_from scratch --teacher= --dataset {{csv}} --out out {SMALL}"
FROM_FOLDER = "--dataset {csv} --out out --init_from {gpt2} --report_to none --device cpu"
REWARD = "--preset mini --init_from {bert} --dataset {csv} --out out --report_to none --device cpu"
MODELS = "--policy {gpt2} --reward {bert} --judge {judge}"
PPO = f"--preset mini --dataset {{csv}} {MODELS} --out out --report_to none --device cpu"
DPO = "--preset mini --dataset {csv} --policy {gpt2} --reward {bert} --out out --report_to none --device cpu"
DPO_16 = DPO + " --batch_size 16 --minibatch_size 16 --micro_batch_size 16"
PPO_16 = PPO + " --batch_size 16 --minibatch_size 16 --micro_batch_size 16"
EVALUATE = "--preset mini --dataset {csv} --before {gpt2} --after {gpt2} --reward {bert} --judge {judge} --device cpu"
EVALUATE_16 = EVALUATE + " --prompts 16"
GENERATE = "--preset mini --before {gpt2} --after {gpt2} --reward {bert} --judge {judge} --device cpu --prompt I"

FOREIGN = [f"tuned{os.sep}results.json", "copy"]
CASES = {  # name: (script, flags, parts of the message); if a flag is repeated, the last one counts
    # models
    "no fine-tuned model": ("ppo", f"{PPO} --policy finetune_checkpoints/mini", ["python finetune_gpt2.py"]),
    "no reward": ("ppo", f"{PPO} --reward reward_checkpoints/mini/reward", ["python reward.py --preset mini"]),
    "no policy to evaluate": ("evaluate", f"{EVALUATE} --after ppo_checkpoints/mini", ["python ppo.py --preset mini"]),
    "no policy to generate with": ("generate", f"{GENERATE} --after ppo_checkpoints/mini", ["ppo.py --preset mini"]),
    "no judge": ("evaluate", f"{EVALUATE_16} --judge reward_checkpoints/mini/judge", ["reward.py --preset mini"]),
    "not the repository's folder": ("ppo", "--preset mini", ["asset/mini/gpt2", "run the scripts in its folder"]),
    "no such folder": ("ppo", f"{PPO} --policy ./nowhere", ["./nowhere", "config.json"]),
    "no weights": ("ppo", f"{PPO} --policy {{hollow}}", ["hollow", "model.safetensors"]),
    "a classifier as the policy": ("ppo", f"{PPO} --policy {{bert}}", ["model_type", "'bert'", "'gpt2'"]),
    "model on the hub": ("finetune_gpt2", "--init_from gpt2", ["'gpt2'", "--preset mini"]),
    "encoder on the hub": ("reward", "", ["'bert-base-cased'", "--preset mini"]),
    "neither a folder nor a hub name": ("ppo", f"{PPO} --policy a/b/c/d", ["a/b/c/d"]),
    "labels without names": ("ppo", f"{PPO} --reward {{generic}}", ["LABEL_0", "--positive_label"]),
    "a judge whose labels have no names": ("evaluate", f"{EVALUATE_16} --judge {{generic}}", ["LABEL_0"]),
    "no second language model": ("evaluate", f"{EVALUATE} --second_lm ./nowhere", ["./nowhere", "config.json"]),
    "a second model without weights": ("evaluate", f"{EVALUATE} --second_lm {{hollow}}", ["hollow", "no weights"]),
    "a file without a function": ("ppo", f"{PPO} --reward {{nan}}", ["nan.py:function"]),
    "no such function": ("ppo", f"{PPO} --reward nothing.py:f", ["nothing.py"]),
    # data
    "dataset on the hub": ("reward", f"{REWARD} --dataset stanfordnlp/imdb", ["'stanfordnlp/imdb'", "--preset mini"]),
    "no such dataset": ("finetune_gpt2", f"{FINETUNE} --dataset nothing.csv", ["nothing.csv"]),
    "empty dataset": ("reward", f"{REWARD} --dataset {{empty}}", ["empty.csv"]),
    "a dataset smaller than a batch": ("ppo", f"{PPO} --self_check False", ["batch_size 128", "prompts"]),
    "no such teacher": ("finetune_gpt2", f"{FINETUNE} --teacher nowhere/medium", ["nowhere/medium"]),
    "a teacher that was not trained yet": (
        "finetune_gpt2",
        "--preset mini --init_from scratch --dataset {csv}",
        ["finetune_checkpoints/medium has no config.json", "python finetune_gpt2.py --preset medium"],
    ),
    "a teacher with another tokenizer": ("finetune_gpt2", f"{FINETUNE} --teacher {{gpt2}}", ["another tokenizer"]),
    "a dataset smaller than a block": (
        "finetune_gpt2",
        f"{FINETUNE} --block_size 20000 --n_positions 20000",
        ["toy.csv", "20000"],
    ),
    "fewer held-out reviews than prompts": ("evaluate", EVALUATE, ["1024", "32"]),
    "reviews shorter than a prompt": ("ppo", f"{PPO} --max_prompt_len 200 --policy {{long}}", ["longer", "200"]),
    # sizes
    "prompt and response over the context": ("ppo", f"{PPO} --response_len 41", ["8", "41", "48"]),
    "evaluate.py over the context": ("evaluate", f"{EVALUATE} --response_len 41", ["8", "41", "48"]),
    "generate.py over the context": ("generate", f"{GENERATE} --response_len 48", ["1 tokens", "48"]),
    "a block over the context": ("finetune_gpt2", f"{FROM_FOLDER} --block_size 49", ["49", "48"]),
    "batch sizes that do not divide": ("ppo", f"{PPO} --minibatch_size 48", ["48", "128"]),
    "a value that is not a number": ("ppo", f"{PPO} --lr nan", ["lr", "nan"]),
    # the machine and the folder
    "no CUDA": ("finetune_gpt2", f"{FINETUNE} --device cuda", ["cuda", "cpu"]),
    "no W&B": ("finetune_gpt2", f"{FINETUNE} --report_to wandb", ["wandb", "pip install wandb"]),
    "a folder that cannot be written": ("finetune_gpt2", f"{FINETUNE} --out {{csv}}/out", [f"toy.csv{os.sep}out"]),
    "a policy of an unfinished run": ("evaluate", f"{EVALUATE} --after {{unfinished}}", ["unfinished run", "--resume"]),
    "generate.py, unfinished run": ("generate", f"{GENERATE} --after {{unfinished}}", ["unfinished run", "best"]),
    "foreign results": ("evaluate", f"{EVALUATE} --after {{tuned}}", FOREIGN),
    "foreign with --force": ("evaluate", f"{EVALUATE} --after {{tuned}} --force True", FOREIGN),
    "earlier results": ("evaluate", f"{EVALUATE} --after {{evaluated}}", [f"evaluated{os.sep}viewer.json", "--force"]),
    # the self-check of reward and judge
    "an untrained reward": ("ppo", PPO_16, ["probe sentences", "POSITIVE"]),
    "an untrained reward in evaluate.py": ("evaluate", EVALUATE_16, ["the reward ranks probe sentences"]),
    "an untrained judge": (
        "evaluate",
        f"{EVALUATE_16} --reward {{nan}}:length",
        ["the judge ranks probe sentences", "POSITIVE"],
    ),
    # dpo.py
    "dpo.py without a fine-tuned model": ("dpo", f"{DPO} --policy finetune_checkpoints/mini", ["finetune_gpt2.py"]),
    "too few prompts for dpo.py": ("dpo", f"{DPO} --batch_size 2048 --self_check False", ["2048", "512 prompts"]),
    "one response per prompt": ("dpo", f"{DPO} --samples_per_prompt 1", ["samples_per_prompt is 1"]),
    "pairs that a micro-batch would split": ("dpo", f"{DPO} --micro_batch_size 2", ["samples_per_prompt 4"]),
    "dpo.py over the context": ("dpo", f"{DPO} --response_len 41", ["8", "41", "48"]),
    "an untrained reward in dpo.py": ("dpo", DPO_16, ["probe sentences", "POSITIVE"]),
    "no policy of dpo.py": ("evaluate", f"{EVALUATE} --after dpo_checkpoints/mini", ["python dpo.py --preset mini"]),
    "a function that returns nan": ("ppo", f"{PPO_16} --reward {{nan}}:f", ["score", "nan"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory, gpt2_folder, bert_folder, judge_folder, tokenizer):
    """The paths for the braces in the flags of CASES."""
    folder = tmp_path_factory.mktemp("inputs")
    generic, hollow, long = (folder / name for name in ("generic", "hollow", "long"))
    write_bert(generic, ("LABEL_0", "LABEL_1"))
    hollow.mkdir()
    (hollow / "config.json").write_text((gpt2_folder / "config.json").read_text())
    hf_gpt2(len(tokenizer), n_positions=256, n_embd=8).float().save_pretrained(long)
    tokenizer.save_pretrained(long)
    tuned = shutil.copytree(gpt2_folder, folder / "tuned")
    unfinished = shutil.copytree(gpt2_folder, folder / "unfinished")
    (unfinished / "checkpoints").mkdir()
    (tuned / "results.json").write_text('{"perplexity": 30.0}')  # like those of finetune_gpt2.py
    evaluated = shutil.copytree(gpt2_folder, folder / "evaluated")
    (evaluated / "viewer.json").write_text("{}")
    (folder / "empty.csv").write_text("text,label\n")
    functions = (
        "def f(texts):\n    return [float('nan')] * len(texts)\n\n\ndef length(texts):\n    return [*map(len, texts)]"
    )
    (folder / "nan.py").write_text(functions)
    return dict(
        gpt2=gpt2_folder, bert=bert_folder, csv=reviews_csv(folder / "toy.csv"), empty=folder / "empty.csv",
        generic=generic, hollow=hollow, long=long, tuned=tuned, nan=folder / "nan.py", evaluated=evaluated,
        unfinished=unfinished,
        judge=judge_folder,
    )  # fmt: skip


def check(status, error, parts):
    """Check that stderr is one line with these parts; return True."""
    lines = [line for line in error.splitlines() if line]
    assert status == 2
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    assert all(part in lines[0] for part in parts), lines[0]
    return True


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """A function that runs a script's main in an empty folder; it returns (exit status, stderr, seconds)."""
    monkeypatch.chdir(tmp_path)

    def start(name, flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.split()])
        capsys.readouterr()
        begin = time.time()
        with pytest.raises(SystemExit) as stop:
            cli.run(importlib.import_module(name).main, CONFIGS[name])
        return stop.value.code, capsys.readouterr().err, time.time() - begin

    return start


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_reported_in_one_line_and_nothing_is_written(case, script, paths, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    name, flags, parts = CASES[case]
    status, error, _ = script(name, flags.format(**paths))
    check(status, error, parts)
    assert [*tmp_path.iterdir()] == []


def test_a_folder_with_a_run_of_another_config_does_not_change(script, paths, tmp_path):
    """The message lists the fields that differ, and the flags that help."""
    (tmp_path / "out").mkdir()
    flags, file = PPO.format(**paths), tmp_path / "out" / "run_config.json"
    saved = json.dumps({**vars(cli.parse(PPOConfig, flags.split())), "steps": 3})
    file.write_text(saved)
    status, error, _ = script("ppo", flags)
    check(status, error, ["(steps 3 -> 40)", "--force", "--out"])
    assert list((tmp_path / "out").iterdir()) == [file]
    assert file.read_text() == saved


@pytest.mark.parametrize("case", ["model on the hub", "dataset on the hub"])
def test_without_a_network_scripts_end_within_five_seconds(case, script, paths):
    """Detects retries of libraries."""
    name, flags, parts = CASES[case]
    status, error, seconds = script(name, flags.format(**paths))
    check(status, error, parts)
    assert seconds < 5


@pytest.mark.parametrize("case", ["no fine-tuned model", "labels without names"])
def test_a_process_prints_only_the_error_on_stderr(case, paths, tmp_path):
    """Detects output of the libraries' loggers and progress bars."""
    name, flags, parts = CASES[case]
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags.format(**paths).split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert check(done.returncode, done.stderr, parts)


def test_a_run_that_is_finished_ends_without_an_error(monkeypatch, capsys):
    """Exit status 0, so that a chain of commands continues with the next one."""
    monkeypatch.setattr(sys, "argv", ["ppo.py"])
    assert cli.run(Mock(side_effect=Finished("out contains a finished run\nwritten:")), PPOConfig) is None
    assert capsys.readouterr() == ("out contains a finished run\nwritten:\n", "")


def test_other_exceptions_have_a_traceback_but_ctrl_c_has_none(monkeypatch, capsys):
    """They are bugs, and without a traceback nobody would find them."""
    monkeypatch.setattr(sys, "argv", ["ppo.py"])

    with pytest.raises(ZeroDivisionError):
        cli.run(Mock(side_effect=ZeroDivisionError), PPOConfig)
    with pytest.raises(SystemExit) as stop:
        cli.run(Mock(side_effect=KeyboardInterrupt), PPOConfig)
    assert stop.value.code == 130
    assert "Traceback" not in capsys.readouterr().err
