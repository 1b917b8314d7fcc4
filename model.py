"""GPT-2 (Radford et al. 2019) with a value head: the network, generation, log-probabilities and values.

Parts to whole, in the manner of nanoGPT; parameter names are Hugging Face's without their prefix `transformer.`.
The LM head is the token embedding (`wte`), so there is no second matrix that could come untied.

Shapes: B sequences, L tokens of a sequence, P tokens of its prompt, T tokens of its response, V vocabulary,
C width, H attention heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import BadInput
from device import random_generator

STOP_CHECK = 8  # tokens between two looks at whether all rows have ended: each look makes the host wait for the GPU


@dataclass(frozen=True)
class GPT2Config:
    """The fields of Hugging Face's config.json that shape the network; the defaults are the 124M model's."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5


class KVCache:
    """Keys and values of the tokens seen so far: one preallocated buffer, (n_layer, 2, B, H, L, C / H)."""

    def __init__(self, config, batch_size, length):
        self.shape = (config.n_layer, 2, batch_size, config.n_head, length, config.n_embd // config.n_head)
        self.buffer, self.filled, self.mask = None, 0, None

    def extend(self, layer, k, v):
        """Append k and v, (B, H, new, C / H), to a layer; returns all its keys and values. `filled` is the caller's."""
        if self.buffer is None:
            self.buffer = k.new_empty(self.shape)  # in the dtype that autocast computes in
        end = self.filled + k.shape[2]
        self.buffer[layer, 0, :, :, self.filled : end] = k
        self.buffer[layer, 1, :, :, self.filled : end] = v
        return self.buffer[layer, 0, :, :, :end], self.buffer[layer, 1, :, :, :end]


class StaticKVCache(nn.Module):
    """A KV cache for decoding steps of one token, of which torch.compile can make a CUDA graph.

    No shape and no address changes: the position that a step writes to is a tensor, and a step attends to all places,
    with a mask over those that are still empty. Each layer has a buffer for its keys and one for its values. In one
    buffer for all layers, Inductor copies the whole buffer at each layer.
    """

    def __init__(self, cache, length):
        super().__init__()
        shape = (*cache.shape[2:4], length, cache.shape[5])  # (B, H, length, C / H)
        self.n_layer = cache.shape[0]
        for layer in range(self.n_layer):
            for side in ("keys", "values"):
                self.register_buffer(f"{side}{layer}", cache.buffer.new_empty(shape))
        self.register_buffer("position", torch.zeros(1, dtype=torch.long, device=cache.buffer.device))
        self.register_buffer("places", torch.arange(length, device=cache.buffer.device)[None])

    def keys_and_values(self, layer):
        """Those of a layer, (B, H, length, C / H) each."""
        return getattr(self, f"keys{layer}"), getattr(self, f"values{layer}")

    def fill(self, cache):
        """Copy the tokens of a KVCache and continue after the last one."""
        for layer in range(self.n_layer):
            for ours, theirs in zip(self.keys_and_values(layer), cache.buffer[layer]):
                ours[:, :, : cache.filled] = theirs[:, :, : cache.filled]
                ours[:, :, cache.filled :] = 0  # a masked place has weight 0, and 0 * nan is nan
        self.position.fill_(cache.filled)
        return self

    def extend(self, layer, k, v):
        """As KVCache.extend, for one token a row; returns the keys and values of all places."""
        keys, values = self.keys_and_values(layer)
        keys.index_copy_(2, self.position, k)
        values.index_copy_(2, self.position, v)
        return keys, values

    @property
    def mask(self):
        return self.places <= self.position  # (1, length)


def linear(x, weight, bias=None):
    """F.linear, and its faster equals for a decoding step on a CPU, which has a token a row.

    MKL computes W x^T in three quarters of x W^T's time. It copies W on the way, which for few rows is most of the
    work: 8 rows take another quarter less in blocks of W that fit a cache.
    """
    if not x.is_cpu or x.shape[-2] > 1:
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    if 1 < len(rows) <= 8:
        block = next(n for n in range(128, 0, -1) if len(weight) % n == 0)
        blocks = weight.view(-1, block, weight.shape[1]).mT
        rows = rows.expand(len(blocks), *rows.shape)
        product = rows @ blocks if bias is None else torch.baddbmm(bias.view(-1, 1, block), rows, blocks)
        return product.transpose(0, 1).reshape(*x.shape[:-1], -1)
    product = weight @ rows.T if bias is None else torch.addmm(bias[:, None], weight, rows.T)
    return product.T.contiguous().view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, layer, cache):
        B, L, C = x.shape
        q, k, v = (
            self.c_attn(x).view(B, L, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        )  # (B, H, L, C/H) each
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        # one new token attends to every key: SDPA's causal triangle starts top left and would leave it the first key
        # only. Without a cache this must not depend on L: torch.compile makes L > 1 a symbol, which SDPA refuses
        causal = cache is None or L > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask if cache else None, is_causal=causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, L, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.n_inner or 4 * config.n_embd)
        self.c_proj = Linear(config.n_inner or 4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's GELU is the tanh approximation


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, layer, cache):
        x = x + self.attn(self.ln_1(x), layer, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The language model. No dropout: PPO needs the same log-probabilities twice, and one epoch does not overfit.

    n_tokens: the tokenizer's size. Where the embedding has more rows than that (50,304 for 50,257, say), the rows
    beyond it are padding: they have no logits, so they are never sampled and take no probability. bf16: run the trunk
    under autocast; weights, logits and values stay in float32.
    """

    def __init__(self, config, n_tokens=None, bf16=False):
        super().__init__()
        self.config, self.n_tokens, self.bf16 = config, n_tokens or config.vocab_size, bf16
        self.static_caches = None  # by size, after compile_decoding
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def init_weights(self):
        """GPT-2's initialisation: N(0, 0.02), the projections into the residual stream divided by sqrt(2 n_layer)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                scale = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)
        return self

    def trunk(self, ids, cache=None):
        """Final hidden states of ids (B, L) behind what the cache holds: (B, L, C). ValueError past n_positions."""
        seen = cache.filled if cache else 0
        end = seen + ids.shape[1]
        if end > self.config.n_positions:
            raise ValueError(f"{end} tokens are more than the model's context of {self.config.n_positions}")
        if seen and ids.shape[1] > 1:
            raise ValueError(f"behind a filled cache one token at a time, not {ids.shape[1]}")
        x = self.hidden(ids, slice(seen, end), cache)
        if cache:
            cache.filled = end
        return x

    def hidden(self, ids, positions, cache):
        """The network up to its last layer norm, for ids (B, L) at positions, a slice or a tensor (L,): (B, L, C).

        In the dtype of the weights, with bf16 too: autocast leaves the residual stream and the layer norms in it.
        """
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.wte(ids) + self.wpe.weight[positions]
            for layer, block in enumerate(self.h):
                x = block(x, layer, cache)
            return self.ln_f(x)

    def logits(self, hidden):
        """(..., C) -> (..., n_tokens), never in bf16: GPT-2's logits lie near -100, where bf16 steps by 0.5."""
        weight = self.wte.weight
        if self.n_tokens < len(weight):  # a slice of all rows would copy the whole gradient
            weight = weight[: self.n_tokens]
        return linear(hidden, weight)

    def forward(self, ids, first=0):
        """Logits of what follows positions first, first + 1, ... of ids (B, L): (B, L - first, n_tokens)."""
        return self.logits(self.trunk(ids)[:, first:])

    def flops(self, tokens, predicted):
        """FLOPs of a forward pass over some tokens, with logits of `predicted` of them: 2 for each weight and token."""
        blocks = sum(p.numel() for p in self.h.parameters())
        return 2 * (tokens * blocks + predicted * self.n_tokens * self.config.n_embd)

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, temperature, eos_id, generator=None):
        """Sample from softmax(logits / temperature), all of it, so that logprobs describe what was sampled.

        prompts: (B, P), all of P tokens. Yields the ids (B,) of one step after the other, max_new_tokens times, or
        fewer when every row has ended: behind a row's first eos_id comes eos_id.
        """
        cache = KVCache(self.config, len(prompts), prompts.shape[1] + max_new_tokens)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
        new = prompts
        for step in range(1, max_new_tokens + 1):
            logits = self.next_logits(new, cache)
            if step == 1 and self.static_caches is not None:
                cache = self.static_cache(cache)
            new = draw(logits / temperature, generator)
            new = torch.where(ended, eos_id, new)
            yield new
            ended = new == eos_id  # and stays so: behind its end a row goes on with eos_id
            new = new[:, None]
            if step % STOP_CHECK == 0 and ended.all():
                return

    def next_logits(self, new, cache):
        """Logits of what follows ids new (B, L) behind what the cache holds, of either kind: (B, n_tokens)."""
        if isinstance(cache, KVCache):
            return self.logits(self.trunk(new, cache)[:, -1:]).squeeze(1)
        logits = self.static_step(new, cache)
        cache.position += 1
        return logits

    def static_step(self, new, cache):
        """One decoding step on a StaticKVCache: new (B, 1) -> logits (B, n_tokens). What compile_decoding compiles."""
        return self.logits(self.hidden(new, cache.position, cache)).squeeze(1)

    def static_cache(self, cache):
        """A StaticKVCache with what a KVCache holds; one for all of about its length, since each has its own graph."""
        size = cache.shape[2], -(-cache.shape[4] // 64) * 64
        if size not in self.static_caches:
            self.static_caches[size] = StaticKVCache(cache, size[1])
        return self.static_caches[size].fill(cache)

    def compile_decoding(self):
        """From now on a decoding step on a GPU is one CUDA graph instead of some hundred launches."""
        self.static_step, self.static_caches = torch.compile(self.static_step, mode="reduce-overhead"), {}

    def generate(self, prompts, max_new_tokens, temperature, eos_id, generator=None):
        """Prompts (B, P) with all that stream yields: (B, P + max_new_tokens); behind an eos_id stands eos_id."""
        B, P = prompts.shape
        sequences = torch.cat([prompts, prompts.new_full((B, max_new_tokens), eos_id)], dim=1)
        for t, new in enumerate(self.stream(prompts, max_new_tokens, temperature, eos_id, generator), start=P):
            sequences[:, t] = new
        return sequences


def draw(logits, generator=None):
    """One id a row from softmax(logits): (B, V) -> (B,). Where a uniform number falls in the cumulated probabilities.

    torch.multinomial draws V exponential numbers a row, which takes as long as a layer or two, and makes a GPU's host
    wait. In float64: in float32 the sum, near 1, would step over the many tokens that have less than 6e-8 each.
    """
    cumulated = logits.softmax(-1).cumsum(-1, dtype=torch.float32 if logits.device.type == "mps" else torch.float64)
    u = torch.rand(len(logits), 1, dtype=cumulated.dtype, device=logits.device, generator=generator)
    return torch.searchsorted(cumulated, (1 - u) * cumulated[:, -1:]).squeeze(-1)  # 1 - u is never 0


class TokenLogprobs(torch.autograd.Function):
    """token_logprobs, with a gradient that is one new tensor of the logits' size. Autograd would make five."""

    @staticmethod
    def forward(ctx, logits, ids):
        ids, logsumexp = ids[..., None], logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, ids, logsumexp)
        return (logits.gather(-1, ids) - logsumexp).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        logits, ids, logsumexp = ctx.saved_tensors
        grad = grad[..., None]
        probs = (logits - logsumexp).exp_()
        return probs.mul_(-grad).scatter_add_(-1, ids, grad), None


