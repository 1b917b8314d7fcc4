"""PPO on a language model: GPT-2 learns to write what the reward likes, and pays for drifting from its frozen self.

    python ppo.py                                        # gpt2, as published: 25,600 episodes
    python ppo.py --preset mini                          # minutes on a CPU, offline
    python ppo.py --reward my_reward.py:my_function      # your own function: list of B texts -> (B,) tensor
    torchrun --nproc_per_node 8 ppo.py                   # on eight GPUs: see distributed.py

Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347) with generalized advantage estimation (Schulman
et al. 2016, arXiv:1506.02438), and the KL-penalised reward of Ziegler et al. 2019 (arXiv:1909.08593).

Shapes: B episodes (a prompt and its response), P prompt tokens, T response tokens, N real tokens: those of the
responses up to and with <|endoftext|>. An episode has one score; every token of it has a reward.
"""

import copy
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint import BEST, BestWeights, Checkpoints, check_run, delete_checkpoints, fingerprint
from config import BadInput, PPOConfig, run
from data import check_context, load_splits, prompt_batch, prompt_pool
from device import ONE_PROCESS, join, micro_batch_size, pick_device, random_generator, to_device
from hub import load_policy, open_gpt2, save_gpt2
from log import RunLog, Watch, average, ppo_sheet, rollout_metrics, show
from model import check_policy
from optimizer import Stepper
from reward import NotFinite, check_finite, check_reward, load_judge, load_reward, reward_fingerprint, scored

# ---- the arithmetic: tensors in, tensors out. A mask is applied by where: nan times False is nan


def response_mask(responses, eos_id):
    """True through a response's first eos_id, False behind it: (B, T) ids -> (B, T) bool. Ending is an action too."""
    is_eos = responses == eos_id
    return is_eos.cumsum(1) - is_eos.long() == 0


def token_rewards(scores, kl, mask, kl_coef):
    """R(x, y) of Ziegler et al. 2019, Eq. 2, spread over the tokens: -kl_coef * kl on each, the score on the last.

    scores: (B,). kl: (B, T), log-probability less the reference's, in nats (k1: unbiased, sometimes negative; its
    always positive kin k3 has another gradient as a reward). mask: (B, T). Returns (B, T), 0 outside the mask.
    """
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    return (-kl_coef * kl).where(mask, 0).scatter_add(1, last, scores[:, None])


def whiten(x, mask, shift_mean=True):
    """x with variance 1 over the mask (Bessel's), its mean shifted to 0 or kept; 0 outside. (B, T) -> (B, T).

    A single token has no variance: x is returned as it is.
    """
    real = x[mask]  # (N,)
    if len(real) < 2:
        return x.where(mask, 0)
    mean, std = real.mean(), real.std()
    whitened = (x - mean) / (std + 1e-8)
    return (whitened if shift_mean else whitened + mean).where(mask, 0)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, Eq. 16), backwards from the last real token.

    rewards, values, mask: (B, T). Behind the last real token there is nothing to expect, also where the response was
    cut at T: value 0. Returns advantages and returns (advantage + value), (B, T) each, 0 outside the mask.
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
    """How much better a response was than the others to its prompt: (B,) rewards of responses -> (B,).

    rloo: the reward less the mean of the other k - 1 (Ahmadian et al. 2024, arXiv:2402.14740). grpo: less the mean of
    all k, over their standard deviation (Shao et al. 2024, arXiv:2402.03300, section 4.1.2; there the KL is a term of
    the loss, here it stays in the reward, so that all three methods have one objective).
    """
    groups = rewards.view(-1, cfg.samples_per_prompt)  # the k rows of a prompt follow one another
    advantages = groups - groups.mean(1, keepdim=True)
    if cfg.advantage == "grpo":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    else:
        advantages = advantages * cfg.samples_per_prompt / (cfg.samples_per_prompt - 1)  # the same as without itself
    return advantages.flatten()


