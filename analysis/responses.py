"""Responses of a policy to held-out prompts, their likelihoods, and the text of each token."""

import numpy as np
import torch
from tqdm import tqdm

from analysis.metrics import kl_three_ways
from data import decode
from model import token_logprobs
from ppo import response_mask
from runtime.device import random_generator, release_memory, rows_that_fit


def prompt_groups(pool, cfg):
    """Yield cfg.prompts prompts of the pool in batches (B, P) int64 of one length; lengths are equally frequent."""
    control_len = pool.shape[1] - cfg.max_prompt_len  # 0 if the task has no controls
    lengths = range(cfg.min_prompt_len, cfg.max_prompt_len + 1)
    for prompt_len, rows in zip(lengths, np.array_split(np.arange(cfg.prompts), len(lengths))):
        for batch in np.split(rows, range(cfg.batch_size, len(rows), cfg.batch_size)):
            if len(batch):
                yield torch.from_numpy(pool[batch, : control_len + prompt_len])


@torch.no_grad()
def respond(policy, ref_policy, tokenizer, groups, cfg, device, name):
    """Sample a response to every prompt. Return a dict of lists, one entry per response.

    prompts, texts: str. tokens: ids up to and including <|endoftext|>. kl, kl_k3, kl_exact: nats, see
    metrics.kl_three_ways. ref_nll: nats of the response under the reference, at temperature 1. The random numbers
    depend only on cfg.seed and the index of the batch, so that two models get the same ones.
    """
    out = {name: [] for name in ("prompts", "texts", "tokens", "kl", "kl_k3", "kl_exact", "ref_nll")}
    eos_id = tokenizer.eos_token_id
    for i, prompts in enumerate(tqdm(groups, desc=f"responses of {name}", unit="batch", leave=None)):
        prompts, prompt_len = prompts.to(device), prompts.shape[1]
        generator = random_generator(device, cfg.seed, i)
        sequences = policy.gpt2.generate(prompts, cfg.response_len, cfg.temperature, eos_id, generator)
        responses = sequences[:, prompt_len:]
        mask = response_mask(responses, eos_id)
        for part in micro_batches(policy, sequences):
            for estimate, values in likelihoods(policy, ref_policy, sequences[part], mask[part], cfg).items():
                out[estimate] += values.tolist()
        out["tokens"] += [row[keep].tolist() for row, keep in zip(responses, mask)]
        out["prompts"] += decode(prompts, tokenizer)
        out["texts"] += decode(sequences, tokenizer)
        release_memory(torch.device(device))
    return out


def micro_batches(policy, sequences):
    """Return slices of the rows of sequences (B, L), each of as many as fit in a forward pass, at least one."""
    gpt2, (rows, tokens) = policy.gpt2, sequences.shape
    size = max(1, rows_that_fit(tokens, gpt2.config.n_embd, gpt2.config.n_layer, gpt2.n_tokens, sequences.device))
    return [slice(start, start + size) for start in range(0, rows, size)]


@torch.no_grad()
def likelihoods(policy, ref_policy, sequences, mask, cfg):
    """Return {"kl", "kl_k3", "kl_exact", "ref_nll"} of responses, (B,) nats each; see respond.

    sequences: (B, P + T). mask: (B, T). Needs at most four tensors of the logits' size.
    """
    prompt_len = sequences.shape[1] - mask.shape[1]
    responses = sequences[:, prompt_len:]
    logits = policy.gpt2(sequences[:, :-1], first=prompt_len - 1)  # (B, T, V)
    ref_logits = logits if policy is ref_policy else ref_policy.gpt2(sequences[:, :-1], first=prompt_len - 1)
    ref_nll = (-token_logprobs(ref_logits, responses)).where(mask, 0).sum(1)
    for tensor in {logits, ref_logits}:  # one tensor if the two policies are the same
        tensor.div_(cfg.temperature)
    return kl_three_ways(logits, ref_logits, responses, mask) | {"ref_nll": ref_nll}


def pieces(tokenizer, prompt, tokens):
    """Return the text that each token of a response adds, a list of str. Joined, they are the text of the response.

    prompt, tokens: lists of ids. A token that ends inside a character adds "", and the token that completes the
    character adds it. <|endoftext|> is shown as such.
    """
    words = tokens[:-1] if tokens[-1] == tokenizer.eos_token_id else tokens
    start, *texts = decode([[*prompt, *words[:n]] for n in range(len(words) + 1)], tokenizer)
    length, added = len(start), []
    for i, text in enumerate(texts):
        complete = i == len(texts) - 1 or not text.endswith("\ufffd")  # U+FFFD: the text ends inside a character
        added.append(text[length:] if complete else "")
        length = len(text) if complete else length
    return added + [tokenizer.eos_token] * (len(tokens) - len(words))
