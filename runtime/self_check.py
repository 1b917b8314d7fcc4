"""Checks of a policy before training, which fail for a wrong mask, position, temperature or mode."""

import torch

from model import KVCache, token_logprobs
from runtime.device import random_generator
from runtime.errors import BadInput

# The largest and the mean rounding error to expect, nats per token, by the dtype of autocast. Measured: up to 2e-5 and
# 1.6e-6 in fp32, .10 and .008 in bf16, .024 and .0012 in fp16 on the mini model; 6e-5 and 1e-5, .27 and .04, .027 and
# .0054 on 124M random weights, those of the blocks scaled by 3. A temperature 5 % off, or a position off by one, causes
# at least .38 and .09 on the mini model.
ROUNDING = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (1.0, 0.05), torch.float16: (0.25, 0.02)}


@torch.no_grad()
def cached_logprobs(policy, sequences, prompt_len, temperature=1.0):
    """Return the log-probabilities of Policy.forward, computed token by token with the KV cache.

    (B, P + T) ids -> (B, T) nats.
    """
    gpt2, (B, L) = policy.gpt2, sequences.shape
    cache, steps = KVCache(gpt2.config, B, L), []
    new = sequences[:, :prompt_len]
    for t in range(prompt_len, L):
        logits = gpt2.logits(gpt2.trunk(new, cache)[:, -1:] / temperature)
        new = sequences[:, t : t + 1]
        steps.append(token_logprobs(logits, new))
    return torch.cat(steps, dim=1)


@torch.no_grad()
def check_policy(policy, ref_policy, prompts, cfg):
    """Check the policy before the first step; return a summary, or raise BadInput if a check fails.

    On responses to some prompts (B, P): two passes agree (with dropout the ratio would not be 1), the policy equals its
    reference (KL 0), and the KV cache gives the log-probabilities that PPO computes without it.
    """
    if not cfg.self_check:
        return "skipped"
    prompts, prompt_len, t = prompts[: min(8, cfg.micro_batch_size or 8)], prompts.shape[1], cfg.temperature
    sequences = policy.gpt2.generate(
        prompts, cfg.response_len, t, eos_id=-1, generator=random_generator(prompts.device, cfg.seed)
    )
    logprobs = policy(sequences, prompt_len, t)[0]
    errors = {
        "log ratio": policy(sequences, prompt_len, t)[0] - logprobs,
        "KL": logprobs - ref_policy(sequences, prompt_len, t)[0],
        "KV cache": cached_logprobs(policy, sequences, prompt_len, t) - logprobs,
    }
    allowed, found = ROUNDING[policy.gpt2.dtype], []
    for name, error in errors.items():
        largest, mean = error.abs().max().item(), error.abs().mean().item()
        if not (largest <= allowed[0] and mean <= allowed[1]):
            raise BadInput(
                f"self-check: {name} is off by up to {largest:.2g} nats per token, {mean:.2g} on average, before the "
                f"first step; rounding explains at most {allowed[0]} and {allowed[1]}"
            )
        found.append(f"|{name}| at most {largest:.1g}, mean {mean:.1g}")
    return "; ".join(found) + " nats"
