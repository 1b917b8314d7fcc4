"""Graphs of an update, without CUDA: a graph is replaced by the function that it would repeat."""

import copy
import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from config import PPOConfig
from model import GPT2, GPT2Config, Policy
from ppo import update
from runtime import passes
from runtime.device import random_generator
from runtime.monitor import Rollout
from runtime.optimizer import Stepper

CFG = PPOConfig(batch_size=8, minibatch_size=4, micro_batch_size=2, ppo_epochs=3, lr=1e-2)
SHAPE = GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2)


@pytest.fixture
def captures(monkeypatch):
    """Use graphs on the CPU; return a list with the pool of each capture.

    As with a graph, the outputs of all calls are in the same tensors, and the activations of autograd are used once.
    """
    pools = []

    def captured(pool, function):
        function()
        pools.append(pool)
        used = getattr(function, "func", function).__self__  # a Pass
        return partial(run_forward, used, function) if isinstance(function, partial) else partial(run_backward, used)

    @torch.enable_grad()  # in a Function there are no gradients; a graph repeats all kernels
    def run_forward(used, function):
        static = used.outputs
        function()
        used.live, used.outputs = used.outputs, static
        for output, new in zip(static, used.live):
            output.copy_(new.detach())

    @torch.enable_grad()
    def run_backward(used):
        static, used.outputs = used.outputs, used.live
        used.run_backward()
        used.outputs = static

    monkeypatch.setattr("model.uses_graphs", lambda device: True)
    monkeypatch.setattr(passes, "captured", captured)
    monkeypatch.setattr(passes, "new_pool", object)
    return pools


def small_policy(seed=0):
    torch.manual_seed(seed)
    return Policy(GPT2(SHAPE).init_weights()).double()


def data(length, seed=0, prompt_len=2):
    """Return a Rollout of 8 random sequences with responses of different lengths."""
    rng = torch.Generator().manual_seed(seed)
    new = length - prompt_len
    mask = torch.arange(new) < torch.randint(1, new + 1, (8, 1), generator=rng)
    logprobs, values, advantages, returns = torch.randn(4, 8, new, generator=rng, dtype=torch.float64)
    empty = dict.fromkeys(("kl", "scores", "objective", "positive_by_reward", "positive_by_judge", "ended"))
    sequences = torch.randint(0, 50, (8, length), generator=rng)
    return Rollout(
        sequences, prompt_len, mask, logprobs - 4, values, None, advantages, returns, **empty, texts=[], seconds={}
    )


def train(policy, cfg=CFG, lengths=(9, 6, 9)):
    """Update the policy with a rollout of each length; return its parameters and the metrics of the last update."""
    optimizer = torch.optim.Adam(policy.parameters(), cfg.lr, eps=1e-3)
    stepper = Stepper(policy, [optimizer], 1.0)
    for step, length in enumerate(lengths):
        metrics = update(policy, stepper, data(length, step), cfg, random_generator("cpu", step))
    del metrics["seconds_update"]
    return list(policy.parameters()), metrics


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_updates_by_graphs_equal_updates_without(monkeypatch, captures, micro_batch_size):
    """With two micro-batches per minibatch, whose gradients add up, and sequences of two shapes."""
    cfg = replace(CFG, micro_batch_size=micro_batch_size)
    replayed = train(small_policy(), cfg)
    assert len(captures) == 4 and len(set(captures)) == 1  # a forward and a backward pass per shape, in one pool
    monkeypatch.setattr("model.uses_graphs", lambda device: False)
    expected = train(small_policy(), cfg)
    assert all(map(torch.equal, replayed[0], expected[0])) and replayed[1] == expected[1]
    assert len(captures) == 4


def test_gradients_of_passes_with_and_without_a_graph_add_up(captures):
    """The first pass of a shape has no graph."""
    policy, other = small_policy(), small_policy()
    for length in (9, 6, 9, 9, 6, 9):
        sequences = torch.randint(0, 50, (4, length), generator=torch.Generator().manual_seed(length))
        for logprobs, values in (policy(sequences, 2), other.outputs(sequences, 2, 1.0)):
            (logprobs.sum() + (values**2).sum()).backward()
    assert len(captures) == 4
    for actual, expected in zip(policy.parameters(), other.parameters()):
        assert torch.allclose(actual.grad, expected.grad, rtol=1e-12, atol=1e-12)


def test_a_pass_without_gradients_has_no_graph(captures):
    policy, sequences = small_policy(), torch.ones(4, 9, dtype=torch.long)
    with torch.no_grad():
        results = [policy(sequences, 2) for _ in range(3)]
    assert not captures and torch.equal(results[0][0], results[2][0])


