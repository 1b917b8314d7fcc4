"""Test PPO's arithmetic against results computed by hand, then rollout, update and main with tiny random policies.

Row 0 of most examples ends at its third token. The tokens after the end of a response hold garbage on purpose.
"""

import copy
import gc
import importlib.util
import json
import math
import sys
import time
import types
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import reviews_csv, write_bert
from torch import nn, tensor
from torch._subclasses import FakeTensor

import data
import ppo
from analysis.metrics import perplexity
from analysis.responses import likelihoods
from config import PPOConfig
from data import load_splits, prompt_pool
from model import GPT2, GPT2Config, Policy, compile_passes
from ppo import (
    AdaptiveKL,
    Rollout,
    gae,
    group_advantages,
    ppo_loss,
    response_mask,
    rollout,
    token_rewards,
    update,
    whiten,
)
from reward import SentimentReward
from runtime import checkpoint
from runtime.checkpoint import latest_checkpoint, save_checkpoint
from runtime.device import DTYPES
from runtime.errors import BadInput, NotFinite
from runtime.hub import load_policy, open_gpt2
from runtime.log import RunLog, read_lines
from runtime.monitor import BestPolicy, rollout_metrics, sample
from runtime.optimizer import Stepper

EOS = 0
VOCAB = 12
TABLES = ("logprobs", "values", "advantages", "returns")  # fields of a Rollout that update reads at real tokens
SMALL = dict(batch_size=8, minibatch_size=4, micro_batch_size=2, response_len=6, min_prompt_len=3, max_prompt_len=3)


@pytest.fixture(autouse=True)
def float64():
    """Compute in float64, so that a tolerance of 1e-12 is enough for rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def double(values):
    return tensor(values, dtype=torch.float64)


def config(**changes):
    return PPOConfig(**(SMALL | changes))


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0, check_device=False)
    return True


class FakeTokenizer:
    """A tokenizer that decodes id 7 to "7" and skips <|endoftext|>."""

    eos_token_id = EOS

    def batch_decode(self, sequences, skip_special_tokens, clean_up_tokenization_spaces):
        # False, since None is the tokenizer's own default
        assert skip_special_tokens and clean_up_tokenization_spaces is False
        return [" ".join(str(i) for i in row if i != EOS) for row in sequences.tolist()]


def tiny_policy(seed=0, vocab_size=VOCAB, std=0.2, value_std=0.0):
    """Return a one-layer GPT-2 with random weights and biases; value_std: of the value head, which PPO starts at 0."""
    torch.manual_seed(seed)
    shape = GPT2Config(vocab_size=vocab_size, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    policy = Policy(GPT2(shape).init_weights())
    with torch.no_grad():
        for parameter in policy.gpt2.parameters():
            parameter.add_(std * torch.randn_like(parameter))
        for parameter in policy.value_head.parameters():
            parameter.add_(value_std * torch.randn_like(parameter))
    return policy


def moved_policy():
    """Return the policy of tiny_rollout with noise on its parameters, as if trained for some steps."""
    policy = tiny_policy(0, value_std=0.5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return policy


def count_sevens(texts):
    return tensor([float(text.split().count("7")) for text in texts])


def random_prompts():
    return torch.randint(1, VOCAB, (8, 3), generator=torch.Generator().manual_seed(5))


def tiny_rollout(cfg, policy=None, ref_policy=None, reward=count_sevens, prompts=None):
    """Return a rollout of a policy with values that differs from its reference; some responses end, some do not."""
    policy, ref_policy = policy or tiny_policy(0, value_std=0.5), ref_policy or tiny_policy(1)
    prompts, generator = random_prompts() if prompts is None else prompts, torch.Generator().manual_seed(1)
    return rollout(policy, ref_policy, FakeTokenizer(), reward, prompts, cfg.kl_coef, cfg, generator)


def sgd(policy, lr=0.1, grad_clip=1e9):
    """Return a stepper whose steps are linear in the gradient, so that equal parameters imply equal gradients."""
    return Stepper(policy, [torch.optim.SGD(policy.parameters(), lr)], grad_clip)


def parameters(model):
    """Return all parameters of a model in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- response_mask, token_rewards, whiten, gae


@pytest.mark.parametrize(
    "response, expected",
    [
        ([5, 6, EOS, EOS, EOS], [1, 1, 1, 0, 0]),
        ([5, 6, 7, 8, 9], [1, 1, 1, 1, 1]),
        ([EOS, EOS, EOS, EOS, EOS], [1, 0, 0, 0, 0]),
        ([5, EOS, 6, EOS, 7], [1, 1, 0, 0, 0]),
        ([5, 6, 7, 8, EOS], [1, 1, 1, 1, 1]),
    ],
)
def test_mask_keeps_the_first_eos_and_nothing_after_it(response, expected):
    """With `responses != eos`, ending a response has no gradient, and an empty response has no token."""
    assert response_mask(tensor([response]), EOS).int().tolist() == [expected]


LOGPROBS, REF_LOGPROBS = double([[-1, -2, -0.5, 7, 7]]), double([[-1.2, -1.5, -0.5, 0, 0]])
ENDS_AT_3 = tensor([[1, 1, 1, 0, 0]]).bool()


def test_score_lands_on_the_last_real_token_and_kl_on_every_one():
    """Not in the last column, not in the column after the end, and not scaled by the coefficient."""
    kl = LOGPROBS - REF_LOGPROBS
    assert close(token_rewards(tensor([2.0]), kl, ENDS_AT_3, 0.1), [[-0.02, 0.05, 2.0, 0, 0]])
    assert close(token_rewards(tensor([2.0]), kl[:, :3], ENDS_AT_3[:, :3], 0.1), [[-0.02, 0.05, 2.0]])


MASK = tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
REWARDS = double([[-0.1, 0.05, 2, 7, 7], [-0.02, -0.03, 0.01, 0.04, -1]])
VALUES = double([[0.5, 0.4, 0.3, 7, 7], [0.1, 0.2, 0.3, 0.4, 0.5]])
ADVANTAGES = [[1.2867, 1.5650, 1.7000, 0, 0], [-0.8560, -0.9852, -1.1107, -1.2850, -1.5000]]
RETURNS = [[1.7867, 1.9650, 2.0000, 0, 0], [-0.7560, -0.7852, -0.8107, -0.8850, -1.0000]]
WHITENED = [[1.0273, 1.2265, 1.3231, 0, 0], [-0.5067, -0.5993, -0.6891, -0.8139, -0.9678]]


def test_gae_gives_the_golden_numbers():
    """The first number is 1.9027 with unmasked values and 1.1108 with the score in the last column.

    The first number of row 1 is -.4487 if its last value is bootstrapped.
    """
    advantages, returns = gae(REWARDS, VALUES, MASK, 1.0, 0.95)
    assert close(advantages, ADVANTAGES, 5e-5) and close(returns, RETURNS, 5e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [token_rewards(double([2, 3]), x, MASK, 0.1)],
        lambda x: [whiten(x, MASK), whiten(x, MASK, shift_mean=False)],
        lambda x: [whiten(x[:1], MASK[:1] & (torch.arange(5) == 0))],
        lambda x: gae(x, VALUES, MASK, 0.9, 0.95),
        lambda x: gae(REWARDS, x, MASK, 0.9, 0.95),
    ],
)
def test_nan_after_the_end_of_a_response_reaches_no_result(function):
    """A product with the mask would keep the nan: nan times False is nan."""
    clean, dirty = function(REWARDS), function(REWARDS.masked_fill(~MASK, math.nan))
    assert all(torch.equal(a, b) and b.isfinite().all() for a, b in zip(clean, dirty))


GROUPS = double([1, 2, 6, 0, 0, 3])  # rewards of three responses to each of two prompts


def test_rloo_gives_the_golden_numbers():
    """1 - (2 + 6) / 2, 2 - (1 + 6) / 2, ...: with the mean of all three, results are too small by a third."""
    advantages = group_advantages(GROUPS, config(advantage="rloo", samples_per_prompt=3, batch_size=12))
    assert close(advantages, [-3, -1.5, 4.5, -1.5, -1.5, 3])


def test_grpo_gives_the_golden_numbers():
    """Means 3 and 1, unbiased standard deviations sqrt(7) and sqrt(3); the epsilon is 1e-4."""
    advantages = group_advantages(GROUPS, config(advantage="grpo", samples_per_prompt=3, batch_size=12))
    expected = [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, -1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5]
    assert close(advantages, expected, tolerance=1e-4) and advantages[:3].sum().abs() < 1e-12