def ppo_loss(logprobs, values, old_logprobs, old_values, advantages, returns, cfg):
    """Clipped surrogate (Schulman et al. 2017, Eq. 7) plus vf_coef times the value loss (Eq. 9), no entropy bonus.

    Every tensor is (N,): the mask is already applied, so each mean is over real tokens. logprobs and values carry
    gradient. Clipping the value loss is not in the paper: it follows openai/lm-human-preferences. Returns the loss and
    detached metrics.
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
        "approx_kl": (ratio - 1 - log_ratio).mean(),  # k3 of the old policy from the new (see README, Equations)
        "clip_frac": ((ratio - 1).abs() > cfg.clip_eps).float().mean(),
        "vf_clip_frac": (vf_errors_clipped > vf_errors).float().mean(),
    }
    vf_coef = cfg.vf_coef if cfg.advantage == "gae" else 0.0  # else nobody asks the value head
    return pg_loss + vf_coef * vf_loss, {name: value.detach() for name, value in metrics.items()}


class AdaptiveKL:
    """Proportional controller of kl_coef (Ziegler et al. 2019, section 2.2): up when KL is over target, else down."""

    def __init__(self, coef, target, horizon):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, episodes):
        """Once a rollout. kl: its mean nats a response; episodes: how many it had. A target of 0 keeps coef fixed."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon


# ---- rollout and update


@dataclass(frozen=True)
class Rollout:
    """B episodes: what update learns from, and what the log tells of them. (B, T) each where nothing else is said."""

    sequences: torch.Tensor  # (B, P + T)
    prompt_len: int  # P
    mask: torch.Tensor  # True on real tokens
    logprobs: torch.Tensor  # nats, of the policy that sampled
    values: torch.Tensor
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor  # in units of the rewards
    kl: torch.Tensor  # k1, nats a token
    scores: torch.Tensor  # (B,), as the reward gave them
    objective: torch.Tensor  # (B,), what PPO maximises: the score, clipped and penalised, less kl_coef times the KL
    positive_by_reward: torch.Tensor | None  # (B,), 1 where the classifier finds the text positive; not of a function
    positive_by_judge: torch.Tensor | None  # (B,), where there is a judge
    ended: torch.Tensor  # (B,), True where the response has its <|endoftext|>
    texts: list  # B prompts with their responses
    seconds: dict  # of each phase


@torch.no_grad()
def rollout(policy, ref_policy, tokenizer, reward_fn, prompts, kl_coef, cfg, generator=None, judge=None):
    """Generate a response to each prompt, score it, and compute the advantage of each token: a Rollout.

    prompts: (B, P) ids, all of P tokens, so nothing is padded. reward_fn, judge: list of B texts -> (B,) scores; the
    judge's are not trained on.
    """
    clock, prompt_len, eos_id = [time.time()], prompts.shape[1], tokenizer.eos_token_id
    sequences = policy.gpt2.generate(prompts, cfg.response_len, cfg.temperature, eos_id, generator)
    mask = response_mask(sequences[:, prompt_len:], eos_id)
    longest = mask.sum(1).max()  # nothing behind the longest response is ever computed with again
    sequences, mask = sequences[:, : prompt_len + longest], mask[:, :longest]  # (B, P + T), (B, T)
    clock.append(time.time())

    # whole texts, decoded at once: a letter may begin in the prompt's last token and end in the response's first
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    scores, positive_by_reward = scored(reward_fn, texts)  # (B,) each
    check_finite("score", scores, texts)
    scores = scores.to(mask.device)
    ended = (sequences[:, prompt_len:] == eos_id).any(1)
    penalised = scores.clamp(-cfg.score_clip, cfg.score_clip) if cfg.score_clip else scores
    penalised = penalised - cfg.missing_eos_penalty * ~ended
    clock.append(time.time())
    positive_by_judge = scored(judge, texts)[1] if judge else None
    clock.append(time.time())

    # By the update's own forward and micro-batches, so that its first ratio is 1. Under torch.compile, a pass without
    # gradients or on a view would be another graph, which rounds differently.
    parts = [part.clone() for part in sequences.split(cfg.micro_batch_size)]
    with torch.set_grad_enabled(cfg.compile):
        evaluated = [[x.detach() for x in policy(part, prompt_len, cfg.temperature)] for part in parts]
    logprobs, values = (torch.cat(tensors) for tensors in zip(*evaluated))  # (B, T) each
    check_finite("log-probability or value", (logprobs + values).where(mask, 0).sum(1), texts)
    clock.append(time.time())
    ref_logprobs = torch.cat([ref_policy(part, prompt_len, cfg.temperature)[0] for part in parts])  # (B, T)
    check_finite("the reference's log-probability", ref_logprobs.where(mask, 0).sum(1), texts)
    clock.append(time.time())

    kl = (logprobs - ref_logprobs).where(mask, 0)
    rewards = token_rewards(penalised.to(kl.dtype), kl, mask, kl_coef)
    objective = rewards.sum(1)
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    if cfg.advantage == "gae":
        advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)
    else:  # a response is one action, and each of its tokens has its advantage
        advantages = returns = group_advantages(rewards.sum(1), cfg)[:, None].where(mask, 0)
    advantages = whiten(advantages, mask)  # over the whole rollout; the returns keep the scale of the rewards
    phases = ("generate", "score", "judge", "logprobs", "reference")
    seconds = dict(zip(phases, (b - a for a, b in zip(clock, clock[1:]))))
    return Rollout(
        sequences, prompt_len, mask, logprobs, values, advantages, returns, kl, scores, objective, positive_by_reward,
        positive_by_judge, ended, texts, seconds,
    )  # fmt: skip


