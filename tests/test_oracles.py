"""Compare our functions with TRL 0.11.4 and OpenAI's lm-human-preferences on the same random inputs.

oracles.py writes oracles.json. TRL's responses have unequal lengths, with garbage after their ends. OpenAI's all have
T tokens, and the garbage counts as real. For each intended difference, a test asserts their result and ours.
"""

import json
from math import exp
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import PPOConfig
from model import GPT2, GPT2Config, Policy
from ppo import AdaptiveKL, gae, ppo_loss, rollout, token_rewards, whiten
from runtime.monitor import rollout_metrics


def tensors(x):
    """Convert lists of numbers from JSON to tensors (float64, int64 or bool), and objects to namespaces."""
    if isinstance(x, dict):
        return SimpleNamespace(**{name: tensors(value) for name, value in x.items()})
    if isinstance(x, list):
        return [tensors(value) for value in x] if isinstance(x[0], dict) else torch.from_numpy(np.array(x))
    return x


FILE = tensors(json.loads(Path(__file__).with_name("oracles.json").read_text(encoding="utf-8")))
IN, P, MASK = FILE.inputs, FILE.prompt_len, FILE.mask
MASKS = {"trl": MASK, "openai": torch.ones_like(MASK)}
T, LENGTHS = MASK.shape[1], MASK.sum(1, keepdim=True)


def steps(*cases, libraries=MASKS):
    """Return each library's results for each case, with config and mask; tensors are (N,), the real tokens in order."""
    return [
        SimpleNamespace(library=library, mask=MASKS[library], config=case.config, **vars(getattr(case, library)))
        for library in libraries
        for case in cases
    ]


def table_policy(logits):
    """Return a Policy whose hidden states are the logits of the file, with the value as the last element."""
    V = logits.shape[2]
    hidden = torch.cat([logits, IN.state_values[..., None]], dim=2)  # (B, P + T, V + 1)
    gpt2 = GPT2(GPT2Config(vocab_size=V, n_positions=P + T, n_embd=V + 1, n_layer=0, n_head=1)).double()
    gpt2.trunk, gpt2.generate = lambda ids: hidden[:, : ids.shape[1]], lambda *_: IN.sequences
    policy = Policy(gpt2).requires_grad_(False)
    gpt2.wte.weight.copy_(torch.eye(V, V + 1))
    policy.value_head.weight[0, V] = 1
    return policy


POLICY, REF_POLICY = table_policy(IN.logits), table_policy(IN.ref_logits)
LOGPROBS, VALUES = POLICY(IN.sequences, P)  # (B, T) each, as in a rollout
KL = LOGPROBS - REF_POLICY(IN.sequences, P)[0]
TRL, OPENAI = steps(*FILE.cases, libraries=["trl"]), steps(*FILE.cases, libraries=["openai"])
every_step = pytest.mark.parametrize("step", TRL + OPENAI, ids=lambda step: step.library)


def close(actual, expected, atol=1e-9, rtol=0.0):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)
    return True


def rewards_of(step, kl=KL):
    return token_rewards(IN.scores, kl, step.mask, step.config.kl_coef)


def whitened_as(step, x, shift_mean=True):
    """Call our whiten and convert the result to the library's epsilon and variance, which are tested below."""
    real = x[step.mask]
    scale = (real.std() + 1e-8) / (real.var(correction=int(step.library == "trl")) + 1e-8).sqrt()
    mean = 0 if shift_mean else real.mean()
    return mean + (whiten(x, step.mask, shift_mean) - mean) * scale


def our_rollout(step):
    """Call our rollout with the policies, samples and scores of the file; return (Rollout, metrics)."""
    eos_id, cfg = 0 if step.library == "trl" else -1, PPOConfig(**vars(step.config), micro_batch_size=4)
    tokenizer = SimpleNamespace(eos_token_id=eos_id, batch_decode=lambda ids, **_: ["text"] * len(ids))
    batch = rollout(POLICY, REF_POLICY, tokenizer, lambda _: IN.scores, IN.sequences[:, :P], cfg.kl_coef, cfg)
    return batch, rollout_metrics(batch, POLICY, REF_POLICY, 0.0, cfg)


def loss_of(step, logprob_changes=IN.logprob_changes, value_changes=IN.value_changes):
    """Call ppo_loss with their advantages and returns; return metrics, loss and gradients by name."""
    logprobs, values = (x[step.mask].requires_grad_() for x in (LOGPROBS + logprob_changes, VALUES + value_changes))
    old = LOGPROBS[step.mask], VALUES[step.mask], step.advantages, step.returns
    loss, metrics = ppo_loss(logprobs, values, *old, PPOConfig(**vars(step.config), micro_batch_size=4))
    loss.backward()
    return metrics | dict(loss=loss.detach(), grad_logprobs=logprobs.grad, grad_values=values.grad)


# ---- results that are equal


