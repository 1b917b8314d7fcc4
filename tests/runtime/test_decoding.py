"""Decoding with a static cache, as far as a CPU can test it: all but the capture of CUDA graphs."""

import gc
import weakref
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import GPT2, GPT2Config, KVCache, Policy
from runtime import decoding
from runtime.decoding import DECODERS, Step, decoder
from runtime.device import random_generator


@pytest.fixture
def static(monkeypatch):
    """Decode with static caches on the CPU, where each step runs its kernels one by one."""
    monkeypatch.setattr(model, "uses_graphs", lambda device: True)


def small_gpt2(**changes):
    """Return a GPT-2 whose weights are larger than initial ones, so that tokens depend on their context."""
    torch.manual_seed(0)
    shape = dict(vocab_size=50, n_positions=80, n_embd=32, n_layer=3, n_head=4)
    gpt2 = GPT2(GPT2Config(**shape), **changes).init_weights()
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter *= 3
    return gpt2


def random_ids(rows, length):
    return torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(length))


def generate(gpt2, prompts, new_tokens, eos_id=0, temperature=1.0):
    return gpt2.generate(prompts, new_tokens, temperature, eos_id, random_generator("cpu", new_tokens))


def prefilled(gpt2, ids, length):
    """Return a KVCache of `length` places that has ids (B, L)."""
    cache = KVCache(gpt2.config, len(ids), length)
    gpt2.trunk(ids, cache)
    return cache


def test_graphs_are_used_on_cuda_only():
    used = {name: decoding.uses_graphs(torch.device(name)) for name in ("cuda:1", "cpu", "mps")}
    assert used == {"cuda:1": True, "cpu": False, "mps": False}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_static_steps_generate_the_same_responses(monkeypatch, temperature):
    """With the same random numbers, for prompts of several lengths, with a cache that held longer responses before, and
    weights that changed in place. Fails if the mask is off by one, or if the position is not advanced."""
    gpt2, ended = small_gpt2(), 0
    for prompt_len, new_tokens in ((5, 26), (1, 30), (7, 11), (5, 1), (20, 40)):
        prompts, sequences = random_ids(8, prompt_len), []
        gpt2.wte.weight.data *= 1.1
        for graphs in (False, True):
            monkeypatch.setattr(model, "uses_graphs", lambda device, graphs=graphs: graphs)
            sequences.append(generate(gpt2, prompts, new_tokens, 0, temperature))
        assert torch.equal(*sequences)
        ended += (sequences[0][:, prompt_len:] == 0).any(1).sum()
    assert 0 < ended < 40  # some rows end and some do not
    assert [key[:2] for key in decoder(gpt2).steps] == [(8, 32), (8, 64)]


@pytest.mark.parametrize("length", [9, 33])  # 32 is the smallest static cache
@torch.no_grad()
def test_a_static_step_gives_the_logits_of_a_full_forward(length, monkeypatch):
    """Up to the last place of the cache. Logits are compared, since sampled ids can hide a small difference."""
    gpt2, ids, start, logits, compute = small_gpt2().double(), random_ids(3, length), length - 5, [], GPT2.logits
    expected = gpt2(ids)[:, start:]
    step = decoder(gpt2).start(prefilled(gpt2, ids[:, :start], length), ids[:, start : start + 1], 1.0, 0)
    monkeypatch.setattr(GPT2, "logits", lambda gpt2, hidden: logits.append(compute(gpt2, hidden)) or logits[-1])
    for t in range(start, length):
        step.new.copy_(ids[:, t : t + 1])
        step(None)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-9, rtol=0)


def test_every_token_after_the_first_is_decoded_by_a_static_step(static, monkeypatch):
    calls, call = [], Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, generator: calls.append(1) or call(self, generator))
    generate(small_gpt2(), random_ids(3, 4), 6, -1)
    assert len(calls) == 5


def test_nan_values_left_in_the_static_cache_do_not_change_later_responses(static):
    """A masked position has weight 0 in attention, and 0 * nan is nan."""
    gpt2, prompts, responses = small_gpt2(), random_ids(4, 5), []
    for _ in range(2):
        responses.append(generate(gpt2, prompts, 9))
        for step in decoder(gpt2).steps.values():
            step.cache.buffer.fill_(torch.nan)
    assert torch.equal(*responses)


def test_steps_use_the_device_of_the_weights(static):
    """With another default device: tensors on the meta device have no data."""
    gpt2, prompts = small_gpt2(), random_ids(3, 4)
    expected = generate(gpt2, prompts, 12)
    DECODERS.clear()
    with torch.device("meta"):
        assert torch.equal(gpt2.generate(prompts, 12, 1.0, 0, random_generator("cpu", 12)), expected)