def test_each_prompt_length_and_temperature_has_its_own_graphs(captures):
    policy, sequences = small_policy(), torch.arange(36).view(4, 9)
    for how in ((2, 1.0), (3, 1.0), (2, 0.5)):
        for _ in range(3):
            assert torch.equal(policy(sequences, *how)[0], policy.outputs(sequences, *how)[0])
    assert len(captures) == 6


def test_a_backward_pass_after_another_forward_pass_raises(captures):
    """Its activations are gone."""
    policy, sequences = small_policy(), torch.ones(4, 9, dtype=torch.long)
    for length in (9, 6, 6):
        policy(sequences[:, :length], 2)
    first = policy(sequences, 2)[0]
    policy(sequences[:, :6], 2)
    with pytest.raises(RuntimeError, match="gone"):
        first.sum().backward()


def test_a_second_backward_pass_raises(captures):
    """As without graphs: the activations are gone."""
    policy, sequences = small_policy(), torch.ones(4, 9, dtype=torch.long)
    policy(sequences, 2)
    logprobs, values = policy(sequences, 2)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone"):
        values.sum().backward()


def test_outputs_are_not_overwritten_by_the_next_call(captures):
    policy, sequences = small_policy(), torch.arange(36).view(4, 9)
    policy(sequences, 2)
    first = policy(sequences, 2)[0]
    second = policy(sequences.flip(0), 2)[0]
    assert torch.equal(first, second.flip(0)) and not torch.equal(first, second)


def test_a_loss_without_the_values_trains_all_other_parameters(captures):
    """The first pass, without a graph, then gives the value head no gradient."""
    policy, other = small_policy(), small_policy()
    for length in (9, 9, 9):
        sequences = torch.arange(4 * length).view(4, length)
        for logprobs, _ in (policy(sequences, 2), other.outputs(sequences, 2, 1.0)):
            logprobs.sum().backward()
    for (name, actual), expected in zip(policy.named_parameters(), other.parameters()):
        if name.startswith("value_head"):
            assert expected.grad is None and not actual.grad.any()
        else:
            assert torch.allclose(actual.grad, expected.grad, rtol=1e-12, atol=1e-12)


def test_frozen_parameters_get_no_gradient_also_if_they_are_frozen_later(captures):
    policy, sequences = small_policy(), torch.arange(36).view(4, 9)
    policy.gpt2.wpe.requires_grad_(False)
    for frozen in ((policy.gpt2.wpe,), (policy.gpt2.wpe, policy.gpt2.h[0])):
        for _ in range(3):
            policy.zero_grad(set_to_none=True)
            sum(x.sum() for x in policy(sequences, 2)).backward()
        parts = [parameter for module in frozen for parameter in module.parameters()]
        assert all(parameter.grad is None for parameter in parts)
        assert policy.gpt2.h[1].mlp.c_fc.weight.grad.any()
        policy.gpt2.h[0].requires_grad_(False)
    assert len(captures) == 4


def test_if_a_pass_cannot_be_captured_updates_launch_kernels(monkeypatch, captures, capsys):
    def captured(pool, function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    ended = []
    monkeypatch.setattr(passes, "captured", captured)
    monkeypatch.setattr(passes, "end_failed_capture", ended.append)
    replayed = train(small_policy())
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        "warning: no CUDA graphs of an update, so it is slower: operation not permitted when stream is capturing"
    ]
    assert ended == [torch.device("cpu")]
    monkeypatch.setattr("model.uses_graphs", lambda device: False)
    assert all(map(torch.equal, replayed[0], train(small_policy())[0]))


def test_shapes_beyond_a_limit_have_no_graphs(monkeypatch, captures):
    monkeypatch.setattr(passes, "MAX_SHAPES", 2)
    policy, sequences = small_policy(), torch.arange(36).view(4, 9)
    for length in (9, 8, 7):
        for _ in range(3):
            assert torch.equal(policy(sequences[:, :length], 2)[0], policy.outputs(sequences[:, :length], 2, 1.0)[0])
    assert len(captures) == 4


def test_the_graphs_of_a_policy_are_freed_with_it_and_not_copied(captures, monkeypatch):
    policy, sequences = small_policy(), torch.ones(4, 9, dtype=torch.long)
    monkeypatch.setattr(passes, "captured", lambda pool, function: (function(), captures.append(pool), print)[2])
    for _ in range(2):
        policy(sequences, 2)
    held = weakref.ref(passes.passes(policy))
    assert captures and passes.passes(copy.deepcopy(policy)).passes == {}
    del policy
    gc.collect()
    assert held() is None