def test_grpo_of_equal_rewards_is_zero_and_not_nan():
    assert close(group_advantages(double([2, 2]), config(advantage="grpo", samples_per_prompt=2)), [0, 0])


def test_grpo_does_not_amplify_rounding_differences():
    """Without the epsilon, the advantages of two scores that differ by float32 rounding are +-.7."""
    advantages = group_advantages(double([2, 2 + 1e-7]), config(advantage="grpo", samples_per_prompt=2))
    assert 0 < advantages[1] < 1e-3


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_every_token_of_a_response_has_the_advantage_of_its_total_reward(advantage):
    """Including the KL penalty: with the score alone, nothing limits the divergence. Values are not used."""
    cfg = config(advantage=advantage, samples_per_prompt=4, kl_coef=0.3)
    batch = tiny_rollout(cfg, moved_policy(), tiny_policy(value_std=3.0))
    rewards = batch.scores - cfg.kl_coef * batch.kl.sum(1)
    expected = group_advantages(rewards, cfg)[:, None] * batch.mask
    assert close(batch.returns, expected) and close(batch.advantages, whiten(expected, batch.mask))


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_without_gae_the_value_head_is_not_trained(advantage):
    policy = tiny_policy(value_std=0.5)
    before = copy.deepcopy(policy)
    cfg = config(advantage=advantage)
    update(policy, sgd(policy), tiny_rollout(cfg, policy), cfg)
    assert torch.equal(parameters(policy.value_head), parameters(before.value_head))
    assert not torch.equal(parameters(policy), parameters(before))


def test_whitening_uses_all_real_tokens_of_the_rollout():
    """The first number is 1.0982 with the population variance and -1.0939 if each row is whitened alone."""
    with_garbage = torch.where(MASK, double(ADVANTAGES), 7.0)
    assert close(whiten(with_garbage, MASK), WHITENED, 1e-4)


def test_whitening_rewards_keeps_their_mean_and_sets_padding_to_0():
    """The first number is .6325 with x / std; without masking the result, the padding is mean * (1 - 1 / std)."""
    x, mask = double([[1.0, 2, 3, 4, 5, 99]]), tensor([[1, 1, 1, 1, 1, 0]]).bool()
    assert close(whiten(x, mask, shift_mean=False), [[1.7351, 2.3675, 3, 3.6325, 4.2649, 0]], 5e-5)


def test_whitening_two_tokens_uses_the_unbiased_variance():
    """Catches a check that requires more than two tokens."""
    whitened = whiten(double([[1.0, 5.0, 99.0]]), tensor([[True, True, False]]))
    assert close(whitened, [[-(0.5**0.5), 0.5**0.5, 0.0]], 1e-8)


@pytest.mark.parametrize("x, mask", [([[3.0, 7.0]], [[1, 0]]), ([[3.0, 3.0]], [[1, 1]])])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_one_token_or_equal_tokens_is_finite(x, mask, shift_mean):
    mask = tensor(mask).bool()
    whitened = whiten(double(x), mask, shift_mean)
    assert whitened.isfinite().all() and not whitened[~mask].any()


# ---- ppo_loss, AdaptiveKL


def loss_of(logprobs=0.0, values=0.0, old_logprobs=0.0, old_values=0.0, advantages=0.0, returns=0.0, **changes):
    """Call ppo_loss with scalars or lists of N; return (loss, metrics, gradient of logprobs, gradient of values)."""
    arguments = (logprobs, values, old_logprobs, old_values, advantages, returns)
    tensors = torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in arguments))
    logprobs, values, *rest = (x.clone() for x in tensors)
    logprobs.requires_grad_(), values.requires_grad_()
    loss, metrics = ppo_loss(logprobs, values, *rest, config(**changes))
    loss.backward()
    return loss.item(), metrics, logprobs.grad, values.grad


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope", [(0.7, 1, -0.7, -1), (0.7, -1, 0.8, 0), (1.5, 1, -1.2, 0), (1.5, -1, 1.5, 1)]
)
def test_clipped_surrogate_is_pessimistic_on_both_sides(ratio, advantage, loss, slope):
    """slope: d loss / d ratio, at a ratio below and above the clip range, for both signs of the advantage."""
    actual, metrics, grad, _ = loss_of(math.log(ratio), advantages=advantage)
    assert actual == pytest.approx(loss) and metrics["pg_loss"].item() == pytest.approx(loss)
    assert grad.item() == pytest.approx(slope * ratio)


@pytest.mark.parametrize("value, target, loss, slope", [(0.5, 1, 0.32, 0), (0.5, 0, 0.125, 0.5), (0.1, 1, 0.405, -0.9)])
def test_value_loss_clips_around_the_old_value_and_takes_the_larger_error(value, target, loss, slope):
    """The factors vf_coef and one half each occur once in the gradient of the total loss."""
    total, metrics, _, grad = loss_of(values=value, returns=target, vf_coef=0.1)
    assert metrics["vf_loss"].item() == pytest.approx(loss) and total == pytest.approx(0.1 * loss)
    assert grad.item() == pytest.approx(0.1 * slope)


def test_first_gradient_is_the_vanilla_policy_gradient():
    advantages = tensor([1.0, -2.0, 3.0, 0.5])
    assert close(loss_of([-1, -2, -3, -4], old_logprobs=[-1, -2, -3, -4], advantages=advantages)[2], -advantages / 4)


def test_policy_loss_has_no_gradient_for_values_and_value_loss_none_for_logprobs():
    _, _, grad, value_grad = loss_of([0.1, -0.1], [1.0, 2.0], advantages=[1.0, -2.0], returns=3.0, vf_coef=0.0)
    assert grad.all() and not value_grad.any()
    assert not loss_of([0.1, -0.1], [1.0, 2.0], returns=3.0)[2].any()


def test_clip_metrics_are_fractions_of_tokens_without_gradient():
    ratios = tensor([0.7, 1.1, 1.5, 0.85])
    metrics = loss_of(ratios.log(), values=[0.5, 0.5, 0.1, 0.0], returns=[1.0, 0.0, 1.0, 0.0])[1]
    assert metrics["clip_frac"] == 0.5 and metrics["vf_clip_frac"] == 0.25
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("log_ratio, k3", [(-1, 0.3679), (1, 0.7183), (0, 0)])
def test_approx_kl_is_k3_from_the_old_to_the_new_policy(log_ratio, k3):
    """With the opposite sign of the log-ratio, the first two numbers are swapped."""
    metrics = loss_of(-2 + log_ratio, old_logprobs=-2)[1]
    assert metrics["approx_kl"].item() == pytest.approx(k3, abs=5e-5) and metrics["max_log_ratio"] == abs(log_ratio)


@pytest.mark.parametrize("log_ratio", [-1000, 1000])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_loss_and_gradient_are_finite_at_extreme_ratios(log_ratio, advantage):
    loss, metrics, grad, _ = loss_of(log_ratio, advantages=advantage)
    assert math.isfinite(loss) and grad.isfinite().all() and all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("kl, expected", [(12, 0.201024), (6.3, 0.200256), (-3, 0.198976)])
def test_controller_clips_its_error_at_one_fifth(kl, expected):
    """Without clipping, a KL of 12 gives .20512 and a KL of -3 gives .19232."""
    controller = AdaptiveKL(config(kl_coef=0.2, kl_target=6.0, kl_horizon=10_000))
    controller.update(kl, episodes=256)
    assert controller.coef == pytest.approx(expected, abs=1e-9)


def test_kl_target_0_keeps_the_coefficient_fixed():
    controller = AdaptiveKL(config(kl_coef=0.2, kl_target=0.0, kl_horizon=10_000))
    controller.update(50, episodes=256)
    assert controller.coef == 0.2


# ---- rollout


def test_rollout_has_one_row_per_episode_and_no_unused_column():
    batch = tiny_rollout(config())
    lengths, T = batch.mask.sum(1), batch.mask.shape[1]
    assert len(lengths.unique()) > 1 and lengths.max() == T and batch.ended.any() and not batch.ended.all()
    assert batch.sequences.shape == (8, 3 + T) and batch.scores.shape == batch.ended.shape == (8,)
    assert len({x.shape for x in (batch.logprobs, batch.values, batch.advantages, batch.returns, batch.kl)}) == 1
    assert torch.equal(batch.sequences[:, :3], random_prompts())
    assert not (batch.kl.any(0) & ~batch.mask.any(0)).any() and not batch.kl[~batch.mask].any()


