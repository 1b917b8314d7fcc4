"""The self-check of a policy passes for a correct one and refuses typical mistakes."""

import math
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, message
from test_model import CLOSE, random_ids, small_policy

from config import PPOConfig
from model import GPT2, Policy
from runtime import self_check
from runtime.device import random_generator
from runtime.errors import BadInput
from runtime.hub import load_policy, open_gpt2
from runtime.self_check import ROUNDING, cached_logprobs, check_policy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cached_logprobs_equal_those_of_the_policy(temperature):
    policy, ids = small_policy(), random_ids(3, 20)
    cached = cached_logprobs(policy, ids, 4, temperature)
    assert cached.shape == (3, 16)
    torch.testing.assert_close(cached, policy(ids, 4, temperature)[0], **CLOSE)


def test_cached_logprobs_equal_those_of_the_policy_for_responses_of_different_lengths():
    policy = small_policy()
    sequences = policy.gpt2.generate(random_ids(8, 3), 20, 1.0, eos_id=0, generator=random_generator("cpu", 0))
    lengths = (sequences[:, 3:] != 0).sum(1)
    assert lengths.min() < lengths.max()
    torch.testing.assert_close(cached_logprobs(policy, sequences, 3), policy(sequences, 3)[0], **CLOSE)


@pytest.fixture
def check_args():
    """A policy, a copy of it, prompts, and a config with a temperature other than 1."""
    policy = small_policy()
    return policy, deepcopy(policy), random_ids(4, 4), PPOConfig(response_len=12, temperature=0.7)


def assert_refused(check_args, name):
    largest, mean = ROUNDING[check_args[0].gpt2.dtype]
    expected = f"self-check: {name} is off by .* rounding explains at most {largest} and {mean}$"
    with pytest.raises(BadInput, match=expected):
        check_policy(*check_args)


def test_the_self_check_passes_for_a_policy_and_its_copy(check_args):
    names, number = ("log ratio", "KL", "KV cache"), r"\d[\d.e-]*"
    line = "; ".join(rf"\|{name}\| at most {number}, mean {number}" for name in names)
    assert re.fullmatch(f"{line} nats", check_policy(*check_args))


def test_the_self_check_samples_responses_of_full_length_that_depend_on_the_seed_only(monkeypatch):
    """No id ends a response, and the global random state does not change."""
    inputs, forward = [], Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, ids, *args: inputs.append(ids) or forward(self, ids, *args))
    policy, cfg = small_policy(vocab_size=3), PPOConfig(response_len=16)
    before = torch.get_rng_state()
    for seed in (0, 0, 1):
        check_policy(policy, deepcopy(policy), random_ids(8, 4, 3), replace(cfg, seed=seed))
    assert torch.equal(torch.get_rng_state(), before)
    first, same_seed, other_seed = inputs[::3]
    assert torch.equal(first, same_seed) and not torch.equal(first, other_seed)
    tokens, next_tokens = first[:, 4:-1], first[:, 5:]
    assert all((next_tokens[tokens == id] != id).any() for id in range(3))


def test_the_self_check_refuses_a_reference_that_is_not_the_policy(check_args):
    with torch.no_grad():
        check_args[1].gpt2.wte.weight[5] += 0.1
    assert_refused(check_args, "KL")


def test_the_self_check_refuses_a_reference_with_nan_weights(check_args):
    with torch.no_grad():
        check_args[1].gpt2.wte.weight[5] = math.nan
    assert_refused(check_args, "KL")


def test_the_self_check_refuses_dropout(check_args):
    check_args[0].gpt2.ln_f.register_forward_hook(lambda module, args, out: F.dropout(out, 0.1))
    assert_refused(check_args, "log ratio")


def test_the_self_check_refuses_a_trunk_that_ignores_the_cache(check_args, monkeypatch):
    trunk = GPT2.trunk
    monkeypatch.setattr(GPT2, "trunk", lambda self, ids, cache=None: trunk(self, ids))
    assert_refused(check_args, "KV cache")


def test_the_self_check_refuses_a_causal_mask_in_a_cached_step(check_args, monkeypatch):
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, attn_mask, is_causal: attention(q, k, v, is_causal=True)
    )
    assert_refused(check_args, "KV cache")


def test_the_self_check_refuses_a_temperature_in_the_cached_pass_only(check_args, monkeypatch):
    """The self-check uses the temperature of the config: at 1 it could not detect that the policy ignores it."""
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, ids, prompt_len, temperature: forward(self, ids, prompt_len))
    assert_refused(check_args, "KV cache")


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_self_check_bounds_the_largest_and_the_mean_error(check_args, monkeypatch, dtype):
    policy, ref_policy, prompts, cfg = check_args
    policy.float().gpt2.dtype = ref_policy.float().gpt2.dtype = dtype
    largest, mean = ROUNDING[dtype]
    for every_token, one_token, passes in (
        (0.5 * mean, 0.8 * largest, True),
        (1.1 * mean, 0.0, False),
        (0.0, 1.1 * largest, False),
    ):
        error = torch.full((len(prompts), cfg.response_len), every_token)
        error[0, 0] += one_token
        monkeypatch.setattr(self_check, "cached_logprobs", lambda policy, *args, error=error: policy(*args)[0] + error)
        check_policy(*check_args) if passes else assert_refused(check_args, "KV cache")


@pytest.fixture(scope="module")
def mini():
    return open_gpt2(str(ROOT / "asset" / "mini" / "gpt2"))


def check_mini(mini, dtype, seed=0):
    policy, cfg = load_policy(*mini, dtype), PPOConfig(response_len=40, seed=seed)
    return check_policy(policy, deepcopy(policy), random_ids(8, 5, 8000, seed), cfg)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_self_check_passes_on_the_mini_model_at_half_of_each_bound(mini, dtype, monkeypatch):
    monkeypatch.setitem(ROUNDING, dtype, tuple(bound / 2 for bound in ROUNDING[dtype]))
    for seed in range(3):
        assert "KV cache" in check_mini(mini, dtype, seed)


def positions_off_by_one(hidden):
    def wrong(self, ids, positions, cache):
        if cache and positions.start:
            positions = slice(positions.start + 1, positions.stop + 1)
        return hidden(self, ids, positions, cache)

    return wrong


def higher_temperature(forward):
    return lambda self, sequences, prompt_len, temperature=1.0: forward(self, sequences, prompt_len, 1.05 * temperature)


def not_causal(attention):
    def wrong(q, k, v, attn_mask, is_causal):
        return attention(q, k, v, attn_mask=attn_mask, is_causal=False)

    return wrong


def first_token_hidden(attention):
    """A cached step attends to all tokens except the first."""

    def wrong(q, k, v, attn_mask, is_causal):
        visible = slice(int(q.shape[2] == 1), None)
        return attention(q, k[:, :, visible], v[:, :, visible], attn_mask=attn_mask, is_causal=is_causal)

    return wrong


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "owner, name, mistake",
    [
        (GPT2, "hidden", positions_off_by_one),
        (Policy, "forward", higher_temperature),
        (F, "scaled_dot_product_attention", not_causal),
        (F, "scaled_dot_product_attention", first_token_hidden),
    ],
)
def test_the_self_check_distinguishes_typical_mistakes_from_rounding(mini, monkeypatch, owner, name, mistake, dtype):
    monkeypatch.setattr(owner, name, mistake(getattr(owner, name)))
    assert "self-check: KV cache is off by" in message(check_mini, mini, dtype)
