"""Write oracles.json: the results of two published implementations of PPO for language models on random inputs.

    python3 -m venv trl && trl/bin/pip install torch==2.13.0
    trl/bin/pip install trl==0.11.4 transformers==4.46.3 "datasets<4" "numpy<2.3" "accelerate<1.3" pandas rich
    trl/bin/python tests/oracles.py

trl: Hugging Face's TRL 0.11.4, called directly, with gradients by autograd. openai: lm-human-preferences (Ziegler et
al. 2019), which needs TensorFlow 1, so its formulas are written here in numpy, with its gradient derived by hand.
test_oracles.py compares our functions with the file and needs neither. Inputs are drawn by numpy, so that they do not
depend on the version of torch.

Shapes: B episodes of P prompt tokens and up to T response tokens, V vocabulary. The tokens after the end of a response
hold garbage, which TRL masks. OpenAI's responses all have T tokens, so the garbage counts as real.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import torch
from trl import PPOConfig, PPOTrainer
from trl.core import logprobs_from_logits, masked_whiten
from trl.trainer.utils import AdaptiveKLController, FixedKLController

B, P, T, V, EOS = 4, 2, 6, 7, 0
LENGTHS = np.array([3, 6, 4, 1])  # of the responses; one that is shorter than T ends with EOS
MASK = np.arange(T) < LENGTHS[:, None]
PUBLISHED = dict(gamma=1.0, lam=0.95, clip_eps=0.2, value_clip=0.2, vf_coef=0.1, kl_coef=0.2, whiten_rewards=False)
CASES = [
    PUBLISHED,
    PUBLISHED | dict(gamma=0.9, lam=0.5, clip_eps=0.1, value_clip=0.5, vf_coef=0.5, kl_coef=1.0),
    PUBLISHED | dict(gamma=0.95, lam=1.0, clip_eps=0.3, value_clip=0.05, vf_coef=1.0, kl_coef=0.0),
    PUBLISHED | dict(gamma=0.99, lam=0.9, whiten_rewards=True),
]
TRL_NAMES = dict(clip_eps="cliprange", value_clip="cliprange_value", kl_coef="init_kl_coef")
TRL_STATS = dict(
    loss="ppo/loss/total", pg_loss="ppo/loss/policy", vf_loss="ppo/loss/value", approx_kl="ppo/policy/approxkl",
    clip_frac="ppo/policy/clipfrac", vf_clip_frac="ppo/val/clipfrac", explained_variance="ppo/val/var_explained",
    kl="objective/kl", entropy="objective/entropy", score="ppo/mean_scores", score_std="ppo/std_scores",
)  # fmt: skip


def draw_inputs():
    """Return samples, logits of policy and reference, values, scores, and the changes by an update."""
    rng = np.random.default_rng(0)

    def draw(*shape, std=1.0):
        return (std * rng.standard_normal(shape)).round(3)

    sequences = rng.integers(1, V, (B, P + T))
    sequences[LENGTHS < T, P + LENGTHS[LENGTHS < T] - 1] = EOS
    garbage = np.arange(P + T) >= P - 1 + LENGTHS[:, None]  # a token is predicted one position before it
    return dict(
        sequences=sequences,
        logits=np.where(garbage[..., None], draw(B, P + T, V, std=5), draw(B, P + T, V)),
        ref_logits=draw(B, P + T, V),
        state_values=np.where(garbage, 7.0, draw(B, P + T)),
        scores=draw(B, std=16).round() / 8,  # exact in float32, the dtype of scores in rollout
        logprob_changes=draw(B, T, std=0.25),
        value_changes=draw(B, T, std=0.4),
        near_equal=(1e-4 * draw(B, T)).round(7),
    )


# ---- TRL


def trl_step(cfg, inputs, kl_penalty="kl"):
    """Return the results of PPOTrainer.step at its real tokens, and its stats, for a rollout of one minibatch."""
    x = SimpleNamespace(**{name: torch.tensor(array) for name, array in inputs.items()})
    settings = {TRL_NAMES.get(name, name): value for name, value in cfg.items()}
    config = PPOConfig(batch_size=B, mini_batch_size=B, kl_penalty=kl_penalty, **settings)
    trainer = SimpleNamespace(config=config, kl_ctl=FixedKLController(cfg["kl_coef"]), is_encoder_decoder=False)
    trainer._kl_penalty = lambda *logprobs: PPOTrainer._kl_penalty(trainer, *logprobs)
    queries, responses = list(x.sequences[:, :P]), [row[P : P + n] for row, n in zip(x.sequences, LENGTHS)]
    attention = torch.tensor(np.c_[np.ones((B, P)), MASK]).long()

    def forward(logits):
        network = Mock(side_effect=lambda **_: (logits, None, x.state_values))
        model_inputs = dict(input_ids=x.sequences, attention_mask=attention)
        return PPOTrainer.batched_forward_pass(trainer, network, queries, responses, model_inputs, return_logits=True)

    old_logprobs, logits, old_values, mask = forward(x.logits)
    ref_logprobs, ref_logits, _, _ = forward(x.ref_logits)
    mask, pair = mask.double(), (old_logprobs, ref_logprobs)
    if kl_penalty == "full":
        pair = [logprobs_from_logits(table, None, gather=False) for table in (logits, ref_logits)]
    rewards, penalty, kls = PPOTrainer.compute_rewards(trainer, x.scores, *pair, mask)
    old_values, advantages, returns = PPOTrainer.compute_advantages(trainer, old_values, rewards, mask)

    logprobs, values = old_logprobs.clone(), old_values.clone()
    logprobs[:, P - 1 :] += x.logprob_changes
    values[:, P - 1 :] += x.value_changes
    logprobs.requires_grad_(), values.requires_grad_()
    tables = old_logprobs, old_values, logits, values, logprobs, mask, advantages, returns
    pg_loss, vf_loss, stats = PPOTrainer.loss(trainer, *tables)
    (pg_loss + vf_loss).backward()
    stats = {name: value[None] for name, value in stats.items()}
    data = dict(masks=mask, kls=kls, logprobs=old_logprobs, ref_logprobs=ref_logprobs, scores=x.scores)
    data |= dict(queries=queries, responses=responses, non_score_reward=penalty, train_stats=stats)
    logged = PPOTrainer.record_step_stats(trainer, cfg["kl_coef"], **data)
    tables = dict(logprobs=old_logprobs, values=old_values, rewards=rewards, advantages=advantages, returns=returns)
    tables |= dict(grad_logprobs=logprobs.grad, grad_values=values.grad)
    real = {name: table[mask.bool()] for name, table in tables.items()}
    return real | {name: logged[theirs] for name, theirs in TRL_STATS.items()}


# ---- OpenAI: no mask, every mean is over all tokens


def openai_logprobs(sequences, logits, temperature=1.0):
    logits = logits[:, P - 1 : -1] / temperature
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logp, sequences[:, P:, None], -1)[..., 0]


def openai_whiten(x, shift_mean=True):
    scaled = (x - x.mean()) / np.sqrt(x.var() + 1e-8)  # population variance
    return scaled if shift_mean else scaled + x.mean()


def openai_step(cfg, inputs):
    """Return the results for one minibatch: rewards and advantages are whitened within it, not within the rollout."""
    c, x = SimpleNamespace(**cfg), SimpleNamespace(**inputs)
    old_logprobs, old_values = openai_logprobs(x.sequences, x.logits), x.state_values[:, P - 1 : -1]
    kl = old_logprobs - openai_logprobs(x.sequences, x.ref_logits)
    rewards = -c.kl_coef * kl
    rewards[:, -1] += x.scores
    whitened = openai_whiten(rewards, shift_mean=False) if c.whiten_rewards else rewards
    deltas = whitened + c.gamma * np.c_[old_values[:, 1:], np.zeros(len(whitened))] - old_values
    raw = np.zeros_like(deltas)
    for k in range(T):  # A_t is the sum over k of (gamma lam)^k delta_{t+k}
        raw[:, : T - k] += (c.gamma * c.lam) ** k * deltas[:, k:]
    advantages, returns = openai_whiten(raw), raw + old_values

    ratio, values = np.exp(x.logprob_changes), old_values + x.value_changes
    pg, pg_clipped = -advantages * ratio, -advantages * ratio.clip(1 - c.clip_eps, 1 + c.clip_eps)
    near_old = values.clip(old_values - c.value_clip, old_values + c.value_clip)
    errors, errors_clipped = (values - returns) ** 2, (near_old - returns) ** 2
    pg_loss, vf_loss = np.maximum(pg, pg_clipped).mean(), 0.5 * np.maximum(errors, errors_clipped).mean()
    tables = dict(logprobs=old_logprobs, values=old_values, rewards=rewards, advantages=advantages, returns=returns)
    # d ratio / d logprob is the ratio; the clipped term is a constant
    tables |= dict(grad_logprobs=pg * (pg >= pg_clipped) / pg.size)
    tables |= dict(grad_values=c.vf_coef * (values - returns) * (errors >= errors_clipped) / errors.size)
    return {name: table.ravel() for name, table in tables.items()} | dict(
        loss=pg_loss + c.vf_coef * vf_loss, pg_loss=pg_loss, vf_loss=vf_loss, clip_frac=(pg_clipped > pg).mean(),
        vf_clip_frac=(errors_clipped > errors).mean(), approx_kl=0.5 * (x.logprob_changes**2).mean(),
        kl=kl.sum(1).mean(), entropy=-old_logprobs.sum(1).mean(), score=x.scores.mean(),
    )  # fmt: skip


def main():
    inputs, controller, updates = draw_inputs(), AdaptiveKLController(0.2, target=6.0, horizon=10_000), []
    for kl, episodes in ((12, 256), (6.3, 128), (-3, 256), (5.5, 512)):
        controller.update(kl, episodes)  # OpenAI's is the same
        updates.append([kl, episodes, controller.value])
    unchanged, extreme = (
        dict(logprob_changes=np.full((B, T), log_ratio), value_changes=np.zeros((B, T))) for log_ratio in (0.0, 25.0)
    )
    near_equal = inputs["near_equal"]

    def both(cfg, **changes):
        return dict(config=cfg, trl=trl_step(cfg, inputs | changes), openai=openai_step(cfg, inputs | changes))

    oracles = dict(
        prompt_len=P,
        mask=MASK,
        inputs=inputs,
        cases=[both(cfg) for cfg in CASES],
        first_step=both(PUBLISHED, **unchanged),
        extreme_ratio=both(PUBLISHED, **extreme),  # a ratio of e^25 for every token
        minibatch=openai_step(PUBLISHED, {name: array[:2] for name, array in inputs.items()}),
        penalties={kind: trl_step(PUBLISHED, inputs, kind) for kind in ("abs", "mse", "full")},
        logprobs_at_temperature_0_7=openai_logprobs(inputs["sequences"], inputs["logits"], temperature=0.7),
        whitened=dict(
            trl=masked_whiten(*map(torch.tensor, (near_equal, 1.0 * MASK))), openai=openai_whiten(near_equal)
        ),
        controller=updates,
    )
    text = json.dumps(oracles, default=lambda array: array.tolist())
    text = json.dumps(json.loads(text, parse_float=lambda x: float(f"{float(x):.12g}")), indent=1)  # 12 digits
    text = re.sub(r"\[[^][{}]*\]", lambda row: " ".join(row[0].split()), text)  # one row of numbers per line
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