def update(policy, stepper, batch, cfg, generator=None, ranks=ONE_PROCESS):
    """K epochs of minibatches over one rollout, one optimizer step each. Returns metrics: means over the minibatches.

    Losses are means over the real tokens of a minibatch: each micro-batch's mean counts by its share of them, so the
    micro-batch size does not change the gradient. ranks: of several processes each has its share of every minibatch.
    """
    minibatches = []
    for _ in range(cfg.ppo_epochs):
        order = torch.randperm(len(batch.mask), generator=generator)  # every episode once an epoch
        for rows in order.to(batch.mask.device).split(cfg.minibatch_size):
            parts, shares, tokens = [], [], batch.mask[rows].sum() / ranks.size
            micro_batches = rows.split(cfg.micro_batch_size)
            for i, micro in enumerate(map(ranks.share, micro_batches)):
                mask = batch.mask[micro]
                with ranks.accumulate(policy, last=i == len(micro_batches) - 1):
                    logprobs, values = policy(batch.sequences[micro], batch.prompt_len, cfg.temperature)
                    old = (x[micro][mask] for x in (batch.logprobs, batch.values, batch.advantages, batch.returns))
                    loss, metrics = ppo_loss(logprobs[mask], values[mask], *old, cfg)
                    share = mask.sum() / tokens
                    (loss * share).backward()
                parts.append(metrics)
                shares.append(share)
            minibatches.append(average(parts, shares) | {"grad_norm": stepper.step()})
    metrics = average(minibatches, [1 / len(minibatches)] * len(minibatches))
    for end, minibatch in (("first", minibatches[0]), ("last", minibatches[-1])):
        metrics |= {f"{end}_{name}": minibatch[name] for name in ("approx_kl", "max_log_ratio")}
    return ranks.mean({name: float(value) for name, value in metrics.items()}) | {"skipped_steps": stepper.skipped}


@torch.no_grad()
def sample(policy, tokenizer, reward_fn, prompts, cfg):
    """Responses to a few prompts (B, P), with the same random numbers in each call: a dict each, for samples.jsonl."""
    generator = random_generator(prompts.device, cfg.seed)
    eos_id, decode = tokenizer.eos_token_id, dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    sequences = policy.gpt2.generate(prompts, cfg.response_len, cfg.temperature, eos_id, generator)
    starts, texts = (tokenizer.batch_decode(ids, **decode) for ids in (prompts, sequences))
    scores = scored(reward_fn, texts)[0].tolist()
    return [
        {"prompt": start, "response": text[len(start) :], "score": round(score, 4) if math.isfinite(score) else None}
        for start, text, score in zip(starts, texts, scores)
    ]


