"""PPO for language models: train GPT-2 to increase a reward, with a KL penalty against the frozen fine-tuned model.

    python ppo.py                                        # preset gpt2: 25,600 episodes
    python ppo.py --preset mini                          # minutes on a CPU, offline
    python ppo.py --reward my_reward.py:my_function      # your own function: list of B texts -> B scores
    torchrun --nproc_per_node 8 ppo.py                   # on eight GPUs

Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347) with generalized advantage estimation (Schulman
et al. 2016, arXiv:1506.02438) and the KL-penalized reward of Ziegler et al. 2019 (arXiv:1909.08593).

Shapes: B episodes (prompt and response), P prompt tokens, T response tokens, N real tokens: those of the responses up
to and including <|endoftext|>. An episode has a score, each of its tokens a reward.
The details that matter, in the order of the code:
    response_mask  <|endoftext|> is an action: it stays in the mask, only the tokens after it are excluded
    token_rewards  the score is on the last real token, the KL penalty on every one; the penalty is k1, the log-ratio
    whiten         mean and variance are those of all real tokens of a rollout, not of a minibatch or a response
    gae            the value after the last real token is 0, also if the response was cut at T
    ppo_loss       both losses are pessimistic: the larger one of clipped and unclipped
    AdaptiveKL     kl_coef is adapted once per rollout, in proportion to the clipped error of the KL
    rollout        prompts have one length, so no padding; sampling uses the full softmax; old log-probabilities come
                   from the forward pass of update, so the first ratio is 1; returns are not whitened
    update         losses are means over the real tokens of a minibatch, whatever the micro-batch size
    model.Policy   the hidden state before a token gives its logits and value; the value head starts at 0; no dropout
"""

import runtime  # isort: skip  # noqa: F401 - first, since it refuses a Python older than 3.11
import copy
import time
from dataclasses import replace

import torch

from config import PPOConfig
from data import decode, load_prompts, prompt_batch
from model import compile_passes
from reward import check_finite, load_rewards, reward_fingerprint, scored, scores_so_far
from runtime.checkpoint import Checkpoints, check_run, fingerprint
from runtime.cli import run
from runtime.device import micro_batch_size, pick_device, random_generator, to_device, true_places
from runtime.distributed import ONE_PROCESS, join
from runtime.errors import BadInput, NotFinite
from runtime.hub import load_policy, open_gpt2, policy_fingerprint
from runtime.log import RunLog, ppo_sheet
from runtime.monitor import Alarms, BestPolicy, Rollout, Stopwatch, average, rollout_metrics, sample, to_floats
from runtime.optimizer import Stepper
from runtime.self_check import check_policy

# ---- the arithmetic: tensors in, tensors out. Masks are applied with `where`, since nan times False is nan


def response_mask(responses, eos_id):
    """Return True up to and including the first eos_id of a response, False after it: (B, T) ids -> (B, T) bool."""
    is_eos = responses == eos_id
    return is_eos.cumsum(1) - is_eos.long() == 0


def token_rewards(scores, kl, mask, kl_coef):
    """Distribute R(x, y) of Ziegler et al. 2019, Eq. 2, over the tokens: -kl_coef * kl on each, the score on the last.

    scores: (B,). kl: (B, T), log-probability minus that of the reference, nats. Returns (B, T), 0 outside the mask.
    """
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    return (-kl_coef * kl).where(mask, 0).scatter_add(1, last, scores[:, None])