@every_step
def test_logprobs_and_values_are_those_of_the_position_before_their_token(step):
    """TRL's own code selects the columns of the response. One position later would see the predicted token."""
    assert close(LOGPROBS[step.mask], step.logprobs) and close(VALUES[step.mask], step.values)


def test_temperature_divides_the_logits_as_in_lm_human_preferences():
    """TRL's forward pass has no temperature, so it is compared at temperature 1 only."""
    assert close(POLICY(IN.sequences, P, 0.7)[0], FILE.logprobs_at_temperature_0_7)


@every_step
def test_token_rewards_are_the_same(step):
    """The score is on the last real token, which in OpenAI's is the last column. Garbage has no reward."""
    rewards = rewards_of(step)
    assert close(rewards[step.mask], step.rewards) and not rewards[~step.mask].any()


@every_step
def test_returns_and_advantages_are_the_same(step):
    """If rewards are whitened, TRL's padding changes its advantages and short rows: see a test below."""
    rewards, leaks = rewards_of(step), step.library == "trl" and step.config.whiten_rewards
    if step.config.whiten_rewards:
        rewards = whitened_as(step, rewards, shift_mean=False)
    advantages, returns = gae(rewards, VALUES, step.mask, step.config.gamma, step.config.lam)
    same = (LENGTHS == T).expand_as(MASK)[step.mask] if leaks else slice(None)
    assert close(returns[step.mask][same], step.returns[same])
    assert leaks or close(whitened_as(step, advantages)[step.mask], step.advantages)


@pytest.mark.parametrize("step", TRL[:3] + OPENAI[:3])  # without whitened rewards
def test_rollout_combines_these_functions_as_they_do(step):
    """Here rollout itself computes advantages from samples, so the order of the functions is tested too."""
    (batch, metrics), (B, N) = our_rollout(step), (len(MASK), int(step.mask.sum()))
    assert torch.equal(batch.mask, step.mask) and close(batch.returns[step.mask], step.returns)
    assert close(batch.advantages, whiten(batch.returns - batch.values, step.mask))
    assert close(metrics["kl"], step.kl) and close(metrics["score"], step.score)
    assert close(metrics["entropy"], step.entropy * B / N)  # theirs is per response, ours per token


def test_exact_kl_is_trls_full_penalty():
    """KL(policy || reference) over the whole vocabulary. We log it; TRL also offers it as a penalty."""
    assert close(our_rollout(TRL[0])[1]["kl_exact"], FILE.penalties.full.kl)


@every_step
def test_losses_and_their_gradients_are_the_same(step):
    """Both clips, the factor one half, vf_coef once, and means over real tokens."""
    ours = loss_of(step)
    for name in ("loss", "pg_loss", "vf_loss", "grad_logprobs", "grad_values"):
        assert close(ours[name], getattr(step, name)), name
    assert close(ours["vf_clip_frac"], step.vf_clip_frac, atol=1e-7)  # computed in float32


def test_controller_gives_the_same_coefficients():
    """With the error clipped on both sides and not clipped. Both libraries have the same controller."""
    controller = AdaptiveKL(PPOConfig(kl_coef=0.2, kl_target=6.0, kl_horizon=10_000))
    for kl, episodes, coef in FILE.controller.tolist():
        controller.update(kl, episodes)
        assert close(controller.coef, coef)


# ---- intended differences: their result, ours, and the reason


@pytest.mark.parametrize("step", [TRL[0], OPENAI[0]])
def test_our_epsilon_is_added_to_the_standard_deviation_and_theirs_to_the_variance(step):
    """Ours is that of Baselines and CleanRL: values with a std of 1e-4 are whitened to variance 1, theirs to about .5.

    Also, we set the padding to 0. TRL does not, so that a sum over a row includes it.
    """
    x, real, theirs = IN.near_equal, IN.near_equal[step.mask], getattr(FILE.whitened, step.library)
    var = real.var(correction=int(step.library == "trl"))
    assert close(theirs, (x - real.mean()) / (var + 1e-8).sqrt()) and theirs[step.mask].var() < 0.7
    assert close(whiten(x, step.mask), (x - real.mean()) / (real.std() + 1e-8) * step.mask)


@pytest.mark.parametrize("step", OPENAI)
def test_openai_whitens_by_the_population_variance_and_we_by_the_unbiased_variance(step):
    """Ours is TRL's. Our advantages are smaller by sqrt((n - 1) / n): 2 % with n = 24 tokens, .03 % with 2,000."""
    ours, n = whiten((step.returns - VALUES.flatten()).view_as(MASK), step.mask).flatten(), MASK.numel()
    assert close(step.advantages.var(correction=0), 1, atol=1e-7) and close(ours.var(), 1, atol=1e-7)
    assert close(ours, step.advantages * ((n - 1) / n) ** 0.5, atol=1e-7)  # up to epsilon