def test_reward_gets_prompt_and_response_as_one_text():
    calls = []
    batch = tiny_rollout(config(), reward=lambda texts: calls.append(texts) or count_sevens(texts))
    assert calls == [[" ".join(str(i) for i in row if i != EOS) for row in batch.sequences.tolist()]]
    assert batch.texts == calls[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_values_come_from_the_state_before_their_token(temperature):
    """Compare each token with the log-softmax of one full forward pass; one position later would see the token."""
    policy, ref = tiny_policy(0, value_std=0.5), tiny_policy(1)
    batch = tiny_rollout(config(temperature=temperature), policy, ref)
    hidden = policy.gpt2.trunk(batch.sequences)
    for t in range(batch.mask.shape[1]):
        ids = batch.sequences[:, 3 + t, None]
        logprobs, ref_logprobs = (
            (p.gpt2(batch.sequences)[:, 2 + t] / temperature).log_softmax(-1).gather(1, ids)[:, 0]
            for p in (policy, ref)
        )
        assert close(batch.logprobs[:, t], logprobs)
        assert close(batch.kl[:, t], (logprobs - ref_logprobs) * batch.mask[:, t])
        assert close(batch.values[:, t], policy.value_head(hidden[:, 2 + t])[:, 0])


@pytest.mark.parametrize("changes", [{}, dict(whiten_rewards=True), dict(gamma=0.9, lam=0.5)])
def test_rollout_whitens_advantages_once_and_does_not_whiten_returns(changes):
    """The returns are computed from the advantages before whitening, so they keep the scale of the rewards."""
    cfg = config(**changes)
    batch = tiny_rollout(cfg)
    rewards = token_rewards(batch.scores.double(), batch.kl, batch.mask, cfg.kl_coef)
    if cfg.whiten_rewards:
        rewards = whiten(rewards, batch.mask, shift_mean=False)
    advantages, returns = gae(rewards, batch.values, batch.mask, cfg.gamma, cfg.lam)
    assert close(batch.returns, returns) and close(batch.advantages, whiten(advantages, batch.mask))
    assert abs(batch.advantages[batch.mask].mean()) < 1e-12 and abs(batch.advantages[batch.mask].std() - 1) < 1e-6


def test_with_whitened_rewards_the_scores_so_far_are_in_their_unit():
    """Otherwise shaping would hardly act: most token rewards are small, so that whitening multiplies them."""
    batch, plain = (tiny_rollout(config(shaping_every=2, whiten_rewards=w)) for w in (True, False))
    rewards = token_rewards(batch.scores.double(), batch.kl, batch.mask, config().kl_coef)
    assert plain.potentials.any() and close(batch.potentials, plain.potentials / rewards[batch.mask].std(), 1e-6)
    values = batch.values + batch.potentials
    advantages, returns = gae(whiten(rewards, batch.mask, shift_mean=False), values, batch.mask, 1, 0.95)
    assert close(batch.advantages, whiten(advantages, batch.mask), 1e-6)
    assert close(batch.returns, (returns - batch.potentials) * batch.mask, 1e-6)


def test_a_rollout_of_one_token_with_whitened_rewards_and_shaping_is_finite():
    """A single reward has no standard deviation."""
    cfg = config(
        shaping_every=2, whiten_rewards=True, response_len=1, batch_size=1, minibatch_size=1, micro_batch_size=1
    )
    batch = tiny_rollout(cfg, prompts=random_prompts()[:1], reward=lambda texts: [0.5] * len(texts))
    assert batch.mask.sum() == 1 and batch.potentials.any()
    assert all(x.isfinite().all() for x in (batch.potentials, batch.advantages, batch.returns))


def test_before_the_first_step_advantages_are_whitened_discounted_returns():
    """The value head starts at 0, so it adds no noise."""
    batch = tiny_rollout(config(), policy=tiny_policy(0))
    assert not batch.values.any() and close(batch.advantages, whiten(batch.returns, batch.mask))


def test_return_of_a_response_is_its_score_minus_beta_times_k1():
    """As a reward, k3 has a different gradient; +beta rewards divergence from the reference."""
    batch = tiny_rollout(config(gamma=1, lam=1, kl_coef=0.3))
    assert (batch.kl[batch.mask] < 0).any() and close(batch.returns[:, 0], batch.scores - 0.3 * batch.kl.sum(1))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_with_shaping_a_value_is_the_value_head_plus_the_score_of_the_text_so_far(every):
    """Of prompt and response before the token. The value head learns the rest of the return."""
    cfg = config(shaping_every=every, gamma=0.9, lam=0.5, score_clip=2.0)
    policy, total = tiny_policy(0, value_std=0.5), lambda texts: tensor([sum(map(int, t.split())) / 20 for t in texts])
    batch, plain = (tiny_rollout(replace(cfg, shaping_every=n), policy, reward=total) for n in (every, 0))
    potentials = torch.zeros_like(batch.values)
    for t in range(batch.mask.shape[1]):
        parts = batch.sequences[:, : 3 + t // every * every].tolist()
        potentials[:, t] = total([" ".join(str(i) for i in row if i != EOS) for row in parts]).clamp(max=2)
    assert close(batch.potentials, potentials) and len(potentials.unique()) > 8 and potentials.max() == 2
    rewards = token_rewards(batch.scores.clamp(max=2).double(), batch.kl, batch.mask, cfg.kl_coef)
    advantages, returns = gae(rewards, batch.values + batch.potentials, batch.mask, 0.9, 0.5)
    assert close(batch.advantages, whiten(advantages, batch.mask)) and not plain.potentials.any()
    assert not torch.allclose(batch.advantages, plain.advantages, atol=0.1)
    assert close(batch.returns, (returns - batch.potentials).where(batch.mask, 0))
    assert torch.equal(batch.scores, plain.scores) and torch.equal(batch.objective, plain.objective)


def test_with_shaping_and_lambda_1_the_returns_are_those_without():
    """Shaping with a potential is a baseline: it changes no sum of rewards (Ng et al. 1999)."""
    batch, plain = (tiny_rollout(config(gamma=1, lam=1, shaping_every=every)) for every in (1, 0))
    mask = batch.mask
    assert batch.potentials.any() and close((batch.returns + batch.potentials)[mask], plain.returns[mask])


def test_only_gae_scores_the_text_so_far_and_the_whole_text_is_scored_last():
    """So that the reward's truncated_frac is that of the whole texts."""
    calls = []
    reward = lambda texts: calls.append(texts) or count_sevens(texts)  # noqa: E731
    batch = tiny_rollout(config(shaping_every=2), reward=reward)
    assert len(calls) == 1 + math.ceil(batch.mask.shape[1] / 2) and calls[-1] == batch.texts
    assert calls[0] == [" ".join(str(i) for i in row if i != EOS) for row in random_prompts().tolist()]
    calls.clear()
    tiny_rollout(config(shaping_every=2, advantage="rloo", samples_per_prompt=2), reward=reward)
    assert len(calls) == 1


def test_a_score_of_a_part_of_a_text_that_is_not_finite_is_an_error():
    parts = []
    reward = lambda texts: parts.append(texts) or [math.nan if len(parts) == 2 else 1.0] * len(texts)  # noqa: E731
    with pytest.raises(BadInput, match=r"score of text 0 is nan"):
        tiny_rollout(config(shaping_every=1), reward=reward)


def test_missing_eos_penalty_ignores_the_prompt():
    """Every prompt here holds <|endoftext|>: a search in prompt and response penalizes no episode."""
    prompts = random_prompts().index_fill(1, tensor([1]), EOS)
    batch = tiny_rollout(config(gamma=1, lam=1, kl_coef=0, missing_eos_penalty=10), prompts=prompts)
    assert batch.ended.any() and not batch.ended.all()
    assert close(batch.returns[:, 0], batch.scores - 10.0 * ~batch.ended)
    assert torch.equal(batch.scores, count_sevens(batch.texts).float())


@pytest.mark.parametrize("sign", [1, -1])
def test_score_clip_applies_to_the_score_and_not_to_the_kl(sign):
    """Scores are clipped on both sides."""
    cfg = config(gamma=1, lam=1, kl_coef=20, score_clip=5)
    batch = tiny_rollout(cfg, reward=lambda texts: sign * 100 * torch.ones(len(texts)))
    assert (batch.scores == sign * 100).all() and (batch.kl.sum(1).abs() * 20 > 5).any()
    assert close(batch.returns[:, 0], sign * 5 - 20 * batch.kl.sum(1))


@pytest.mark.parametrize("compile", [False, True])
def test_no_tensor_of_a_rollout_requires_grad(compile):
    """Otherwise the policy loss trains the values through the advantages. A loss cannot use inference tensors."""
    batch = tiny_rollout(config(compile=compile))
    for result in (batch.logprobs, batch.values, batch.advantages, batch.returns, batch.kl):
        assert not result.requires_grad and not result.is_inference()


@pytest.mark.parametrize(
    "changes", [{}, dict(whiten_rewards=True), dict(advantage="rloo", samples_per_prompt=2), dict(shaping_every=2)]
)
def test_nan_after_the_end_of_a_response_changes_no_rollout(changes, monkeypatch):
    cfg, forward = config(**changes), Policy.forward
    clean = tiny_rollout(cfg)

    def with_nan(self, sequences, prompt_len, temperature):
        ended = ~response_mask(sequences[:, prompt_len:], EOS)
        return tuple(x.masked_fill(ended, math.nan) for x in forward(self, sequences, prompt_len, temperature))

    monkeypatch.setattr(Policy, "forward", with_nan)
    dirty = tiny_rollout(cfg)
    assert dirty.logprobs.isnan().any() and dirty.values.isnan().any()
    for name in ("advantages", "returns", "kl"):
        assert torch.equal(getattr(dirty, name), getattr(clean, name)), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_for_a_score_that_is_not_finite_names_its_text(bad):
    with pytest.raises(BadInput, match=r"score of text 3 is (nan|inf): '[\d ]+'"):
        tiny_rollout(config(), reward=lambda texts: [bad if i == 3 else 1.0 for i in range(len(texts))])


def test_error_for_a_forward_pass_that_is_not_finite_names_its_model():
    """Policy or reference; also if only a value is not finite. If no logit is finite, the sampled ids exist."""
    policy, ref_policy = tiny_policy(), tiny_policy(1)
    nn.init.constant_(policy.value_head.bias, math.nan)
    with pytest.raises(NotFinite, match="log-probability or value of text 0 is nan"):
        tiny_rollout(config(), policy)
    nn.init.constant_(ref_policy.gpt2.ln_f.bias, math.nan)
    with pytest.raises(NotFinite, match="the reference's log-probability of text 0 is nan"):
        tiny_rollout(config(), ref_policy=ref_policy)
    with pytest.raises(NotFinite, match="log-probability or value of text 0 is nan"):
        tiny_rollout(config(), policy=ref_policy)


def test_scores_of_the_wrong_shape_are_rejected():
    with pytest.raises(BadInput, match=r"8 texts need shape \(8,\), not \(8, 1\)"):
        tiny_rollout(config(), reward=lambda texts: torch.ones(len(texts), 1))


def test_rollout_is_trimmed_to_its_longest_response():
    """Columns that are padding in all rows are removed, so nothing is computed for them."""
    policy, ref = tiny_policy(0, value_std=0.5), tiny_policy(1)
    sequences = torch.cat([random_prompts(), torch.full((8, 6), EOS)], dim=1)
    sequences[2, 3:6] = tensor([4, 5, 6])  # the longest response: 4 tokens with <|endoftext|>
    policy.gpt2.generate = lambda *_: sequences
    batch = tiny_rollout(config(), policy, ref)
    assert batch.sequences.shape == (8, 3 + 4) and batch.mask.shape == batch.logprobs.shape == (8, 4)
    assert batch.mask.sum(1).tolist() == [1, 1, 4, 1, 1, 1, 1, 1]


def test_objective_is_the_clipped_and_penalized_score_minus_kl_coef_times_kl():
    """It is what PPO maximizes; the logged score is not clipped and has no penalty for a missing end."""
    cfg = config(score_clip=0.5, missing_eos_penalty=2.0, kl_coef=0.3)
    batch = tiny_rollout(cfg)
    assert batch.ended.any() and not batch.ended.all() and batch.scores.max() > 0.5
    expected = batch.scores.clamp(-0.5, 0.5) - 2.0 * ~batch.ended - 0.3 * batch.kl.sum(1)
    assert batch.objective.shape == (8,) and close(batch.objective, expected)


def test_rollout_draws_all_random_numbers_from_its_generator():
    """Catches the global generator, which a resumed run cannot reproduce."""
    cfg, policy, ref = config(), tiny_policy(0), tiny_policy(1)
    torch.manual_seed(0)
    first = tiny_rollout(cfg, policy, ref)
    torch.manual_seed(1)
    assert torch.equal(tiny_rollout(cfg, policy, ref).sequences, first.sequences)


def test_rollout_measures_the_seconds_of_each_phase():
    start = time.time()
    batch = tiny_rollout(config(), reward=lambda texts: time.sleep(0.1) or count_sevens(texts))
    elapsed = time.time() - start
    assert list(batch.seconds) == ["generate", "score", "judge", "logprobs", "reference"]
    assert all(seconds >= 0 for seconds in batch.seconds.values()) and sum(batch.seconds.values()) <= elapsed
    assert 0.1 <= batch.seconds["score"] < elapsed and batch.seconds["generate"] > 0


# ---- rollout_metrics


def example_rollout(values=0.0, potentials=None):
    """Return two responses of 3 and 5 tokens; each token has a KL of .1 nats and a log-probability of -2 nats."""
    mask, returns = MASK, torch.arange(10.0).reshape(2, 5)
    scores, ended = tensor([1.0, 3.0]), tensor([True, False])
    logprobs = torch.where(mask, -2.0, 99.0)
    sequences, seconds = torch.ones(2, 8).long(), {"generate": 2.0, "score": 1.0, "logprobs": 1.0}
    kl, values = 0.1 * mask, torch.where(mask, values * returns, 99.0)
    positive = tensor([1.0, 1.0]), tensor([1.0, 0.0])  # according to reward and judge
    potentials = torch.zeros(2, 5) if potentials is None else potentials
    return Rollout(
        sequences, 3, mask, logprobs, values, potentials, returns, returns, kl, scores, scores - 0.5, *positive, ended,
        ["a", "b"], seconds,
    )  # fmt: skip


def test_metrics_sum_kl_over_a_response_and_average_over_responses():
    """A mean over tokens gives a KL of .1, a mean over all columns .08. Garbage after the end is ignored."""
    policy = tiny_policy()
    metrics = rollout_metrics(example_rollout(), policy, policy, 0.5, config())
    expected = dict(
        kl=0.4, kl_stderr=0.1 / math.sqrt(2), kl_k3=4 * (math.exp(-0.1) - 0.9), kl_exact=0, entropy=2, score=2,
        score_std=1, objective=1.5, response_length=4, eos_frac=0.5, truncated_frac=0.5, tokens_per_second=4,
        explained_variance=0, perplexity=math.exp(2.1),
    )  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-8)


def test_the_explained_variance_is_that_of_value_head_and_potential_together():
    """Returns 0, 1, 2, 5, ... 9 of which the potential gives all but 1/10, and the value head nothing."""
    policy, returns = tiny_policy(), torch.arange(10.0).reshape(2, 5)
    shaped = replace(example_rollout(potentials=9 * returns), returns=returns)
    explained = rollout_metrics(shaped, policy, policy, 0, config())["explained_variance"]
    assert explained == pytest.approx(0.99, abs=1e-6)


def test_positive_shares_of_reward_and_judge_are_logged_if_there_are_any():
    """A reward function that is not a classifier has no positive share."""
    policy, batch = tiny_policy(), example_rollout()
    metrics = rollout_metrics(batch, policy, policy, 0.0, config())
    assert (metrics["positive_by_reward"], metrics["positive_by_judge"]) == (1.0, 0.5)
    batch = replace(batch, positive_by_reward=None)
    metrics = rollout_metrics(batch, policy, policy, 0.0, config())
    assert "positive_by_reward" not in metrics and metrics["positive_by_judge"] == 0.5
    metrics = rollout_metrics(replace(batch, positive_by_judge=None), policy, policy, 0.0, config())
    assert "positive_by_judge" not in metrics


@pytest.mark.parametrize("kl, has_warning", [(-0.9, False), (-1.1, True)])
def test_kl_far_below_0_prints_a_warning(kl, has_warning):
    """By chance, k1 is a little below 0; it is far below 0 if samples come from another distribution."""
    lines = []
    log = RunLog(config(), rank=1)
    log.bar = types.SimpleNamespace(set_postfix=lambda *_, **__: None, write=lines.append)
    others = dict(score=0.0, kl_stderr=0.1, tokens_per_second=1.0, clip_frac=0.0, entropy=1.0)
    log.write_rollout(1, others | dict(kl=kl), samples=None)
    assert [line.startswith(f"warning: KL is {kl:.2f}") for line in lines] == [True] * has_warning


@pytest.mark.parametrize("share, expected", [(1.0, 1.0), (0.5, 0.75), (-1.0, -3.0)])
def test_explained_variance_is_1_for_perfect_values_and_below_0_for_harmful_ones(share, expected):
    policy = tiny_policy()
    metrics = rollout_metrics(example_rollout(values=share), policy, policy, 0.0, config())
    assert metrics["explained_variance"] == pytest.approx(expected, abs=1e-6)


def test_the_perplexity_of_a_rollout_is_that_of_evaluate():
    """e^(nats per token) of the responses under the reference, which is not the policy."""
    policy, ref_policy, cfg = moved_policy(), tiny_policy(1), config()
    batch = tiny_rollout(cfg, policy, ref_policy)
    likely = likelihoods(policy, ref_policy, batch.sequences, batch.mask, cfg)
    metrics = rollout_metrics(batch, policy, ref_policy, 0.0, cfg)
    expected = perplexity(likely["ref_nll"].numpy(), batch.mask.sum(1).double().numpy()).mean()
    assert metrics["perplexity"] == pytest.approx(expected)
    assert abs(metrics["perplexity"] / math.exp(metrics["entropy"]) - 1) > 0.01


def test_exact_kl_is_the_expectation_of_k1_under_the_policy():
    """For one token after one prompt: the sum over the vocabulary of p * (log p - log ref)."""
    policy, ref, prompts = tiny_policy(0), tiny_policy(1), torch.ones(8, 3).long()
    cfg = config(response_len=1, temperature=0.7)
    metrics = rollout_metrics(tiny_rollout(cfg, policy, ref, prompts=prompts), policy, ref, 0.0, cfg)
    p, q = ((model.gpt2(prompts)[0, -1] / 0.7).softmax(-1) for model in (policy, ref))
    assert metrics["kl_exact"] == pytest.approx((p * (p / q).log()).sum().item())


def test_reward_and_judge_each_classify_the_texts_and_a_function_does_not(bert_folder, judge_folder):
    """For the texts of the rollout. The judge does not change the advantages."""
    reward, judge = (SentimentReward.load(str(folder)) for folder in (bert_folder, judge_folder))
    torch.set_default_dtype(torch.float32)
    cfg, policy, ref_policy, tokenizer = config(), tiny_policy(0), tiny_policy(1), FakeTokenizer()

    def rollout_of(reward_fn, judge):
        rng = torch.Generator().manual_seed(1)
        return rollout(policy, ref_policy, tokenizer, reward_fn, random_prompts(), cfg.kl_coef, cfg, rng, judge)

    batch, alone = rollout_of(reward, judge), rollout_of(reward, None)
    for found, classifier in ((batch.positive_by_reward, reward), (batch.positive_by_judge, judge)):
        assert found.tolist() == (classifier.log_odds(batch.texts) > 0).float().tolist()
    assert batch.positive_by_reward.tolist() != batch.positive_by_judge.tolist()
    assert alone.positive_by_judge is None and torch.equal(alone.advantages, batch.advantages)
    assert rollout_of(count_sevens, judge).positive_by_reward is None
    assert {"score", "judge", "logprobs", "reference"} <= batch.seconds.keys()


# ---- update


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_without_a_step_every_ratio_is_1_in_every_epoch(temperature):
    """Rollout and update compute the same log-probabilities, at the same temperature and without dropout."""
    policy, cfg = tiny_policy(0), config(temperature=temperature)
    batch = tiny_rollout(cfg, policy, copy.deepcopy(policy))
    metrics = update(policy, sgd(policy, lr=0.0), batch, cfg)
    assert batch.kl.abs().max() < 1e-12
    for name in ("max_log_ratio", "first_max_log_ratio", "last_max_log_ratio", "approx_kl", "clip_frac"):
        assert abs(metrics[name]) < 1e-12, name


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 6e-4)])
def test_without_a_step_every_ratio_is_1_in_every_dtype(dtype, rounding):
    """With a rollout in float32 and an update in bf16, the first ratios differ from 1 by .018 nats per token."""
    policy, cfg = tiny_policy(0).float(), config(temperature=0.7)
    policy.gpt2.dtype = dtype
    batch = tiny_rollout(cfg, policy, copy.deepcopy(policy))
    assert batch.logprobs.dtype == torch.float32 and batch.kl.abs().max() <= rounding
    assert update(policy, sgd(policy, lr=0.0), batch, cfg)["max_log_ratio"] <= rounding


