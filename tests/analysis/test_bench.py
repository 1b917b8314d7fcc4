"""The benchmark: its phases, times and FLOPs."""

import json
import warnings
from dataclasses import replace

import peers
import pytest
import torch
import trl_learning
from torch.utils._python_dispatch import _disable_current_modes

import ppo
from analysis import bench
from analysis.bench import WORKS, flops, host_waits, main
from config import BenchConfig
from model import GPT2


@pytest.fixture
def small(monkeypatch, gpt2_folder, bert_folder):
    """Preset mini on tiny models: 4 episodes of 3 + 6 tokens, 2 epochs of 2 minibatches."""
    sizes = dict(batch_size=4, minibatch_size=2, micro_batch_size=2, min_prompt_len=3, max_prompt_len=3, response_len=6)
    monkeypatch.setitem(WORKS, "mini", replace(WORKS["mini"], **sizes))
    monkeypatch.setattr(bench, "MINI", replace(bench.MINI, policy=str(gpt2_folder), reward=str(bert_folder)))
    monkeypatch.setattr(bench, "peak_flops", lambda device, dtype: 2e9 if dtype == torch.float32 else 1e9)


def test_each_phase_is_timed_as_often_as_configured_and_its_flops_are_counted(small, capsys):
    main(BenchConfig(preset="mini", repeats=2, json=True, device="cpu"))
    phases = json.loads(capsys.readouterr().out.splitlines()[-1])["phases"]
    assert list(phases) == ["generate", "score", "logprobs", "reference", "update", "step"]
    assert all(len(phase["seconds"]) == 2 and phase["flops"] > 0 for phase in phases.values())
    assert phases["step"]["flops"] == sum(phase["flops"] for name, phase in phases.items() if name != "step")
    assert phases["logprobs"]["flops"] == phases["reference"]["flops"]


def test_the_update_costs_three_forward_passes_per_epoch(small, capsys):
    """A backward pass costs two. Catches logits at the positions of the prompt, and a second transformer for values."""
    main(BenchConfig(preset="mini", repeats=1, json=True, device="cpu"))
    phases = json.loads(capsys.readouterr().out.splitlines()[-1])["phases"]
    assert phases["update"]["flops"] == pytest.approx(2 * 3 * phases["logprobs"]["flops"], rel=0.02)


def test_the_table_has_a_row_for_each_phase_and_the_share_of_the_peak(small, capsys):
    main(BenchConfig(preset="mini", repeats=2, device="cpu"))
    table = capsys.readouterr().out
    for phase in ("generate", "score", "logprobs", "reference", "update", "step"):
        assert f"  {phase} " in table
    assert all(words in table for words in ("of the peak", "tokens/s", "at most", "in float32"))


@pytest.mark.parametrize("dtype, low", [("fp32", []), ("bf16", ["bfloat16"]), ("fp16", ["float16"])])
def test_the_peak_is_that_of_the_faster_dtype(small, capsys, dtype, low):
    """Logits are always in fp32. On many CPUs bf16 is slower, so a share of its peak could exceed 1."""
    main(BenchConfig(preset="mini", repeats=2, json=True, device="cpu", dtype=dtype))
    output = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert output["dtypes"] == ["float32", *low] and output["peak_flops"] == [2e9, 2e9]


def test_times_are_in_milliseconds(small, monkeypatch, capsys):
    """On a GPU most phases take a few hundredths of a second."""
    phase = {"seconds": [0.0123, 0.0125, 0.5], "flops": 5e6, "host_waits": 3}
    machine = dict(device="cpu", dtypes=["float32"], peak_flops=[1e9], peak_memory_gb=1.0)
    monkeypatch.setattr(bench, "measure", lambda *_: ({"generate": phase}, machine))
    main(BenchConfig(preset="mini", device="cpu"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ms", "min", "max", "TFLOP", "of", "the", "peak", "host", "waits"] in rows
    assert ["generate", "12.5", "12.3", "500.0", "0.000", "0.40", "3"] in rows


def test_generate_has_the_flops_of_its_forward_passes(small, monkeypatch):
    """Also if its decoding steps are CUDA graphs, which the counter cannot see."""
    calls = {}
    monkeypatch.setattr(bench, "flops", lambda function, *args: calls.setdefault(function, args) and 1)
    main(BenchConfig(preset="mini", repeats=1, json=True, device="cpu"))
    generate = next(function for function in calls if getattr(function, "__func__", None) is GPT2.generate)
    decode = bench.cached_logprobs
    assert flops(generate, *calls[generate]) == flops(decode, *calls[decode]) > 0


def test_host_waits_are_the_warnings_of_pytorch_by_their_place(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait(times):
        for _ in range(times):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    ((place, count),) = host_waits(wait, 3).items()
    assert place.startswith("test_bench.py:") and count == 3
    assert modes == ["warn", "default"]
    with pytest.raises(ZeroDivisionError):
        host_waits(lambda: 1 / 0)
    assert modes[2:] == ["warn", "default"]


def test_host_waits_are_not_counted_on_a_cpu(small, capsys):
    main(BenchConfig(preset="mini", repeats=1, json=True, device="cpu"))
    phases = json.loads(capsys.readouterr().out.splitlines()[-1])["phases"]
    assert {phase["host_waits"] for phase in phases.values()} == {None}


def test_compiled_passes_are_timed_and_have_the_flops_of_eager_ones(small, monkeypatch, capsys):
    """The counter cannot see inside compiled code: its FLOPs would be missing if torch did not run it eagerly."""
    torch._dynamo.reset()
    compile, compiled = torch.compile, []

    def invisible(graph, inputs):
        def run(*args):
            with _disable_current_modes():  # as in the kernels of a compiler
                return graph(*args)

        return run

    def without_compiler(function, **options):
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
        assert compiled == (["_call_impl", "_call_impl"] if switch else [])
        assert set(flags) == {switch}  # rollout uses the compiled graph of update
        flags.clear()
    eager, later = ({name: phase["flops"] for name, phase in run.items()} for run in phases)
    assert all(eager[name] == later[name] for name in ("score", "logprobs", "reference", "update"))


def test_the_peers_time_the_same_work():
    for name, work in (("124M", WORKS["gpt2"]), ("mini", WORKS["mini"])):
        sizes = {
            field: getattr(work, field) for field in ("batch_size", "minibatch_size", "ppo_epochs", "response_len")
        }
        assert peers.STEPS[name] == sizes | {"prompt_len": work.min_prompt_len}
        assert work.min_prompt_len == work.max_prompt_len


def test_the_flops_of_a_product_are_two_per_multiplication():
    assert flops(torch.matmul, torch.ones(3, 5), torch.ones(5, 7)) == 2 * 3 * 5 * 7


def test_the_time_to_a_share_is_at_the_end_of_the_first_three_rollouts_with_that_mean_without_the_judge():
    """A single rollout above the share does not count, nor does the time that the judge took until then."""
    shares = [0.5, 0.9, 0.8, 0.84, 0.86, 0.85, 0.9]
    log = [
        {"positive_by_judge": share, "seconds": 10.0 * (i + 1), "seconds_judge": 1.0} for i, share in enumerate(shares)
    ]
    assert trl_learning.seconds(log) == [9.0, 18.0, 27.0, 36.0, 45.0, 54.0, 63.0]
    assert trl_learning.seconds_to_share(log) == 54.0  # means of three: .73, .847, .833, .85, .87
    assert trl_learning.seconds_to_share(log[:5]) is None