def token_logprobs(logits, ids):
    """log softmax(logits) at ids: (B, T, V), (B, T) -> (B, T) nats."""
    return TokenLogprobs.apply(logits, ids)


class Policy(nn.Module):
    """GPT-2 and a scalar value head on its trunk, zero at the start (openai/lm-human-preferences)."""

    def __init__(self, gpt2):
        super().__init__()
        self.gpt2 = gpt2
        self.value_head = nn.Linear(gpt2.config.n_embd, 1, device=gpt2.wte.weight.device, dtype=gpt2.wte.weight.dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, sequences, prompt_len, temperature=1.0):
        """Log-probabilities (nats) and values of the response tokens: sequences (B, P + T) -> (B, T) each.

        This is the project's one shift by one: the hidden state before a token gives its logits and its value. Only
        these T states meet the vocabulary.
        """
        hidden = self.gpt2.trunk(sequences[:, :-1])[:, prompt_len - 1 :]  # (B, T, C)
        logits = self.gpt2.logits(hidden) / temperature  # (B, T, V)
        values = self.value_head(hidden).squeeze(-1)
        return token_logprobs(logits, sequences[:, prompt_len:]), values


@torch.no_grad()
def cached_logprobs(policy, sequences, prompt_len, temperature=1.0):
    """What Policy.forward returns as logprobs, made the way generate makes it: token by token through the KV cache."""
    gpt2, (B, L) = policy.gpt2, sequences.shape
    cache, steps = KVCache(gpt2.config, B, L), []
    new = sequences[:, :prompt_len]
    for t in range(prompt_len, L):
        logits = gpt2.logits(gpt2.trunk(new, cache)[:, -1:]) / temperature
        new = sequences[:, t : t + 1]
        steps.append(token_logprobs(logits, new))
    return torch.cat(steps, dim=1)