def whiten(x, mask, shift_mean=True):
    """Scale x (B, T) to variance 1 (unbiased) over the mask, bool or indices, and shift its mean to 0, or keep it."""
    real, whitened = x[mask], torch.zeros_like(x)  # (N,), (B, T)
    if len(real) > 1:  # a single token has no variance
        real = (real - real.mean()) / (real.std() + 1e-8) + (0 if shift_mean else real.mean())
    whitened[mask] = real
    return whitened


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, Eq. 16), backwards from the last real token.

    rewards, values, mask: (B, T). Returns advantages and returns (advantage + value), (B, T) each, 0 outside the mask.
    """
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def group_advantages(rewards, cfg):
    """Compare the k responses to a prompt: (B,) rewards of responses -> (B,) advantages.

    rloo: the reward minus the mean of the other k - 1 (Ahmadian et al. 2024, arXiv:2402.14740). grpo: minus the mean of
    all k, divided by their standard deviation (Shao et al. 2024, arXiv:2402.03300; the KL stays in the reward here).
    """
    k = cfg.samples_per_prompt
    groups = rewards.view(-1, k)  # the k rows of a prompt are adjacent
    scale = groups.std(1, keepdim=True) + 1e-4 if cfg.advantage == "grpo" else (k - 1) / k  # minus the others' mean
    return ((groups - groups.mean(1, keepdim=True)) / scale).flatten()


def ppo_loss(logprobs, values, old_logprobs, old_values, advantages, returns, cfg):
    """Clipped surrogate (Schulman et al. 2017, Eq. 7) plus vf_coef times the value loss (Eq. 9), no entropy bonus.

    Every tensor is (N,), the real tokens of a minibatch; logprobs and values carry gradient. Clipping the value loss
    is not in the paper: it follows openai/lm-human-preferences. Returns the loss and detached metrics.
    """
    log_ratio = logprobs - old_logprobs  # nats; 0 before the first step
    ratio = log_ratio.clamp(max=20).exp()  # e^20 is far outside the clip range, and finite
    clipped = ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps)
    pg_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
    near_old = old_values + (values - old_values).clamp(-cfg.value_clip, cfg.value_clip)
    vf_errors, vf_errors_clipped = (values - returns) ** 2, (near_old - returns) ** 2
    vf_loss = 0.5 * torch.max(vf_errors, vf_errors_clipped).mean()
    metrics = {
        "pg_loss": pg_loss,
        "vf_loss": vf_loss,
        "max_log_ratio": log_ratio.abs().max(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),  # k3, KL(old policy || policy): joschu.net/blog/kl-approx.html
        "clip_frac": ((ratio - 1).abs() > cfg.clip_eps).float().mean(),
        "vf_clip_frac": (vf_errors_clipped > vf_errors).float().mean(),
    }
    vf_coef = cfg.vf_coef if cfg.advantage == "gae" else 0.0  # otherwise the value head is unused
    return pg_loss + vf_coef * vf_loss, {name: value.detach() for name, value in metrics.items()}


class AdaptiveKL:
    """Proportional controller of kl_coef (Ziegler et al. 2019, section 2.2): up if the KL is over target, else down."""

    saved = ("coef",)  # the attributes that a checkpoint stores

    def __init__(self, cfg):
        self.coef, self.target, self.horizon = cfg.kl_coef, cfg.kl_target, cfg.kl_horizon

    def update(self, kl, episodes):
        """Call once per rollout. kl: mean nats per response; episodes: their number. A target of 0 keeps coef fixed."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon


# ---- rollout and update