# ---- low-precision copies of the weights


class Casts(TorchDispatchMode):
    """The number of conversions of tensors with one of these shapes to bf16 in the block."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.count += result.shape in self.shapes
        return result


def test_weights_are_converted_to_bf16_once_per_call_of_generate(static):
    """Outside of the steps, only the prompt's forward pass does so: 4 matrices per layer."""
    gpt2, prompts = small_gpt2(dtype=torch.bfloat16), random_ids(10, 5)
    generate(gpt2, prompts, 9)
    with Casts({parameter.shape for parameter in gpt2.h.parameters() if parameter.dim() == 2}) as casts:
        generate(gpt2, prompts, 9)
    assert casts.count == 3 * 4


@torch.no_grad()
def test_a_step_with_bf16_copies_equals_one_under_autocast_after_each_update_of_the_weights():
    """Bit by bit. Fails if the copies keep the weights of an earlier call, or if they are shared with the model."""
    gpt2, ids, hidden = small_gpt2(dtype=torch.bfloat16), random_ids(4, 6), []
    for _ in range(2):
        for parameter in gpt2.parameters():
            parameter *= 1.1
        for low in (True, False):
            step = decoder(gpt2).start(prefilled(gpt2, ids[:, :5], 9), ids[:, 5:], 1.0, 0)
            hidden.append((step.gpt2 if low else gpt2).hidden(step.new, step.cache.position, step.cache))
        assert torch.equal(*hidden[-2:])
    assert not torch.equal(hidden[0], hidden[2])
    assert {parameter.dtype for parameter in gpt2.parameters()} == {torch.float32}
    assert step.gpt2.wte.weight is gpt2.wte.weight


def test_a_copy_of_a_model_has_its_own_decoder_and_a_deleted_model_has_none(static):
    policy = Policy(small_gpt2())
    generate(policy.gpt2, random_ids(2, 3), 5)
    copied, count = deepcopy(policy), len(DECODERS)
    assert copied.gpt2 not in DECODERS
    with torch.no_grad():
        copied.gpt2.wte.weight.zero_()
    assert generate(policy.gpt2, random_ids(2, 3), 5).ne(generate(copied.gpt2, random_ids(2, 3), 5)).any()
    reference = weakref.ref(policy.gpt2)
    del policy
    gc.collect()
    assert reference() is None and len(DECODERS) == count


# ---- capture


@pytest.fixture
def launches(monkeypatch, static):
    """A list of what each step does: "kernels", "capture" or "replay". Capturing runs no kernels, as on a GPU."""
    done, decode = [], Step.decode

    class Graph:
        def replay(self):
            done.append("replay")
            decode(self.step)

    @contextmanager
    def capture(graph, **options):
        with monkeypatch.context() as patch:
            patch.setattr(Step, "decode", lambda step: done.append("capture") or setattr(graph, "step", step))
            yield

    initialize = Step.__init__

    def on_gpu(step, *args):
        initialize(step, *args)
        step.capturable = True

    monkeypatch.setattr(Step, "decode", lambda step: done.append("kernels") or decode(step))
    monkeypatch.setattr(Step, "__init__", on_gpu)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return done


def test_a_step_is_captured_in_its_second_call_and_replayed_from_then_on(launches, capsys):
    gpt2, prompts = small_gpt2(), random_ids(4, 5)
    first = generate(gpt2, prompts, 6, -1)
    assert launches == ["kernels", "capture", "replay", "replay", "replay", "replay"]
    launches.clear()
    assert torch.equal(generate(gpt2, prompts, 6, -1), first)
    assert launches == ["replay"] * 5
    assert not capsys.readouterr().err


def test_if_the_capture_fails_there_is_one_warning_and_the_same_responses(launches, monkeypatch, capsys):
    gpt2, prompts = small_gpt2(), random_ids(4, 5)
    first = generate(gpt2, prompts, 6, -1)
    DECODERS.clear()
    launches.clear()

    @contextmanager
    def fail(graph, **options):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")

    capture = torch.cuda.graph

    @contextmanager
    def failing(graph, **options):
        with capture(graph, **options), fail(graph):
            yield

    ended = []
    monkeypatch.setattr(torch.cuda, "graph", failing)
    monkeypatch.setattr(decoding, "end_failed_capture", ended.append)
    for _ in range(2):
        assert torch.equal(generate(gpt2, prompts, 6, -1), first)
    assert launches == ["kernels", "capture"] + ["kernels"] * 9 and ended == [prompts.device]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no CUDA graph") and line.endswith("not permitted when stream is capturing")