@torch.no_grad()
def exact_kl(policy, ref_policy, sequences, mask, prompt_len, temperature=1.0):
    """KL(policy || ref_policy) over the whole vocabulary, summed over the real tokens: (B,) nats, never below 0.

    The logits are those of one row at a time: less than any micro-batch of training needs.
    """
    gpt2s = policy.gpt2, ref_policy.gpt2
    states = (gpt2.trunk(sequences[:, :-1])[:, prompt_len - 1 :] for gpt2 in gpt2s)  # (B, T, C) each
    kl = []
    for rows in zip(*states):
        logp, ref_logp = ((gpt2.logits(row) / temperature).log_softmax(-1) for gpt2, row in zip(gpt2s, rows))  # (T, V)
        kl.append((logp.exp() * (logp - ref_logp)).sum(-1))
    return torch.stack(kl).where(mask, 0).sum(1)


# The largest and the mean error that rounding explains, nats a token, by whether the trunk is in bf16. Measured: up to
# 2e-5 and 1.6e-6 in fp32, .10 and .008 in bf16 on the mini model; 4e-5 and 1e-5, .27 and .04 on 124M random weights
# times 3. A temperature that is off by a twentieth, or a position by one, makes at least .38 and .09 on the mini model.
ROUNDING = {False: (1e-3, 1e-4), True: (1.0, 0.05)}