def test_an_update_in_float16_has_the_gradient_of_one_in_float32():
    """Most gradients are below 6e-8, the smallest number in float16: catches a loss that is not scaled."""
    cfg, norms, changes = config(ppo_epochs=1, minibatch_size=8, vf_coef=1e-6), [], []
    batch = tiny_rollout(cfg)
    batch = replace(batch, advantages=1e-6 * batch.advantages)
    for dtype in (torch.float32, torch.float16):
        policy = moved_policy().float()
        policy.gpt2.dtype, before = dtype, parameters(policy.gpt2.h)
        stepper = Stepper(policy, [torch.optim.SGD(policy.parameters(), 1e4)], math.inf, dtype=dtype)
        norms.append(update(policy, stepper, batch, cfg)["grad_norm"])
        changes.append(parameters(policy.gpt2.h) - before)
    assert norms[1] == pytest.approx(norms[0], rel=0.01)
    assert (changes[1] - changes[0]).norm() < 0.01 * changes[0].norm()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batch_size_does_not_change_the_step(micro_batch_size):
    """Responses differ in length: a mean of the means of micro-batches gives tokens of short responses more weight."""
    batch, states, logs = tiny_rollout(config()), [], []
    for size in (8, micro_batch_size):
        policy = moved_policy()  # not the policy that sampled: ratios differ from 1, and some are clipped
        cfg = config(minibatch_size=8, micro_batch_size=size, ppo_epochs=2, vf_coef=1.0)
        logs.append(update(policy, sgd(policy), batch, cfg, torch.Generator().manual_seed(0)))
        states.append(parameters(policy))
    assert (states[0] - parameters(moved_policy())).abs().max() > 1e-3 and close(states[1], states[0], 1e-10)
    seconds = [log.pop("seconds_update") for log in logs]
    assert logs[1] == pytest.approx(logs[0], abs=1e-6) and 0 < logs[0]["clip_frac"] < 0.9 and min(seconds) > 0


