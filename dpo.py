"""Baselines for PPO that are trained off-line: on samples of the frozen reference, with the same prompts and reward.

    python dpo.py --preset mini                          # direct preference optimization, minutes on a CPU, offline
    python dpo.py --preset mini --method weighted --samples_per_prompt 16 --out dpo_checkpoints/weighted

dpo: direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290), on pairs of responses to a prompt.
weighted: reward-weighted fine-tuning (Peters and Schaal 2007; Peng et al. 2019, arXiv:1910.00177).
Both aim at pi*(y|x) = rho(y|x) exp(score(x, y) / beta) / Z(x), the policy with the largest E[score] - beta KL from the
reference rho: the objective of PPO without score_clip, with beta as kl_coef.
Shapes: B episodes, k adjacent rows per prompt, P prompt tokens, T response tokens.
"""

import runtime  # isort: skip  # noqa: F401 - first, since it refuses a Python older than 3.11
import copy
from dataclasses import replace

import torch
import torch.nn.functional as F

from config import DPOConfig
from data import decode, load_prompts, prompt_batch
from ppo import response_mask, score
from reward import check_finite, check_reward, load_reward, reward_fingerprint
from runtime.checkpoint import Checkpoints, check_run, delete_checkpoints, fingerprint
from runtime.cli import evaluation, run
from runtime.device import micro_batch_size, pick_device, random_generator, to_device
from runtime.distributed import ONE_PROCESS, refuse_processes
from runtime.errors import BadInput, NotFinite
from runtime.hub import load_policy, open_gpt2, policy_fingerprint, save_gpt2
from runtime.log import RunLog, dpo_sheet
from runtime.monitor import average, sample, to_floats
from runtime.optimizer import Stepper
from runtime.self_check import check_policy

# ---- the losses. All tensors are (B,), of whole responses; logprobs carries gradient. Returns: loss, detached metrics


def dpo_loss(logprobs, ref_logprobs, scores, cfg):
    """DPO (Rafailov et al. 2023, Eq. 7): the mean of -log sigmoid(margin) over the pairs of responses to a prompt.

    The higher score is preferred, as in the paper's sentiment experiment (C.1); a pair of equal scores has weight 0.
    Random labels of the Bradley-Terry model would make pi* the optimum; with these, the optimum has infinite margins.
    """
    rewards = cfg.beta * (logprobs - ref_logprobs).view(-1, cfg.samples_per_prompt)  # implicit rewards, section 5
    groups = scores.view(-1, cfg.samples_per_prompt)
    margins = rewards[:, :, None] - rewards[:, None, :]  # (B / k, k, k)
    preferred = groups[:, :, None] > groups[:, None, :]  # once for each pair, never for equal scores
    pairs = len(scores) * (cfg.samples_per_prompt - 1) / 2  # k (k - 1) / 2 per prompt, those of weight 0 too
    loss = -F.logsigmoid(margins).where(preferred, 0).sum() / pairs
    accuracy = ((margins > 0) & preferred).sum() / pairs  # at most 1 - tie_frac
    margin, tie_frac = margins.detach().where(preferred, 0).sum() / pairs, 1 - preferred.sum() / pairs
    return loss, {"loss": loss.detach(), "accuracy": accuracy, "margin": margin, "tie_frac": tie_frac}


def weighted_loss(logprobs, scores, cfg):
    """Reward-weighted regression (Peters and Schaal 2007): the mean over prompts of -sum_i w_i log pi(y_i | x).

    w is softmax(score / beta) over the k responses. The optimum is pi* for k to infinity, closer to rho for small k.
    """
    weights = (scores.view(-1, cfg.samples_per_prompt) / cfg.beta).softmax(1)
    loss = -(weights * logprobs.view(-1, cfg.samples_per_prompt)).sum(1).mean()
    effective = 1 / (weights**2).sum(1)  # 1 if one response has all the weight, k if all weights are equal
    return loss, {"loss": loss.detach(), "effective_samples": effective.mean()}


# ---- rollout of the reference, and update


@torch.no_grad()
def rollout(ref_policy, tokenizer, reward_fn, prompts, cfg, rng=None):
    """Generate a response to each prompt (B, P) and score it. Return sequences (B, P + T), mask (B, T), scores (B,)."""
    sequences = ref_policy.gpt2.generate(prompts, cfg.response_len, cfg.temperature, tokenizer.eos_token_id, rng)
    texts = decode(sequences.cpu(), tokenizer)  # prompt and response together: a character can begin in one
    scores, _ = score(reward_fn, texts, sequences.device, ONE_PROCESS)
    check_finite("score", scores, texts)
    return sequences, response_mask(sequences[:, prompts.shape[1] :], tokenizer.eos_token_id), scores