@torch.no_grad()
def rollout(policy, ref_policy, tokenizer, reward_fn, prompts, kl_coef, cfg, rng=None, judge=None, ranks=ONE_PROCESS):
    """Generate a response to each prompt, score it, and compute the advantage of each token: a Rollout.

    prompts: (B, P) ids. reward_fn, judge: list of B texts -> (B,) scores; the judge is only logged. ranks: the
    processes of the run; each computes its share of the rows and gets the whole rollout. Raises NotFinite for a score,
    log-probability or value that is not finite, and BadInput if the reward of a user fails.
    """
    watch, prompt_len, eos_id = Stopwatch(), prompts.shape[1], tokenizer.eos_token_id

    # 1. generate
    sequences = ranks.gather(policy.gpt2.generate(ranks.share(prompts), cfg.response_len, cfg.temperature, eos_id, rng))
    ids, device = sequences.cpu(), sequences.device  # the host waits for a copy from the GPU: few are made
    host_mask = response_mask(ids[:, prompt_len:], eos_id)
    end = prompt_len + host_mask.sum(1).max().item()  # trim to the longest response
    ids, sequences, host_mask = ids[:, :end], sequences[:, :end], host_mask[:, : end - prompt_len]  # (B, P + T), (B, T)
    mask, real = to_device(host_mask, device), true_places(host_mask, device)
    watch.lap("generate")

    # 2. score prompt and response, decoded together: a character can begin in one and end in the other
    texts, clip = decode(ids, tokenizer), cfg.score_clip or float("inf")
    potentials = torch.zeros_like(mask, dtype=torch.float)  # (B, T)
    if cfg.shaping_every and cfg.advantage == "gae":  # the score before each token is a part of its value
        so_far = scores_so_far(lambda part: score(reward_fn, part, device, ranks)[0], ids, prompt_len, tokenizer, cfg)
        potentials = so_far.clamp(-clip, clip)
    scores, positive_by_reward = score(reward_fn, texts, device, ranks)  # (B,) each
    ended = (sequences[:, prompt_len:] == eos_id).any(1)
    penalized = scores.clamp(-clip, clip) - cfg.missing_eos_penalty * ~ended
    watch.lap("score")
    positive_by_judge = score(judge, texts, device, ranks)[1] if judge else None
    watch.lap("judge")

    # 3. log-probabilities of the policy and of the reference, and values
    logprobs, values = logprobs_and_values(policy, sequences, prompt_len, cfg, ranks)  # (B, T) each
    checked = torch.stack([scores + potentials.sum(1), (logprobs + values).where(mask, 0).sum(1)]).cpu()
    check_finite("score", checked[0], texts)
    check_finite("log-probability or value", checked[1], texts)
    watch.lap("logprobs")
    ref_logprobs, _ = logprobs_and_values(ref_policy, sequences, prompt_len, cfg, ranks)
    check_finite("the reference's log-probability", ref_logprobs.where(mask, 0).sum(1), texts)
    watch.lap("reference")

    # 4. rewards and advantages
    kl = (logprobs - ref_logprobs).where(mask, 0)
    rewards = token_rewards(penalized.to(kl.dtype), kl, mask, kl_coef)
    objective = rewards.sum(1)
    if cfg.whiten_rewards and host_mask.sum() > 1:  # a single token has no variance
        potentials = potentials / (rewards[real].std() + 1e-8)  # in the unit of the whitened rewards
        rewards = whiten(rewards, real, shift_mean=False)
    if cfg.advantage == "gae":
        advantages, returns = gae(rewards, values + potentials, mask, cfg.gamma, cfg.lam)
        returns = (returns - potentials).where(mask, 0)  # the value head learns what the potentials lack
    else:  # a response is one action: all its tokens have its advantage
        advantages = returns = group_advantages(rewards.sum(1), cfg)[:, None].where(mask, 0)
    advantages = whiten(advantages, real)  # over the whole rollout; the returns keep the scale of the rewards
    return Rollout(
        sequences=sequences, prompt_len=prompt_len, mask=host_mask, logprobs=logprobs, values=values, kl=kl,
        potentials=potentials, advantages=advantages, returns=returns, scores=scores, objective=objective, ended=ended,
        positive_by_reward=positive_by_reward, positive_by_judge=positive_by_judge, texts=texts, seconds=watch.seconds,
    )  # fmt: skip


def score(reward_fn, texts, device, ranks):
    """Return (scores, positive) of all texts, (B,) each, on the device; see reward.scored."""
    scores, positive = ranks.attempt(scored, reward_fn, ranks.share(texts))
    return tuple(x if x is None else ranks.gather(to_device(x, device)) for x in (scores, positive))


def logprobs_and_values(policy, sequences, prompt_len, cfg, ranks):
    """Return log-probabilities and values of the response tokens of (B, P + T) ids, (B, T) each, as update has them.

    Under torch.compile, a pass without gradients or on a view would have another graph, which rounds differently.
    """
    with torch.set_grad_enabled(cfg.compile):
        shares = (ranks.share(micro_batch).clone() for micro_batch in sequences.split(cfg.micro_batch_size))
        parts = [[ranks.gather(x.detach()) for x in policy(share, prompt_len, cfg.temperature)] for share in shares]
    return tuple(map(torch.cat, zip(*parts)))


