"""PPO end to end against problems with a known answer: rollout and update as main runs them, on a tiny GPT-2."""

import copy
import random

import pytest
import torch
from test_ppo import EOS, FakeTokenizer
from test_ppo import tiny_policy as any_policy

from analysis.metrics import distinct
from config import PPOConfig
from ppo import rollout, update
from runtime.monitor import rollout_metrics
from runtime.optimizer import Stepper


def config(**changes):
    small = dict(batch_size=256, minibatch_size=64, micro_batch_size=64, lr=3e-3, lr_end=0.0, kl_target=0)
    return PPOConfig(**(small | dict(min_prompt_len=1, max_prompt_len=1) | changes))


def tiny_policy(vocab_size, seed=0, spread=0.05):
    """Near enough to uniform that every token is sampled."""
    return any_policy(seed, vocab_size, spread)


def train(policy, reward, cfg, prompt=1, ref_policy=None):
    """main's loop without files, the learning rate falling to 0: the metrics of every rollout. Changes policy."""
    ref_policy = ref_policy or copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), cfg.lr, eps=cfg.adam_eps)
    stepper, logs = Stepper(policy, [optimizer], cfg.grad_clip), []
    generator, prompts = torch.Generator().manual_seed(0), torch.full((cfg.batch_size, 1), prompt)
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - (1 - cfg.lr_end) * step / cfg.steps)
        batch = rollout(policy, ref_policy, FakeTokenizer(), reward, prompts, cfg.kl_coef, cfg, generator)
        few = [ids[kept].tolist() for ids, kept in zip(batch.sequences[:32, batch.prompt_len :], batch.mask)]
        diversity = {"distinct_2": distinct(few, 2).mean()}  # of 32: 256 repeat all bigrams of 10 tokens anyway
        logs.append(rollout_metrics(batch, policy, ref_policy, 0.0, cfg) | diversity)
        update(policy, stepper, batch, cfg, generator)
    return logs


def responses(texts):
    return [text.split()[1:] for text in texts]


def first_probs(policy, prompt=1):
    """What the policy says after the prompt: (V,)."""
    return policy.gpt2(torch.tensor([[prompt]]))[0, 0].softmax(-1).detach()


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_policy_reaches_the_optimum_of_its_objective(beta, advantage):
    """E2E-1: argmax E[score] - beta KL is ref * exp(score / beta), here over 5 responses of one token.

    A wrong sign of the KL, or k3 in the reward, ends at one token; KL counted twice falls short.
    """
    policy = tiny_policy(5)
    ref_probs, scores = first_probs(policy), torch.tensor([0.0, 0, 1, 0, 0])
    train(
        policy,
        lambda texts: [float(words == ["2"]) for words in responses(texts)],
        config(steps=40, response_len=1, kl_coef=beta, advantage=advantage),
    )
    optimum = (ref_probs.log() + scores / beta).softmax(-1)
    assert optimum[2] - ref_probs[2] > 0.15
    assert (first_probs(policy) - optimum).abs().max() < 0.02


@pytest.mark.parametrize(("advantage", "reaches"), [("gae", True), ("rloo", True), ("grpo", False)])
def test_only_grpo_misses_the_optimum_of_a_random_score(advantage, reaches):
    """E2E-1 with a score of 4 in one of four cases, so 1 on average: the optimum is as above.

    Divided by the deviation of its group, a rare high score counts for less than a common low one: GRPO stays where it
    began. Where scores are certain it meets the optimum, since there the rewards of a group are equal.
    """
    policy, lottery = tiny_policy(5), random.Random(0)
    ref_probs, scores = first_probs(policy), torch.tensor([0.0, 0, 1, 0, 0])
    train(
        policy,
        lambda texts: [4.0 * (words == ["2"] and lottery.random() < 0.25) for words in responses(texts)],
        config(steps=40, response_len=1, kl_coef=1.0, advantage=advantage),
    )
    error = (first_probs(policy) - (ref_probs.log() + scores).softmax(-1)).abs().max()
    assert error < 0.04 if reaches else error > 0.1 and (first_probs(policy) - ref_probs).abs().max() < 0.05


def test_kl_penalty_alone_moves_the_policy_back_to_its_reference():
    """E2E-2: +beta KL would drive it away; a reference that is the policy itself has nothing to pull to."""
    policy, ref_policy = tiny_policy(8, spread=0.2), tiny_policy(8, seed=1, spread=0.2)
    cfg = config(steps=20, lr=1e-2, response_len=3, kl_coef=1.0)
    logs = train(policy, lambda texts: torch.zeros(len(texts)), cfg, ref_policy=ref_policy)
    first, last = logs[0]["kl_exact"], sum(log["kl_exact"] for log in logs[-3:]) / 3
    assert first > 0.5 and 0 <= last < 0.1 * first


def share_of_sevens(texts):
    return [words.count("7") / 4 for words in responses(texts)]


@pytest.mark.parametrize("sign", [1, -1])
def test_policy_learns_rewarded_tokens_and_unlearns_penalized_ones(sign):
    """E2E-3: score is the share of id 7 among the response tokens, and drifting is free: so is saying one thing."""
    policy = tiny_policy(10)

    def reward(texts):
        return [sign * share for share in share_of_sevens(texts)]

    logs = train(policy, reward, config(steps=20, lr=1e-2, response_len=4, kl_coef=0.0))
    first, last = logs[0], logs[-1]
    assert 0.02 < sign * first["score"] < 0.3
    assert last["score"] >= 0.8 if sign == 1 else abs(last["score"]) < 0.1 * abs(first["score"])
    assert first["kl"] == pytest.approx(0, abs=1e-6) and last["kl_exact"] > 0.1 and last["kl_k3"] > 0.1
    assert last["entropy"] < 0.5 * first["entropy"] if sign == 1 else last["entropy"] > 0.5
    assert sign == -1 or last["distinct_2"] < 0.05


def test_with_the_kl_penalty_the_reward_rises_and_responses_stay_diverse():
    """The same reward at a price: 10 tokens, so about e^2.5 / (e^2.5 + 9) = .58 count_sevens at 2.8 nats, and not one text.

    Without the penalty the run above ends at a score of 1, 9.4 nats, distinct-2 of .01.
    """
    policy = tiny_policy(10)
    logs = train(policy, share_of_sevens, config(steps=20, lr=1e-2, response_len=4, kl_coef=0.1))
    first, last = logs[0], {name: sum(log[name] for log in logs[-5:]) / 5 for name in logs[0]}
    assert first["score"] < 0.1 and 0.45 < last["score"] < 0.7
    assert first["kl_exact"] < 1e-6 and 2 < last["kl_exact"] < 4 and abs(last["kl"] - last["kl_exact"]) < 1
    assert first["distinct_2"] > 0.5 and last["distinct_2"] > 0.2


def test_policy_learns_to_end_its_response():
    """E2E-4: where the end-of-text token is masked out, nothing is learned from ending."""
    policy = tiny_policy(10)
    cfg = config(steps=15, lr=1e-2, response_len=3, kl_coef=0.0, missing_eos_penalty=1.0)
    logs = train(policy, lambda texts: torch.zeros(len(texts)), cfg)
    assert logs[0]["eos_frac"] < 0.5 and logs[-1]["eos_frac"] > 0.9
    assert first_probs(policy)[EOS] > first_probs(tiny_policy(10))[EOS]