@torch.no_grad()
def check_policy(policy, ref_policy, prompts, cfg):
    """Check the policy before the first step; returns a summary as text, or raises BadInput naming what is off.

    On responses to some prompts: two passes agree (dropout would show as a ratio other than 1), the policy is its
    reference (KL 0), and the KV cache gives the log-probabilities that PPO computes without it.
    """
    prompts, prompt_len, t = prompts[:8], prompts.shape[1], cfg.temperature
    sequences = policy.gpt2.generate(
        prompts, cfg.response_len, t, eos_id=-1, generator=random_generator(prompts.device, cfg.seed)
    )
    logprobs = policy(sequences, prompt_len, t)[0]
    errors = {
        "log ratio": policy(sequences, prompt_len, t)[0] - logprobs,
        "KL": logprobs - ref_policy(sequences, prompt_len, t)[0],
        "KV cache": cached_logprobs(policy, sequences, prompt_len, t) - logprobs,
    }
    allowed, found = ROUNDING[policy.gpt2.bf16], []
    for name, error in errors.items():
        largest, mean = error.abs().max().item(), error.abs().mean().item()
        if not (largest <= allowed[0] and mean <= allowed[1]):
            raise BadInput(
                f"self-check: {name} is off by {largest:.2g} nats a token at most and {mean:.2g} on average before the "
                f"first step; rounding explains {allowed[0]} and {allowed[1]}"
            )
        found.append(f"|{name}| at most {largest:.1g}, mean {mean:.1g}")
    return "; ".join(found) + " nats"