def response_logprobs(policy, sequences, mask, cfg):
    """Return the log-probability of each response, a sum over its real tokens: (B, P + T), (B, T) -> (B,), nats."""
    logprobs, _ = policy(sequences, sequences.shape[1] - mask.shape[1], cfg.temperature)
    return logprobs.where(mask, 0).sum(1)


def update(policy, ref_policy, stepper, batch, cfg, rng=None):
    """Train on the minibatches of a rollout, one optimizer step each; the k responses to a prompt stay together."""
    k, minibatches = cfg.samples_per_prompt, []
    for _ in range(cfg.epochs):
        for prompts in torch.randperm(cfg.batch_size // k, generator=rng).split(cfg.minibatch_size // k):
            parts = []
            for few in prompts.split(cfg.micro_batch_size // k):
                rows = to_device((few[:, None] * k + torch.arange(k)).flatten(), batch[0].device)
                sequences, mask, scores = (x[rows] for x in batch)
                logprobs = response_logprobs(policy, sequences, mask, cfg)
                if cfg.method == "dpo":
                    with torch.no_grad():
                        ref_logprobs = response_logprobs(ref_policy, sequences, mask, cfg)
                    loss, metrics = dpo_loss(logprobs, ref_logprobs, scores, cfg)
                else:
                    loss, metrics = weighted_loss(logprobs, scores, cfg)
                stepper.backward(loss * len(rows) / cfg.minibatch_size)
                parts.append(metrics)
            minibatches.append(average(parts) | {"grad_norm": stepper.step()})
    metrics = to_floats(average(minibatches))
    return metrics | {"skipped_steps": stepper.skipped, "lr": stepper.lr}


def main(cfg):
    refuse_processes("dpo.py")
    check_run(cfg, "model.safetensors")
    device, dtype = pick_device(cfg)
    folder, gpt2_config, tokenizer = open_gpt2(cfg.policy)
    pool = load_prompts(cfg, "prompts", gpt2_config, tokenizer)  # (M, P)
    reward_fn = load_reward(cfg, device, dtype)
    print("self-check: reward:", check_reward(reward_fn) if cfg.self_check else "skipped")
    policy = load_policy(folder, gpt2_config, tokenizer, dtype).to(device)
    ref_policy = copy.deepcopy(policy).eval().requires_grad_(False)  # frozen
    k, tokens = cfg.samples_per_prompt, cfg.samples_per_prompt * (pool.shape[1] + cfg.response_len)  # of a prompt
    groups = micro_batch_size(cfg, cfg.minibatch_size // k, tokens, policy.gpt2, 6, device, ONE_PROCESS, 2)
    cfg = replace(cfg, micro_batch_size=cfg.micro_batch_size or k * groups)
    print("self-check: policy:", check_policy(policy, ref_policy, prompt_batch(pool, 0, cfg).to(device), cfg))
    print(dpo_sheet(cfg, policy, reward_fn, len(pool), device), flush=True)
    optimizer = torch.optim.Adam(policy.parameters(), cfg.lr, eps=cfg.adam_eps, fused=device.type != "mps")
    stepper = Stepper(policy, [optimizer], cfg.grad_clip, dtype=dtype)
    inputs = {"policy": policy_fingerprint(policy, tokenizer), "reward": reward_fingerprint(reward_fn)}
    inputs["prompts"] = fingerprint(str(pool.tolist()))
    checkpoints = Checkpoints(cfg, cfg.out, policy, [optimizer], inputs, {"stepper": stepper})
    log = RunLog(cfg, first_step=checkpoints.first_step)

    for step in log.progress(checkpoints, cfg.steps, cfg.method, "rollout"):
        stepper.set_lr(1 - (1 - cfg.lr_end) * step / cfg.steps)
        prompts = to_device(prompt_batch(pool, step, cfg), device)
        try:
            batch = rollout(ref_policy, tokenizer, reward_fn, prompts, cfg, random_generator(device, cfg.seed, step, 0))
            samples = sample(policy, tokenizer, reward_fn, pool, step, cfg)
        except NotFinite as problem:
            log.skip(step, problem, stepper)
            continue
        except BadInput as error:  # raised by the user's reward, before this step changes the policy
            raise checkpoints.save_before(error) from error
        metrics = update(policy, ref_policy, stepper, batch, cfg, random_generator("cpu", cfg.seed, step))
        log.write_dpo(step, metrics, samples)
    log.close()
    save_gpt2(policy.gpt2, tokenizer, cfg.out, policy.value_head.state_dict())
    delete_checkpoints(cfg.out)
    print(f"the policy is in {cfg.out}: {evaluation(cfg)} evaluates it")


if __name__ == "__main__":
    run(main, DPOConfig)