@pytest.mark.parametrize("ppo_epochs, minibatch_size, steps", [(1, 8, 1), (4, 8, 4), (4, 4, 8), (3, 2, 12)])
def test_every_minibatch_of_every_epoch_takes_one_step(ppo_epochs, minibatch_size, steps):
    policy, cfg, taken = tiny_policy(0), config(ppo_epochs=ppo_epochs, minibatch_size=minibatch_size), []
    stepper = sgd(policy)
    stepper.optimizers[0].register_step_post_hook(lambda *_: taken.append(1))
    update(policy, stepper, tiny_rollout(cfg), cfg)
    assert len(taken) == steps


@pytest.fixture
def losses(monkeypatch):
    """Record the calls of ppo_loss by update: a list of (advantages, metrics)."""
    calls = []

    def spy(*tensors_and_cfg):
        loss, metrics = ppo_loss(*tensors_and_cfg)
        calls.append((tensors_and_cfg[4], metrics))
        return loss, metrics

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    return calls


def test_every_real_token_is_used_once_per_epoch_in_a_new_order(losses):
    """The advantages are not whitened again per minibatch, and tokens after an end are left out."""
    policy, cfg = tiny_policy(0), config(ppo_epochs=3)
    batch = tiny_rollout(cfg)
    update(policy, sgd(policy), batch, cfg)
    epochs = [torch.cat([advantages for advantages, _ in losses[4 * k : 4 * k + 4]]) for k in range(3)]
    expected = batch.advantages[batch.mask].sort().values
    assert len(losses) == 12 and all(torch.equal(epoch.sort().values, expected) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_metrics_are_means_over_the_minibatches_and_the_largest_ratio(losses):
    """Not those of the last minibatch. The mean ratio is 1 for any two policies, so the largest one is logged."""
    policy, cfg = tiny_policy(0), config(micro_batch_size=4, ppo_epochs=2)
    metrics = update(policy, sgd(policy), tiny_rollout(cfg), cfg)
    for name in ("pg_loss", "vf_loss", "approx_kl", "clip_frac", "vf_clip_frac"):
        assert metrics[name] == pytest.approx(sum(m[name].item() for _, m in losses) / 4), name
    assert metrics["max_log_ratio"] == max(m["max_log_ratio"].item() for _, m in losses)
    for end, i in (("first", 0), ("last", -1)):
        for name in ("approx_kl", "max_log_ratio"):
            assert metrics[f"{end}_{name}"] == pytest.approx(losses[i][1][name].item())
    assert metrics["last_max_log_ratio"] > metrics["first_max_log_ratio"]


def test_garbage_after_the_end_changes_no_metric_and_no_step():
    """Results with other ids and nan after the end are equal to the bit."""
    cfg, ref, results = config(), tiny_policy(1), []
    for garbage in (False, True):
        policy = tiny_policy(0, value_std=0.5)
        batch = tiny_rollout(cfg, policy, ref)
        if garbage:
            padding = torch.cat([torch.zeros(8, 3).bool(), ~batch.mask], 1)
            assert padding.any()
            tables = {name: getattr(batch, name).masked_fill(~batch.mask, math.nan) for name in (*TABLES, "kl")}
            batch = replace(batch, sequences=torch.where(padding, 9, batch.sequences), **tables)
        metrics = rollout_metrics(batch, policy, ref, 0.0, cfg)
        metrics |= update(policy, sgd(policy), batch, cfg, torch.Generator().manual_seed(0))
        metrics = {name: value for name, value in metrics.items() if name not in MEASURED}
        results.append((metrics, parameters(policy).tolist()))
    assert results[0] == results[1]


def test_value_loss_reaches_the_trunk():
    """Policy and values share one network: with all advantages 0, only the value loss changes it."""
    policy, cfg = tiny_policy(0, value_std=0.5), config(ppo_epochs=1)
    before, batch = policy.gpt2.h[0].attn.c_attn.weight.clone(), tiny_rollout(cfg)
    update(policy, sgd(policy), replace(batch, advantages=torch.zeros_like(batch.advantages)), cfg)
    assert (policy.gpt2.h[0].attn.c_attn.weight - before).abs().max() > 1e-6


def test_a_minibatch_leaves_no_gradient_for_the_next():
    """An update with two minibatches equals two updates with one minibatch each, in the same order."""
    batch, cfg = tiny_rollout(config()), config(ppo_epochs=1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    together, apart = moved_policy(), moved_policy()
    update(together, sgd(together), batch, cfg, torch.Generator().manual_seed(3))
    for rows in order.split(4):
        half = {name: getattr(batch, name)[rows] for name in ("sequences", "mask", *TABLES)}
        update(apart, sgd(apart), replace(batch, **half), cfg)
    assert close(parameters(together), parameters(apart)) and all(p.grad is None for p in together.parameters())


def test_gradient_is_clipped_once_per_step():
    """The step has length lr * grad_clip, and the norm is logged before clipping."""
    policy, cfg = moved_policy(), config(minibatch_size=8, ppo_epochs=1)
    before = parameters(policy)
    metrics = update(policy, sgd(policy, lr=1.0, grad_clip=1e-3), tiny_rollout(cfg), cfg)
    assert metrics["grad_norm"] > 1e-3 and (parameters(policy) - before).norm() == pytest.approx(1e-3, rel=1e-2)


def test_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted():
    policy, cfg = tiny_policy(0), config(ppo_epochs=1)
    before, batch = parameters(policy), tiny_rollout(cfg)
    poisoned, stepper = replace(batch, advantages=batch.advantages * math.nan), sgd(policy)
    assert update(policy, stepper, poisoned, cfg)["skipped_steps"] == 2 and torch.equal(parameters(policy), before)
    with pytest.raises(BadInput, match="three steps in a row"):
        update(policy, stepper, poisoned, cfg)


# ---- main

MEASURED = {  # metrics that differ between identical runs
    *(f"seconds{phase}" for phase in ("", "_generate", "_score", "_judge", "_logprobs", "_reference", "_update")),
    *("tokens_per_second", "peak_memory_gb"),
}
METRICS = {
    "step", "score", "score_std", "objective", "kl", "kl_stderr", "kl_k3", "kl_exact", "kl_coef", "entropy",
    "perplexity", "explained_variance", "response_length", "eos_frac", "truncated_frac", "pg_loss", "vf_loss",
    "clip_frac", "vf_clip_frac", "grad_norm", "max_log_ratio", "first_max_log_ratio", "last_max_log_ratio", "approx_kl",
    "first_approx_kl", "last_approx_kl", "skipped_steps", "lr",
}  # fmt: skip


@pytest.fixture(scope="module")
def train(tmp_path_factory, gpt2_folder):
    """Return a function that runs main with tiny models and returns its config, metrics and models."""
    home = tmp_path_factory.mktemp("ppo")
    (home / "my_reward.py").write_text(
        "import torch\ndef e(texts):\n  return torch.tensor([t.count('e') for t in texts])"
    )
    reviews = reviews_csv(home / "reviews.csv")

    def run(name, **changes):
        torch.set_default_dtype(torch.float32)
        cfg = PPOConfig(
            **dict(
                dataset=str(reviews), policy=str(gpt2_folder), reward=f"{home}/my_reward.py:e", out=str(home / name),
                steps=3, batch_size=8, minibatch_size=4, micro_batch_size=2, response_len=6, max_prompt_len=4,
                lr=1e-3, lr_end=0.0, save_every=2, save_share=1.0, judge="", report_to="none", device="cpu",
            ) | changes
        )  # fmt: skip
        result = types.SimpleNamespace(cfg=cfg, out=home / name, saved_after=[])

        def record_rollout(*args):
            result.policy, result.ref_policy = args[:2]
            return rollout(*args)

        def record_update(*args):
            result.stepper = args[1]
            return update(*args)

        def record_save(out, *args):
            result.saved_after.append(len((result.out / "log.jsonl").read_text().splitlines()))
            save_checkpoint(out, *args)

        def record_texts(texts, *args):
            result.texts = texts
            return prompt_pool(texts, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save_checkpoint", record_save)
            patch.setattr(data, "prompt_pool", record_texts)
            patch.setattr(ppo, "rollout", record_rollout)
            patch.setattr(ppo, "update", record_update)
            ppo.main(cfg)
        result.metrics = read_lines(result.out / "log.jsonl")
        return result

    return run


@pytest.fixture(scope="module")
def trained(train):
    return train("first")


def test_a_run_logs_every_metric_of_every_rollout(trained):
    assert [line["step"] for line in trained.metrics] == [0, 1, 2]
    for line in trained.metrics:
        assert set(line) == METRICS | MEASURED and all(math.isfinite(value) for value in line.values())
        assert line["first_max_log_ratio"] < 1e-5 and line["skipped_steps"] == 0 and line["kl_exact"] >= 0
    assert trained.metrics[0]["kl"] == trained.metrics[0]["kl_exact"] == 0 and trained.metrics[2]["kl_exact"] > 0


def test_memory_does_not_grow_with_the_number_of_steps(train, monkeypatch):
    """Catches a loss or a rollout that is kept with its graph: counts the tensors each time metrics are logged."""
    counts, write = [], RunLog.write

    def count(*args, **metrics):
        gc.collect()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and type(x) is not FakeTensor]
        counts.append((len(tensors), sum(x.nbytes for x in tensors)))
        write(*args, **metrics)

    monkeypatch.setattr(RunLog, "write", count)
    train("longer", steps=6, save_every=9, min_prompt_len=4, missing_eos_penalty=100.0)
    assert len(counts) == 6 and counts[1] == counts[3] == counts[5]  # the first step creates Adam's moments


def test_prompts_of_a_run_come_from_the_prompts_split_only(trained):
    """PPO must not be trained on the reviews from which evaluate.py takes its prompts."""
    assert trained.texts == load_splits(trained.cfg.dataset)["prompts"].texts


def test_learning_rate_falls_linearly_to_0_after_the_last_rollout(trained):
    """The last step still has a learning rate, and all parameter groups have the same one."""
    assert [line["lr"] for line in trained.metrics] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert {group["lr"] for group in trained.stepper.optimizers[0].param_groups} == {trained.metrics[2]["lr"]}


def test_kl_coef_is_updated_once_per_rollout_by_its_kl(trained):
    expected = AdaptiveKL(trained.cfg)
    for line in trained.metrics:
        assert line["kl_coef"] == pytest.approx(expected.coef, abs=1e-12)
        expected.update(line["kl"], episodes=8)
    assert line["kl_coef"] != trained.cfg.kl_coef


def test_optimizer_is_adam_without_weight_decay_over_the_policy_alone(trained):
    """AdamW's weight decay pulls the policy towards 0 instead of its reference."""
    optimizer = trained.stepper.optimizers[0]
    assert type(optimizer) is torch.optim.Adam
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-5, 0)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trained.policy.parameters()}
    assert trained.stepper.grad_clip == trained.cfg.grad_clip