class BestPolicy(BestWeights):
    """The policy with the highest objective, by means over cfg.save_every rollouts; the first of a run until then.

    Scores and KLs are compared at one KL coefficient, the latest. state: "best" and "rollouts" in a checkpoint's state.
    """

    def __init__(self, policy, tokenizer, cfg):
        super().__init__(policy, self.save_policy)
        self.tokenizer, self.cfg, self.state = tokenizer, cfg, {"best": None, "rollouts": []}

    def update(self, metrics, kl_coef):
        """After each rollout and before its update: the policy is still the one that sampled."""
        rollouts, best = self.state["rollouts"], self.state["best"]
        rollouts.append([metrics["objective"] + kl_coef * metrics["kl"], metrics["kl"]])  # (score, KL)
        complete = len(rollouts) == self.cfg.save_every
        if complete or not best:
            score, kl = (statistics.fmean(values) for values in zip(*rollouts))
            if not best or best["rollouts"] < len(rollouts) or score - best["score"] > kl_coef * (kl - best["kl"]):
                self.state["best"] = {"score": score, "kl": kl, "rollouts": len(rollouts)}
                self.keep()
        if complete:
            rollouts.clear()

    def save_policy(self, weights):
        folder, head = Path(self.cfg.out, BEST), copy.deepcopy(self.model.value_head).cpu()
        head.load_state_dict({name: weights.pop(f"value_head.{name}") for name in head.state_dict()})
        gpt2 = {name.removeprefix("gpt2."): tensor for name, tensor in weights.items()}
        folder.mkdir(exist_ok=True)
        save_gpt2(self.model.gpt2, self.tokenizer, folder, head, weights=gpt2)


def compile_passes(policy, ref_policy):
    """torch.compile what a rollout and an update call, once: forward passes and the decoding step."""
    policy.compile(dynamic=True)  # every rollout has another length of prompts and of responses
    ref_policy.compile(dynamic=True)
    policy.gpt2.compile_decoding()


def load(cfg, device, bf16):
    """What a run starts from, checked before anything is written: policy, tokenizer, reward, judge, pool of prompts."""
    folder, gpt2_config, tokenizer = open_gpt2(cfg.policy)
    check_context(cfg, gpt2_config, tokenizer)
    reward_fn, judge = load_reward(cfg, device), load_judge(cfg, device)
    pool = prompt_pool(
        load_splits(cfg.dataset, cfg.text_column, cfg.label_column)["prompts"].texts,
        tokenizer,
        cfg.max_prompt_len,
        task=cfg.task,
    )
    prompts = prompt_batch(pool, 0, cfg)
    policy = load_policy(folder, gpt2_config, tokenizer, bf16).to(device)
    if cfg.self_check:
        checked = check_policy(policy, copy.deepcopy(policy), prompts.to(device), cfg)
        print("self-check:", checked, "|", check_reward(reward_fn), flush=True)
        if judge:
            print("self-check: judge:", check_reward(judge, "judge"), flush=True)
    return policy, tokenizer, reward_fn, judge, pool


