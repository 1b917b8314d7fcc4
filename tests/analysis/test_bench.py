"""bench.py: its phases, and FLOPs that are those of the formulas."""

import json
from dataclasses import replace
from functools import partial

import peers
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import BertConfig

import ppo
from analysis import bench
from analysis.bench import GROWTH, WORKS, flops, main
from config import BenchConfig
from model import GPT2Config


@pytest.fixture
def small(monkeypatch, gpt2_folder, bert_folder):
    """Preset mini on tiny models: 4 episodes of 3 + 6 tokens, 2 epochs of 2 minibatches."""
    sizes = dict(batch_size=4, minibatch_size=2, micro_batch_size=2, min_prompt_len=3, max_prompt_len=3, response_len=6)
    monkeypatch.setitem(WORKS, "mini", replace(WORKS["mini"], **sizes))
    monkeypatch.setattr(bench, "MINI", {"policy": str(gpt2_folder), "reward": str(bert_folder)})
    monkeypatch.setattr(bench, "peak_flops", lambda device, dtype: 2e9 if dtype == torch.float32 else 1e9)


def test_a_phase_is_timed_as_often_as_told_and_counted(small, capsys):
    main(BenchConfig(preset="mini", repeats=2, json=True, device="cpu"))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    phases = told["phases"]
    assert list(phases) == ["generate", "score", "logprobs", "reference", "update", "step"]
    assert all(len(phase["seconds"]) == 2 and phase["flops"] > 0 for phase in phases.values())
    assert phases["step"]["flops"] == sum(phase["flops"] for name, phase in phases.items() if name != "step")
    assert phases["logprobs"]["flops"] == phases["reference"]["flops"]


def test_the_update_costs_three_forwards_for_each_epoch(small, capsys):
    """A backward pass is two: what a vocabulary at the prompt's positions or a second trunk would add shows here."""
    main(BenchConfig(preset="mini", repeats=1, json=True, device="cpu"))
    phases = json.loads(capsys.readouterr().out.splitlines()[-1])["phases"]
    assert phases["update"]["flops"] == pytest.approx(2 * 3 * phases["logprobs"]["flops"], rel=0.02)


def test_the_table_has_a_row_for_each_phase_and_the_share_of_the_peak(small, capsys):
    main(BenchConfig(preset="mini", repeats=2, device="cpu"))
    said = capsys.readouterr().out
    for word in (
        "generate",
        "score",
        "logprobs",
        "reference",
        "update",
        "step",
        "of the peak",
        "tokens/s",
        "GB at most",
        "in float32",
    ):
        assert word in said


@pytest.mark.parametrize("dtype, dtypes", [("fp32", ["float32"]), ("bf16", ["float32", "bfloat16"])])
def test_the_peak_is_that_of_the_faster_dtype_in_which_a_phase_computes(small, capsys, dtype, dtypes):
    """A bf16 run scores texts in fp32, which many CPUs compute faster: a share of the bf16 peak could exceed 1."""
    main(BenchConfig(preset="mini", repeats=2, json=True, device="cpu", dtype=dtype))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["dtypes"] == dtypes and found["peak_flops"] == [2e9, 2e9]


def test_times_are_in_milliseconds(small, monkeypatch, capsys):
    """On a GPU most phases take a few hundredths of a second."""
    phase = {"seconds": [0.0123, 0.0125, 0.5], "flops": 5e6}
    machine = dict(device="cpu", dtypes=["float32"], peak_flops=[1e9], peak_memory_gb=1.0)
    monkeypatch.setattr(bench, "measure", lambda *_: ({"generate": phase}, machine))
    main(BenchConfig(preset="mini", device="cpu"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ms", "min", "max", "TFLOP", "of", "the", "peak"] in rows
    assert ["generate", "12.5", "12.3", "500.0", "0.000", "0.40"] in rows


def test_compiled_passes_are_timed_and_their_flops_are_those_of_eager_ones(small, monkeypatch, capsys):
    """The counter does not see into compiled code: its FLOPs would be missing if torch ran it then."""
    torch._dynamo.reset()
    compile, compiled = torch.compile, []

    def invisible(graph, inputs):
        def run(*args):
            with _disable_current_modes():  # as a compiler's kernels
                return graph(*args)

        return run

    def without_compiler(function, **how):
        compiled.append(function.__name__)
        return compile(function, backend=invisible)

    def rollout(*args):
        flags.append(args[6].compile)
        return ppo.rollout(*args)

    monkeypatch.setattr(torch, "compile", without_compiler)
    monkeypatch.setattr(bench, "rollout", rollout)
    phases, flags = [], []
    for switch in (False, True):
        main(BenchConfig(preset="mini", repeats=1, compile=switch, json=True, device="cpu"))
        phases.append(json.loads(capsys.readouterr().out.splitlines()[-1])["phases"])
        assert compiled == (["_call_impl", "_call_impl", "static_step"] if switch else [])
        assert set(flags) == {switch}  # of rollout: it uses the compiled graph of the update
        flags.clear()
    eager, later = ({name: phase["flops"] for name, phase in found.items()} for found in phases)
    assert all(eager[name] == later[name] for name in ("score", "logprobs", "reference", "update"))


def test_the_others_do_the_work_that_is_ours():
    for name, work in (("124M", WORKS["gpt2"]), ("mini", WORKS["mini"])):
        sizes = {
            field: getattr(work, field) for field in ("batch_size", "minibatch_size", "ppo_epochs", "response_len")
        }
        assert peers.STEPS[name] == sizes | {"prompt_len": work.min_prompt_len}
        assert work.min_prompt_len == work.max_prompt_len


def test_growth_is_shown_for_every_size(small, monkeypatch, capsys):
    tiny = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=1)
    monkeypatch.setitem(bench.SIZES, "gpt2", tiny)
    monkeypatch.setitem(bench.SIZES, "gpt2-medium", tiny)
    monkeypatch.setattr("transformers.BertConfig", partial(BertConfig, hidden_size=16, num_attention_heads=1))
    values = {"batch_size": (2, 8), "response_len": (4, 6), "model": GROWTH["model"][2]}
    smaller = {axis: (*work[:2], values[axis]) for axis, work in GROWTH.items()}
    monkeypatch.setattr(bench, "GROWTH", smaller)
    main(BenchConfig(growth=True, repeats=1, device="cpu"))
    said = capsys.readouterr().out
    assert all(f"a PPO step against {axis}" in said for axis in GROWTH)
    rows = [line.split()[0] for line in said.splitlines() if line[-1:].isdigit()]
    assert rows == ["2", "8", "4", "6", "mini", "gpt2", "gpt2-medium"]


def test_flops_are_two_for_each_number_of_a_product_and_its_inner_length():
    assert flops(torch.matmul, torch.ones(3, 5), torch.ones(5, 7)) == 2 * 3 * 5 * 7