def test_reference_keeps_the_initial_weights_of_the_policy(trained, gpt2_folder):
    """It is a copy, not another name for the policy."""
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(gpt2_folder).transformer
    ref, policy = trained.ref_policy.gpt2, trained.policy.gpt2
    assert torch.equal(ref.wte.weight, start.wte.weight) and not torch.equal(policy.wte.weight, ref.wte.weight)
    assert torch.equal(ref.h[1].mlp.c_fc.weight, start.h[1].mlp.c_fc.weight.t())
    for trained_one, frozen_one in zip(policy.parameters(), ref.parameters()):
        assert trained_one.data_ptr() != frozen_one.data_ptr()
        assert trained_one.requires_grad and not frozen_one.requires_grad


def test_transformers_loads_what_a_run_writes(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = tensor([[3, 1, 4, 1, 5]])
    expected = AutoModelForCausalLM.from_pretrained(trained.out)(ids).logits
    assert close(trained.policy.gpt2(ids).detach(), expected.detach(), 1e-4)
    assert AutoTokenizer.from_pretrained(trained.out).eos_token_id == EOS
    assert (trained.out / "value_head.safetensors").is_file()
    saved = json.loads((trained.out / "run_config.json").read_text())
    assert {name: saved[name] for name in asdict(trained.cfg)} == asdict(trained.cfg)


def test_a_run_writes_checkpoints_and_deletes_them_at_its_end(trained):
    assert trained.cfg.save_every == 2 and trained.saved_after == [2]
    assert latest_checkpoint(trained.out) is None


def metrics_of(objective, kl=0.0):
    return {"objective": objective, "kl": kl}


def best_policy(tmp_path, save_every):
    """Return a BestPolicy; the tests set the bias of the policy's value head to the number of the rollout."""
    return BestPolicy(tiny_policy(), None, config(save_every=save_every, out=str(tmp_path)))


@pytest.mark.parametrize(
    ("objectives", "expected"),
    [
        ([5, 1, 2, 3, 9, 0], 5),  # means over pairs are 3, 2.5 and 4.5, taken after rollouts 1, 3 and 5
        ([5, 1, 3, 2, 0, 0], 1),
    ],
)
def test_the_best_policy_is_chosen_by_means_over_rollouts(tmp_path, objectives, expected):
    """Catches a policy that is kept because of a single rollout."""
    best = best_policy(tmp_path, save_every=2)
    for step, objective in enumerate(objectives):
        best.model.value_head.bias.data.fill_(step)
        best.update(metrics_of(objective), kl_coef=0.1)
    assert best.weights["value_head.bias"].item() == expected
    assert best.best["rollouts"] == 2 and best.rollouts == []


def test_until_the_first_mean_the_best_policy_is_that_of_the_first_rollout(tmp_path):
    best = best_policy(tmp_path, save_every=9)
    for step in range(3):
        best.model.value_head.bias.data.fill_(step + 1)
        best.update(metrics_of(step), kl_coef=0.1)
    assert best.weights["value_head.bias"].item() == 1


@pytest.mark.parametrize(("kl_coef", "expected"), [(0.35, 1), (0.5, 0)])
def test_policies_are_compared_at_the_latest_kl_coefficient(tmp_path, kl_coef, expected):
    """The scores are 1 and 3 at 2 and 7 nats: with a coefficient of .35 the second is better, with .5 the first."""
    best = best_policy(tmp_path, save_every=1)
    for step, (score, kl, coef) in enumerate([(1.0, 2.0, 0.2), (3.0, 7.0, kl_coef)]):
        best.model.value_head.bias.data.fill_(step)
        best.update(metrics_of(score - coef * kl, kl), coef)
    assert best.weights["value_head.bias"].item() == expected
    assert best.best["score"] == pytest.approx([1.0, 3.0][expected])


def test_of_two_equally_good_policies_the_earlier_one_is_kept(tmp_path):
    best = best_policy(tmp_path, save_every=1)
    for step in range(2):
        best.model.value_head.bias.data.fill_(step)
        best.update(metrics_of(1.0, kl=2.0), kl_coef=0.1)
    assert best.weights["value_head.bias"].item() == 0


def test_the_best_policy_is_written_without_changing_the_current_one(tmp_path, gpt2_folder):
    """Write twice, since the folder exists the second time. Catches a file with the current weights or value head."""
    folder, gpt2_config, tokenizer = open_gpt2(str(gpt2_folder))
    policy = load_policy(folder, gpt2_config, tokenizer)
    best = BestPolicy(policy, tokenizer, config(save_every=1, out=str(tmp_path)))
    for number in (1.0, 2.0):
        policy.value_head.bias.data.fill_(number)
        policy.gpt2.ln_f.bias.data.fill_(number)
        best.update(metrics_of(number), kl_coef=0.1)
        policy.value_head.bias.data.fill_(-1.0)
        policy.gpt2.ln_f.bias.data.fill_(-1.0)
        best.write()
        assert policy.value_head.bias.item() == -1.0 and (policy.gpt2.ln_f.bias == -1.0).all()
        written = load_policy(*open_gpt2(str(tmp_path / "best")))
        assert written.value_head.bias.item() == number and (written.gpt2.ln_f.bias == number).all()


def test_a_run_writes_its_best_policy_besides_the_last_one(trained):
    """Here the policy that sampled rollout 1, since means are over two rollouts."""
    best = load_policy(*open_gpt2(str(trained.out / "best")))
    assert trained.cfg.save_every == 2
    assert not torch.equal(parameters(best), parameters(trained.ref_policy).float())
    assert not torch.equal(parameters(best), parameters(trained.policy).float())


def test_a_run_with_the_same_seed_is_identical_and_one_with_another_seed_is_not(trained, train):
    def metrics(run):
        return [{name: value for name, value in line.items() if name not in MEASURED} for line in run.metrics]

    again, other = train("again"), train("other", seed=1)
    assert metrics(again) == metrics(trained) and torch.equal(parameters(again.policy), parameters(trained.policy))
    assert metrics(other) != metrics(trained)


# ---- what main passes to other modules


def record_calls(patch, name):
    """Wrap ppo's function `name`; return a list that collects the arguments of each call."""
    function, calls = getattr(ppo, name), []
    patch.setattr(ppo, name, lambda *args, **kwargs: calls.append((*args, kwargs)) or function(*args, **kwargs))
    return calls


def test_a_run_takes_its_sizes_from_its_config(train, monkeypatch):
    """Catches a micro-batch size that is chosen for other sizes than the run's."""
    sizes, joins = record_calls(monkeypatch, "micro_batch_size"), record_calls(monkeypatch, "join")
    run = train("sizes", steps=1, micro_batch_size=0, batch_size=8, minibatch_size=4)
    ((cfg, rows, tokens, gpt2, copies, device, _, sets, _),) = sizes
    assert (rows, tokens, copies, gpt2) == (4, 4 + 6, 6, run.policy.gpt2) and device.type == "cpu" and sets == 2
    ((device, joined, _),) = joins
    assert joined == cfg and device.type == "cpu"


def test_a_run_checks_its_policy_against_a_copy_on_its_first_prompts(train, monkeypatch, capsys):
    checks, batches = record_calls(monkeypatch, "check_policy"), record_calls(monkeypatch, "prompt_batch")
    train("checked", steps=1)
    ((policy, reference, prompts, cfg, _),) = checks
    pool = batches[0][0]
    assert torch.equal(prompts, ppo.prompt_batch(pool, 0, cfg))
    for original, copied in zip(policy.parameters(), reference.parameters()):
        assert original.data_ptr() != copied.data_ptr()
    train("unchecked", steps=1, self_check=False)
    assert "self-check: policy: skipped" in capsys.readouterr().out


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_compiles_policy_and_reference_if_compile_is_set(train, monkeypatch, compiled):
    calls = []
    monkeypatch.setattr(ppo, "compile_passes", lambda *args: calls.append(args))
    run = train(f"compiled {compiled}", steps=1, compile=compiled)
    assert calls == [(run.policy, run.ref_policy, compiled)]


def test_a_run_computes_in_the_dtype_of_its_config(train, monkeypatch):
    loaded = record_calls(monkeypatch, "load_rewards")
    for name, dtype in DTYPES.items():
        run = train(name, steps=1, dtype=name)
        assert run.policy.gpt2.dtype == run.ref_policy.gpt2.dtype == loaded[-1][2] == dtype
        assert run.stepper.scaler.is_enabled() == (name == "fp16") and run.metrics[0]["grad_norm"] < 100


def test_a_run_uses_the_columns_and_the_task_of_its_config(train, tmp_path):
    """The controls take up to 14 tokens: a response of 40 does not fit the model's 48 positions."""
    file = reviews_csv(tmp_path / "reviews.csv")
    (tmp_path / "named.csv").write_text(file.read_text().replace("text,label", "body,stars", 1))
    columns = dict(dataset=str(tmp_path / "named.csv"), text_column="body", label_column="stars")
    run = train("columns", steps=1, task="controlled", **columns)
    assert run.texts == load_splits(str(file))["prompts"].texts
    (line,) = samples_of(run)
    assert [sample["prompt"].split("]")[0] for sample in line["samples"]] == ["[negative", "[positive"] * 2
    with pytest.raises(BadInput, match="a control of .* tokens"):
        train("long", steps=1, task="controlled", response_len=40, **columns)


def test_compile_passes_compiles_forward_passes_for_dynamic_lengths(monkeypatch):
    compiled, policies = [], [tiny_policy(), tiny_policy()]
    for name, policy in zip(("policy", "reference"), policies):
        monkeypatch.setattr(policy, "compile", lambda name=name, **options: compiled.append((name, options)))
    compile_passes(*policies, False)
    assert not compiled
    compile_passes(*policies, True)
    assert compiled == [("policy", {"dynamic": True}), ("reference", {"dynamic": True})]


# ---- samples.jsonl


def samples_of(run):
    return read_lines(run.out / "samples.jsonl")


def test_samples_are_responses_to_the_same_prompts_throughout_a_run(train):
    """They are written every sample_every rollouts and in the last one, with their scores."""
    run = train("samples", steps=4, sample_every=2, sample_prompts=3, lr=1e-2)
    lines = samples_of(run)
    assert [line["step"] for line in lines] == [0, 2, 3]
    prompts = [[sample["prompt"] for sample in line["samples"]] for line in lines]
    assert prompts[0] == prompts[1] == prompts[2] and len(prompts[0]) == 3
    for response in (response for line in lines for response in line["samples"]):
        assert response["score"] == (response["prompt"] + response["response"]).count("e")
    responses = [[sample["response"] for sample in line["samples"]] for line in lines]
    assert responses[0] != responses[2]


def test_an_unchanged_policy_gives_the_same_samples(train):
    """All samples of a run use one seed, so they differ only because of the policy."""
    run = train("frozen", steps=3, sample_every=1, lr=1e-12)
    first, second, third = (line["samples"] for line in samples_of(run))
    assert first == second == third


def test_samples_do_not_change_a_run_and_are_not_written_with_sample_prompts_0(trained, train):
    run = train("without", sample_prompts=0)
    assert not (run.out / "samples.jsonl").exists() and torch.equal(parameters(run.policy), parameters(trained.policy))
    assert [line["score"] for line in run.metrics] == [line["score"] for line in trained.metrics]


def test_a_score_that_is_not_finite_is_null_in_the_samples():
    policy, words = tiny_policy(), FakeTokenizer()
    pool, cfg = np.ones((9, 3), dtype=np.int64), config(sample_prompts=2)
    samples = sample(policy, words, lambda texts: tensor([math.nan, 1.0]), pool, 0, cfg)
    assert [line["score"] for line in samples] == [None, 1.0] and "NaN" not in json.dumps(samples)


def test_another_seed_gives_other_samples_and_scores_have_four_decimals():
    policy, words, pool = tiny_policy(), FakeTokenizer(), np.ones((9, 3), dtype=np.int64)

    def samples(seed):
        return sample(policy, words, lambda texts: tensor([1 / 3] * 4), pool, 0, config(seed=seed))

    assert samples(0) == samples(0) != samples(1)
    assert {sample["score"] for sample in samples(0)} == {0.3333}
    assert all(sample["prompt"] == "1 1 1" for sample in samples(0))


# ---- reward and judge


def test_reward_and_judge_score_each_text_of_a_rollout_once(train, tmp_path, monkeypatch):
    """One forward pass gives the score and the positive share: catches a second pass for the log."""
    folders, passes = {}, []
    for seed, name in enumerate(("reward", "judge")):
        write_bert(tmp_path / name, seed=seed)
        folders[name] = str(tmp_path / name)
    logits = SentimentReward.logits

    def count(classifier, texts):
        passes.append((classifier, len(texts)))
        return logits(classifier, texts)

    monkeypatch.setattr(SentimentReward, "logits", count)
    run = train("classifiers", steps=2, sample_prompts=0, self_check=False, **folders)
    assert [n for _, n in passes] == [8] * 4 and len({id(classifier) for classifier, _ in passes}) == 2
    for line in run.metrics:
        assert {"positive_by_reward", "positive_by_judge"} <= set(line) and line["seconds_judge"] > 0


# ---- the log


class FakeWandb(types.ModuleType):
    """The functions of wandb that RunLog calls; they record their arguments."""

    def __init__(self):
        super().__init__("wandb")
        self.ids, self.inits, self.logged = iter(["first", "second"]), [], []
        self.util = types.SimpleNamespace(generate_id=lambda: next(self.ids))
        self.__spec__ = importlib.util.spec_from_loader("wandb", None, origin="here")

    def init(self, **settings):
        self.inits.append(settings)
        return types.SimpleNamespace(log=lambda metrics, step: self.logged.append((step, metrics)), finish=lambda: None)


def test_a_resumed_run_continues_its_wandb_run_and_a_new_run_does_not(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = config(out=str(tmp_path), report_to="wandb")
    for first_step in (0, 1, 0):
        log = RunLog(cfg, first_step=first_step)
        log.write(first_step, score=1.0)
        log.close()
    assert [run["id"] for run in wandb.inits] == ["first", "first", "second"]
    assert {run["resume"] for run in wandb.inits} == {"allow"} and wandb.inits[0]["config"] == asdict(cfg)
    assert wandb.logged[1] == (1, {"score": 1.0})
    (tmp_path / "wandb_id").write_text("")  # left empty by a crash
    wandb.ids = iter(["third"])
    RunLog(cfg, first_step=1).close()
    assert wandb.inits[-1]["id"] == "third"
    RunLog(config(out=str(tmp_path), report_to="none")).close()
    assert not (tmp_path / "wandb_id").exists()  # its run was deleted
    wandb.__spec__ = importlib.util.spec_from_loader("wandb", None)  # a folder named wandb with logs, not the package
    with pytest.raises(BadInput, match="wandb, which is not installed"):
        RunLog(cfg)


def test_a_run_is_trained_on_the_reward_and_only_logs_the_judge(train, bert_folder, judge_folder):
    """Two runs in which reward and judge are swapped: their first rollouts have the same texts."""
    pairs = {"original": (bert_folder, judge_folder), "swapped": (judge_folder, bert_folder)}
    one, other = (
        train(name, reward=str(reward), judge=str(judge), positive_label="", self_check=False, steps=1).metrics[0]
        for name, (reward, judge) in pairs.items()
    )
    assert one["positive_by_reward"] == other["positive_by_judge"] != one["positive_by_judge"]
    assert one["positive_by_judge"] == other["positive_by_reward"] and one["score"] != other["score"]


def test_the_optimizer_has_the_learning_rate_and_the_epsilon_of_the_config(train):
    """Adam's defaults are 1e-3 and 1e-8."""
    run = train("rate", steps=1, lr=3e-4, adam_eps=2e-5)
    (group,) = run.stepper.optimizers[0].param_groups
    assert run.metrics[0]["lr"] == group["lr"] == 3e-4 and group["eps"] == 2e-5


def test_log_lines_without_a_step_are_dropped(tmp_path):
    for name in ("log.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text('{"id": 1}\n[2]\n{"step": "x"}\n{"step": 0, "seconds": 1.0}\n')
    RunLog(config(out=str(tmp_path), report_to="none"), first_step=1).close()
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 0, "seconds": 1.0}\n'