def main(cfg):
    check_run(cfg, "model.safetensors")
    device, bf16 = pick_device(cfg)
    ranks = join(device, cfg, "micro_batch_size")
    policy, tokenizer, reward_fn, judge, pool = load(cfg, device, bf16)
    tokens = pool.shape[1] + cfg.response_len
    size = micro_batch_size(cfg, cfg.minibatch_size, tokens, policy.gpt2, 4, device, ranks)
    cfg = replace(cfg, micro_batch_size=size)
    print(ppo_sheet(cfg, policy, reward_fn, judge, len(pool), device), flush=True)
    ref_policy = copy.deepcopy(policy).eval().requires_grad_(False)  # frozen: where the KL is measured from
    optimizer = torch.optim.Adam(policy.parameters(), cfg.lr, eps=cfg.adam_eps, fused=device.type != "mps")
    stepper = Stepper(policy, [optimizer], cfg.grad_clip)

    inputs = {
        "prompts": fingerprint(*(str(prompt) for prompt in pool.tolist())),
        "policy": fingerprint(policy, str(policy.gpt2.config), tokenizer.backend_tokenizer.to_str()),
        "reward": reward_fingerprint(reward_fn),
        "judge": reward_fingerprint(judge),
    }
    best = BestPolicy(policy, tokenizer, cfg)
    state = {"inputs": inputs, "kl_coef": cfg.kl_coef, "watched": [], "skips": stepper.skips} | best.state
    checkpoints = Checkpoints(cfg, cfg.out, policy, [optimizer], state, ranks, best.write)
    state = best.state = checkpoints.state
    stepper.skips = state["skips"]
    controller, watch = AdaptiveKL(state["kl_coef"], cfg.kl_target, cfg.kl_horizon), Watch(cfg, state["watched"])
    log = RunLog(cfg, policy, first_step=checkpoints.first_step, rank=ranks.rank)
    if cfg.compile:
        compile_passes(policy, ref_policy)
    learner, actor, ref_actor, shared_reward, shared_judge = ranks.spread(policy, ref_policy, reward_fn, judge)
    few = torch.from_numpy(pool[: cfg.sample_prompts]).to(device)
    stopped = False

    # Algorithm 1 of Schulman et al. 2017: an actor is a prompt, a timestep is a token
    progress = log.progress(checkpoints, cfg.steps, "ppo", "rollout")
    for step in progress:
        stepper.set_lr(1 - (1 - cfg.lr_end) * step / cfg.steps)
        prompts = to_device(prompt_batch(pool, step, cfg), device)
        generator, samples = random_generator(device, cfg.seed, step, ranks.rank), []
        try:
            batch = rollout(
                actor, ref_actor, tokenizer, shared_reward, prompts, controller.coef, cfg, generator, shared_judge
            )
            truncated_frac = getattr(reward_fn, "truncated_frac", 0.0)
            if ranks.rank == 0 and len(few) and (step % cfg.sample_every == 0 or step == cfg.steps - 1):
                samples = sample(policy, tokenizer, reward_fn, few, cfg)
                log.write_samples(step, samples)
        except NotFinite as problem:
            stepper.skip(f"what a rollout found was not finite: {problem}")
            progress.write(f"step {step} is skipped: {problem}")
            log.write(step, skipped_steps=stepper.skipped)
            continue
        except BadInput as error:  # the user's reward raised, say: nothing of this step has changed the policy yet
            checkpoints.save()
            raise BadInput(
                f"{error}. The run is saved: --resume resumes it at step {step}, with --force where the reward's file "
                "was changed"
            ) from error
        metrics = rollout_metrics(batch, policy, ref_policy, truncated_frac, cfg) | {"kl_coef": controller.coef}
        best.update(metrics, controller.coef)
        start = time.time()
        metrics |= update(learner, stepper, batch, cfg, random_generator("cpu", cfg.seed, step), ranks)
        controller.update(metrics["kl"], cfg.batch_size)
        metrics |= {"lr": optimizer.param_groups[0]["lr"], "seconds_update": time.time() - start}
        state["kl_coef"] = controller.coef
        log.write(step, **metrics)
        show(progress, step, metrics, samples, cfg)
        if alarm := watch(metrics):
            progress.write(f"alarm at step {step}: {alarm}")
        stopped = cfg.on_alarm == "stop" and ranks.any(bool(alarm))
        if stopped:
            break
    log.close()
    if ranks.rank == 0:
        best.write()
        if stopped:
            policy = load_policy(*open_gpt2(f"{cfg.out}/{BEST}"))
        save_gpt2(policy.gpt2, tokenizer, cfg.out, policy.value_head)
        delete_checkpoints(cfg.out)
        print(f"the policy is in {cfg.out}: python evaluate.py --preset {cfg.preset} --after {cfg.out} evaluates it")


if __name__ == "__main__":
    run(main, PPOConfig)