def update(policy, stepper, batch, cfg, rng=None, ranks=ONE_PROCESS):
    """Train for K epochs on the minibatches of a rollout, one optimizer step each. Return the means of the metrics."""
    start, device, minibatches = time.time(), batch.sequences.device, []
    for _ in range(cfg.ppo_epochs):
        for rows in torch.randperm(len(batch.mask), generator=rng).split(cfg.minibatch_size):  # each episode once
            parts, weights, tokens = [], [], batch.mask[rows].sum() / ranks.size
            for micro_batch in rows.split(cfg.micro_batch_size):
                micro_batch = ranks.share(micro_batch)
                mask = batch.mask[micro_batch]
                micro_batch, real = to_device(micro_batch, device), true_places(mask, device)
                logprobs, values = policy(batch.sequences[micro_batch], batch.prompt_len, cfg.temperature)
                old = (x[micro_batch][real] for x in (batch.logprobs, batch.values, batch.advantages, batch.returns))
                loss, metrics = ppo_loss(logprobs[real], values[real], *old, cfg)
                weight = mask.sum() / tokens  # so that losses are means over the real tokens of the minibatch
                stepper.backward(loss * weight)
                parts.append(metrics)
                weights.append(weight)
            minibatches.append(average(parts, weights) | {"grad_norm": stepper.step()})
    metrics = average(minibatches)
    for end, minibatch in (("first", minibatches[0]), ("last", minibatches[-1])):
        metrics |= {f"{end}_{name}": minibatch[name] for name in ("approx_kl", "max_log_ratio")}
    metrics = ranks.mean(to_floats(metrics))
    return metrics | {"skipped_steps": stepper.skipped, "lr": stepper.lr, "seconds_update": time.time() - start}


def main(cfg):
    check_run(cfg, "model.safetensors")
    device, dtype = pick_device(cfg)
    ranks = join(device, cfg)
    folder, gpt2_config, tokenizer = open_gpt2(cfg.policy)
    pool = load_prompts(cfg, "prompts", gpt2_config, tokenizer)  # (M, P)
    reward_fn, judge = load_rewards(cfg, device, dtype)
    policy = load_policy(folder, gpt2_config, tokenizer, dtype).to(device)
    ref_policy = copy.deepcopy(policy).eval().requires_grad_(False)  # frozen
    size = micro_batch_size(cfg, cfg.minibatch_size, pool.shape[1] + cfg.response_len, policy.gpt2, 6, device, ranks, 2)
    cfg = replace(cfg, micro_batch_size=size)
    print("self-check: policy:", check_policy(policy, ref_policy, prompt_batch(pool, 0, cfg).to(device), cfg))
    print(ppo_sheet(cfg, policy, reward_fn, judge, len(pool), device), flush=True)
    optimizer = torch.optim.Adam(policy.parameters(), cfg.lr, eps=cfg.adam_eps, fused=device.type != "mps")
    stepper = Stepper(policy, [optimizer], cfg.grad_clip, ranks, dtype)
    controller, alarms, best = AdaptiveKL(cfg), Alarms(cfg), BestPolicy(policy, tokenizer, cfg)
    inputs = {"prompts": fingerprint(str(pool.tolist())), "policy": policy_fingerprint(policy, tokenizer)}
    inputs |= {"reward": reward_fingerprint(reward_fn), "judge": reward_fingerprint(judge)}
    saved = {"stepper": stepper, "controller": controller, "alarms": alarms, "best": best}
    checkpoints = Checkpoints(cfg, cfg.out, policy, [optimizer], inputs, saved, ranks, best.write)
    log = RunLog(cfg, first_step=checkpoints.first_step, rank=ranks.rank)
    compile_passes(policy, ref_policy, cfg.compile)

    for step in log.progress(checkpoints, cfg.steps, "ppo", "rollout"):
        stepper.set_lr(1 - (1 - cfg.lr_end) * step / cfg.steps)
        prompts = to_device(prompt_batch(pool, step, cfg), device)
        rng, kl_coef = random_generator(device, cfg.seed, step, ranks.rank), controller.coef
        try:
            batch = rollout(policy, ref_policy, tokenizer, reward_fn, prompts, kl_coef, cfg, rng, judge, ranks)
            samples = ranks.attempt(sample, policy, tokenizer, reward_fn, pool, step, cfg)
        except NotFinite as problem:
            log.skip(step, problem, stepper)
            continue
        except BadInput as error:  # raised by the user's reward, before this step changes the policy
            raise checkpoints.save_before(error) from error
        metrics = rollout_metrics(batch, policy, ref_policy, reward_fn.truncated_frac, cfg) | {"kl_coef": kl_coef}
        best.update(metrics, kl_coef)
        metrics |= update(policy, stepper, batch, cfg, random_generator("cpu", cfg.seed, step), ranks)
        controller.update(metrics["kl"], cfg.batch_size)
        log.write_rollout(step, metrics, samples)
        if alarms.stop(step, metrics, log, ranks):
            break
    log.close()
    if ranks.rank == 0:
        best.finish(alarms.stopped)


if __name__ == "__main__":
    run(main, PPOConfig)