def test_openai_whitens_a_minibatch_and_we_the_rollout():
    """Ours is TRL's: an advantage should not depend on the other episodes of a minibatch, here rows 0 and 1."""
    batch = our_rollout(OPENAI[0])[0]
    raw, n = (batch.returns - batch.values).flatten(), 2 * T
    assert close(FILE.minibatch.advantages, (raw[:n] - raw[:n].mean()) / raw[:n].std(correction=0), atol=1e-7)
    assert close(batch.advantages.flatten()[:n], (raw[:n] - raw.mean()) / raw.std(), atol=1e-7)


def test_trls_whitened_rewards_leak_from_padding_and_ours_do_not():
    """TRL's padding has the reward mean * (1 - 1 / std), which GAE propagates back: returns depend on the padding.

    At the last real token, our return is the reward of that token. TRL's adds the discounted rewards of the padding.
    """
    step, last, decay = TRL[3], LENGTHS - 1, TRL[3].config.gamma * TRL[3].config.lam
    rewards = rewards_of(step)
    ours, theirs = our_rollout(step)[0].returns, torch.zeros_like(rewards).masked_scatter(MASK, step.returns)
    leak = rewards[MASK].mean() * (1 - 1 / rewards[MASK].std())
    discounted = (decay ** torch.arange(T).double()).cumsum(0) - 1  # for 0, 1, 2, ... columns of padding
    assert close(ours.gather(1, last), whiten(rewards, MASK, shift_mean=False).gather(1, last))
    assert close(
        theirs.gather(1, last), ours.gather(1, last) + leak * discounted[T - LENGTHS], atol=1e-6
    )  # up to epsilon
    assert leak.abs() > 0.01


@pytest.mark.parametrize("trl, openai", list(zip(TRL, OPENAI)))
def test_openais_responses_do_not_end_and_ours_do(trl, openai):
    """OpenAI's score is always in the last column. Ours is on <|endoftext|> if the response has it."""
    kl_reward = -trl.config.kl_coef * KL
    assert close(openai.rewards.view_as(MASK)[:, -1], IN.scores + kl_reward[:, -1])
    assert close(rewards_of(trl).gather(1, LENGTHS - 1), IN.scores[:, None] + kl_reward.gather(1, LENGTHS - 1))


@pytest.mark.parametrize("kind, estimate", [("abs", torch.abs), ("mse", lambda kl: 0.5 * kl**2)])
def test_trl_offers_other_kl_estimates_as_penalty_and_we_use_only_k1(kind, estimate):
    """All are suitable for logging. As a reward, which has no gradient itself, only k1 gives the gradient of the KL."""
    assert close(getattr(FILE.penalties, kind).rewards, rewards_of(TRL[0], estimate(KL))[MASK])
    assert close(our_rollout(TRL[0])[0].kl, KL * MASK) and (KL[MASK] < 0).any()


@every_step
def test_their_approximate_kl_is_k2_and_ours_k3(step):
    """Neither is negative; k3 is also unbiased (Schulman, joschu.net/blog/kl-approx.html)."""
    log_ratio = IN.logprob_changes[step.mask]
    assert close(step.approx_kl, (0.5 * log_ratio**2).mean())
    assert close(loss_of(step)["approx_kl"], (log_ratio.exp() - 1 - log_ratio).mean())


@every_step
def test_their_clip_fraction_counts_tokens_without_gradient_and_ours_all_outside_the_range(step):
    """Ours is CleanRL's: it measures the change of the policy, whatever the sign of the advantages."""
    ratio = IN.logprob_changes[step.mask].exp()
    outside = (ratio - 1).abs() > step.config.clip_eps
    assert close(step.clip_frac, (outside & (step.advantages * (ratio - 1) > 0)).double().mean())
    assert close(loss_of(step)["clip_frac"], outside.double().mean(), atol=1e-7)


@pytest.mark.parametrize("step", steps(FILE.extreme_ratio))
def test_at_extreme_ratios_openai_overflows_and_trl_skips_the_minibatch_and_we_clamp(step):
    """With a ratio of e^25 for every token. TRL skips a minibatch if its mean ratio is over 10."""
    ours, cost = loss_of(step, logprob_changes=25.0, value_changes=0.0), -step.advantages
    losses = {log_ratio: torch.max(cost * exp(log_ratio), cost * 1.2).mean() for log_ratio in (20, 25)}
    assert close(step.pg_loss, losses[25] if step.library == "openai" else 0, rtol=1e-9)
    assert close(ours["pg_loss"], losses[20], rtol=1e-9) and not ours["grad_logprobs"].any()


def test_trl_logs_another_explained_variance_and_another_score_deviation():
    """Our explained variance is CleanRL's: constant values give 0. Our score_std is not Bessel-corrected, theirs is."""
    theirs, metrics, n = steps(FILE.first_step)[0], our_rollout(TRL[0])[1], len(MASK)
    errors, returns = theirs.returns - theirs.values, theirs.returns
    assert close(theirs.explained_variance, 1 - (errors**2).mean() / returns.var())
    assert close(metrics["explained_variance"], 1 - errors.var() / returns.var(), atol=1e-6)
    assert close(metrics["score_std"], theirs.score_std * ((n - 1) / n) ** 0.5, atol=1e-6)
