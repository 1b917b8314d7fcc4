"""GPT-2 (Radford et al. 2019) with a value head: the network, generation, log-probabilities and values.

Laid out as in nanoGPT, from parts to whole. Parameter names are Hugging Face's without the prefix `transformer.`.
The LM head uses the token embedding (`wte`) itself, so the two are always tied.

Shapes: B sequences, L tokens of a sequence, P tokens of its prompt, T tokens of its response, V vocabulary,
C width, H attention heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from runtime.decoding import decoder, uses_graphs
from runtime.linear import Linear, linear
from runtime.passes import passes

STOP_CHECK = 16  # tokens between checks whether all rows have ended: a check makes the host wait for the GPU


@dataclass(frozen=True)
class GPT2Config:
    """The fields of Hugging Face's config.json that define the network. The defaults are those of the 124M model."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5


class KVCache:
    """Keys and values of the tokens so far, in one preallocated buffer (n_layer, 2, B, H, L, C / H)."""

    def __init__(self, config, batch_size, length):
        self.shape = (config.n_layer, 2, batch_size, config.n_head, length, config.n_embd // config.n_head)
        self.buffer, self.filled = None, 0
        self.mask = None  # attend to all of them; StaticKVCache of runtime/decoding.py has a mask

    def extend(self, layer, k, v):
        """Append k and v, (B, H, new, C / H), to a layer; return all its keys and values. The caller sets `filled`."""
        if self.buffer is None:
            self.buffer = k.new_empty(self.shape)  # in the dtype of autocast
        end = self.filled + k.shape[2]
        self.buffer[layer, 0, :, :, self.filled : end] = k
        self.buffer[layer, 1, :, :, self.filled : end] = v
        return self.buffer[layer, 0, :, :, :end], self.buffer[layer, 1, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, layer, cache):
        B, L, C = x.shape
        # (B, H, L, C / H) each
        q, k, v = self.c_attn(x).view(B, L, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        # A single new token attends to every key: SDPA's causal mask, aligned top left, would leave only the first.
        # Without a cache, is_causal must not depend on L: torch.compile makes L > 1 symbolic, which SDPA refuses.
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
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, layer, cache):
        x = x + self.dropout(self.attn(self.ln_1(x), layer, cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    """The language model. Without set_dropout it has no dropout: PPO computes the same log-probabilities twice.

    n_tokens: size of the tokenizer. If the embedding has more rows (such as 50,304 for 50,257 tokens), the extra ones
    have no logits, so they are never sampled and get no probability. dtype: of the autocast in which the transformer
    runs, float32 for none; weights, logits and values stay in float32.
    """

    def __init__(self, config, n_tokens=None, dtype=torch.float32):
        super().__init__()
        self.config, self.n_tokens, self.dtype = config, n_tokens or config.vocab_size, dtype
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(0.0)

    def set_dropout(self, p):
        """Set the dropout of embeddings and residual branches in train mode, for fine-tuning."""
        for module in (self, *self.h):
            module.dropout.p = p

    def init_weights(self):
        """Initialize like GPT-2: N(0, 0.02), projections into the residual stream divided by sqrt(2 n_layer)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                scale = math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)
        return self

    def trunk(self, ids, cache=None):
        """Return the final hidden states (B, L, C) of ids (B, L), which continue the tokens of the cache."""
        seen = cache.filled if cache else 0
        end = seen + ids.shape[1]
        if end > self.config.n_positions:
            raise ValueError(f"{end} tokens are more than the model's context of {self.config.n_positions}")
        if seen and ids.shape[1] > 1:
            raise ValueError(f"with a non-empty cache only one token at a time is supported, not {ids.shape[1]}")
        x = self.hidden(ids, slice(seen, end), cache)
        if cache:
            cache.filled = end
        return x

    def hidden(self, ids, positions, cache):
        """Run the transformer on ids (B, L) at positions, a slice or a tensor (L,): (B, L, C).

        The result has the dtype of the weights, also under autocast: residual stream and layer norms keep it.
        """
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.dropout(self.wte(ids) + self.wpe.weight[positions])
            for layer, block in enumerate(self.h):
                x = block(x, layer, cache)
            return self.ln_f(x)

    def logits(self, hidden):
        """(..., C) -> (..., n_tokens) in fp32: GPT-2's logits are near -100, where bf16 has steps of 0.5.

        On CUDA next to bf16, the product is computed in TF32, see device.pick_device.
        """
        weight = self.wte.weight
        if self.n_tokens < len(weight):  # slicing all rows would copy the whole gradient
            weight = weight[: self.n_tokens]
        return linear(hidden, weight)

    def forward(self, ids, first=0):
        """Return the logits after positions first, first + 1, ... of ids (B, L): (B, L - first, n_tokens)."""
        return self.logits(self.trunk(ids)[:, first:])

    def flops(self, tokens, predicted):
        """Return the FLOPs of a forward pass: 2 per weight and token, the LM head only for `predicted` ones."""
        blocks = sum(p.numel() for p in self.h.parameters())
        return 2 * (tokens * blocks + predicted * self.n_tokens * self.config.n_embd)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature, eos_id, generator=None):
        """Sample from the full softmax(logits / temperature), whose log-probabilities Policy.forward returns.

        prompts: (B, P), all of P tokens. Returns (B, P + max_new_tokens): prompts and responses. Responses are padded
        with eos_id after their first one.
        """
        B, P = prompts.shape
        sequences = torch.cat([prompts, prompts.new_full((B, max_new_tokens), eos_id)], dim=1)
        cache, step = KVCache(self.config, B, P + max_new_tokens), None
        new, ended = prompts, torch.zeros(B, 1, dtype=torch.bool, device=prompts.device)
        for t in range(P, P + max_new_tokens):
            if step:
                new = step(generator)
            else:
                hidden = self.trunk(new, cache)[:, -1:]
                new = self.next_ids(hidden, ended, temperature, eos_id, generator)
            sequences[:, t : t + 1] = new
            ended = new == eos_id  # a row that has ended continues with eos_id
            done = t + 1 - P
            if done % STOP_CHECK == 0 and done < max_new_tokens and ended.all():
                break
            if t == P and uses_graphs(prompts.device):
                step, cache = decoder(self).start(cache, new, temperature, eos_id), None
        return sequences

    def next_ids(self, hidden, ended, temperature, eos_id, generator=None, u=None):
        """Draw the next token of each row, eos_id if it has ended: hidden states (B, 1, C), (B, 1) bool -> (B, 1) ids.

        generator, u: see draw.
        """
        logits = self.logits(hidden / temperature).squeeze(1)
        return torch.where(ended, eos_id, draw(logits, generator, u)[:, None])


def draw(logits, generator=None, u=None):
    """Sample from softmax(logits) by inversion of the cumulative distribution: (B, V) -> (B,) ids.

    u: uniform random numbers (B, 1) in [0, 1); by default they are drawn from the generator.

    torch.multinomial draws V exponential numbers per row, which takes as long as one or two layers, and makes the host
    wait for the GPU. Sums are in float64 except on MPS: in float32, tokens of probability below 6e-8 are never drawn.
    """
    cumulated = logits.softmax(-1).cumsum(-1, dtype=torch.float32 if logits.device.type == "mps" else torch.float64)
    if u is None:
        u = torch.rand(len(logits), 1, dtype=cumulated.dtype, device=logits.device, generator=generator)
    ids = torch.searchsorted(cumulated, (1 - u) * cumulated[:, -1:]).squeeze(-1)  # 1 - u is never 0
    return ids.clamp(max=logits.shape[-1] - 1)  # without it, a NaN would be an id that does not exist


class TokenLogprobs(torch.autograd.Function):
    """token_logprobs with a backward pass that allocates a single tensor of the size of the logits."""

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
    """Return log softmax(logits) at ids: (B, T, V), (B, T) -> (B, T) nats."""
    return TokenLogprobs.apply(logits, ids)


class Policy(nn.Module):
    """GPT-2 with a scalar value head, which starts at zero as in openai/lm-human-preferences."""

    def __init__(self, gpt2):
        super().__init__()
        self.gpt2 = gpt2
        self.value_head = nn.Linear(gpt2.config.n_embd, 1, device=gpt2.wte.weight.device, dtype=gpt2.wte.weight.dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, sequences, prompt_len, temperature=1.0):
        """Return log-probabilities (nats) and values of the response tokens: sequences (B, P + T) -> (B, T) each.

        This is the only shift by one: the hidden state before a token gives its logits and its value. Only these T
        states are multiplied by the embedding. On CUDA, passes with gradients are CUDA graphs, see runtime/passes.py.
        """
        if torch.is_grad_enabled() and uses_graphs(sequences.device) and not torch.compiler.is_compiling():
            return passes(self)(self.outputs, sequences, prompt_len, temperature)
        return self.outputs(sequences, prompt_len, temperature)

    def outputs(self, sequences, prompt_len, temperature):
        """Compute what forward returns."""
        hidden = self.gpt2.trunk(sequences[:, :-1])[:, prompt_len - 1 :]  # (B, T, C)
        logits = self.gpt2.logits(hidden / temperature)  # (B, T, V), larger than hidden: it is not divided
        values = self.value_head(hidden).squeeze(-1)
        return token_logprobs(logits, sequences[:, prompt_len:]), values


@torch.no_grad()
def exact_kl(policy, ref_policy, sequences, mask, prompt_len, temperature=1.0):
    """Return KL(policy || ref_policy) over the vocabulary, summed over the real tokens: (B,) nats, never negative.

    sequences: (B, P + T) ids, mask: (B, T). Logits are computed one row at a time, to need less memory than training.
    """
    gpt2s = policy.gpt2, ref_policy.gpt2
    states = (gpt2.trunk(sequences[:, :-1])[:, prompt_len - 1 :] for gpt2 in gpt2s)  # (B, T, C) each
    kl = []
    for rows in zip(*states):
        logp, ref_logp = (gpt2.logits(row / temperature).log_softmax(-1) for gpt2, row in zip(gpt2s, rows))  # (T, V)
        kl.append((logp.exp() * (logp - ref_logp)).sum(-1))
    return torch.stack(kl).where(mask, 0).sum(1)


def compile_passes(policy, ref_policy, enabled):
    """torch.compile the forward passes that a rollout and an update call."""
    for model in (policy, ref_policy) if enabled else ():
        model.compile(dynamic=True)  # the lengths of prompts and responses differ between rollouts
