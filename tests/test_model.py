"""The network against transformers' own GPT-2 in float64, sampling, log-probabilities, files in and out."""

import json
import math
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, LogitsMemory, hf_gpt2, message
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from config import PPOConfig
from data import check_context
from model import GPT2, GPT2Config, KVCache, Policy, draw, exact_kl, linear, token_logprobs
from runtime import self_check
from runtime.device import random_generator
from runtime.errors import BadInput
from runtime.hub import (
    SUPPORTED,
    TRANSPOSED,
    VALUE_HEAD,
    load_gpt2,
    load_policy,
    load_tokenizer,
    open_gpt2,
    read_config,
    read_tensors,
    save_gpt2,
)
from runtime.self_check import ROUNDING, cached_logprobs, check_policy

CLOSE = dict(atol=1e-9, rtol=0)
N_POSITIONS = 48  # of conftest.hf_gpt2


def load(folder, n_tokens=None):
    """The folder's GPT-2 by our loader, in float64."""
    return load_gpt2(folder, read_config(folder), n_tokens).double()


def write(folder, state, config, **changes):
    """A model folder of these tensors and this transformers config, with fields of config.json changed."""
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    edit_config(folder, **changes)
    return folder


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def small_gpt2(seed=0, scale=1.0, **changes):
    """Our GPT-2 with random weights of standard deviation 0.3 * scale, in float64."""
    shape = dict(vocab_size=30, n_positions=24, n_embd=16, n_layer=2, n_head=2)
    gpt2 = GPT2(GPT2Config(**(shape | changes))).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3 * scale)
    return gpt2


def small_policy(seed=0, **changes):
    """A policy whose value head is not zero, so that its values tell positions apart."""
    policy = Policy(small_gpt2(seed, **changes))
    nn.init.constant_(policy.value_head.weight, 0.5)
    return policy


def some_ids(rows, length, vocab_size=30, seed=1):
    return torch.randint(1, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def hf(tokenizer):
    """The model of conftest's gpt2_folder as transformers computes it, in float64."""
    return hf_gpt2(len(tokenizer))


@pytest.fixture(scope="module")
def state(hf):
    """Its weights as transformers would store them, float32, without the LM head."""
    tensors = {name: tensor.detach().float().clone() for name, tensor in hf.state_dict().items()}
    del tensors["lm_head.weight"]
    return tensors


@pytest.fixture(scope="module")
def ids(tokenizer):
    return some_ids(3, 20, len(tokenizer))


# ---- the network


def test_logits_are_those_of_transformers(gpt2_folder, hf, ids):
    """In float64, where 1e-9 tells GPT-2's tanh GELU from the erf one: on a model this small they differ by 1e-4."""
    torch.testing.assert_close(load(gpt2_folder)(ids), hf(ids).logits, **CLOSE)


def test_gradients_are_those_of_transformers(gpt2_folder, hf, ids):
    ours, theirs = load(gpt2_folder), deepcopy(hf)
    for logits in (ours(ids), theirs(ids).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = parameter.grad.t() if name.endswith(TRANSPOSED) else parameter.grad
        torch.testing.assert_close(gradient, expected[name], atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_epsilon": 1e-2},
        {"n_inner": 40},
        {"n_head": 2, "n_layer": 3},
        {"activation_function": "gelu_pytorch_tanh"},
    ],
    ids=str,
)
def test_every_field_of_the_config_that_shapes_the_network_is_honoured(tmp_path, changes):
    theirs = hf_gpt2(30, **changes)
    deepcopy(theirs).float().save_pretrained(tmp_path)
    ids = some_ids(2, 10)
    torch.testing.assert_close(load(tmp_path)(ids), theirs(ids).logits, **CLOSE)


def test_dropout_in_the_config_and_train_mode_change_nothing(tmp_path, state, hf, ids):
    """PPO needs the same log-probabilities twice: dropout would show as a ratio other than 1."""
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.5)
    ours = load(write(tmp_path, state, hf.config, **dropout)).train()
    torch.testing.assert_close(ours(ids), hf(ids).logits, **CLOSE)


@pytest.mark.parametrize(
    "n_layer, n_head, n_embd, parameters",
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_the_four_published_sizes_have_their_published_parameter_counts(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        gpt2 = GPT2(GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert sum(p.numel() for p in gpt2.parameters()) == parameters
    assert len(list(gpt2.parameters())) == len(gpt2.state_dict()) == 4 + 12 * n_layer


def test_the_default_config_is_the_124m_model():
    """As in transformers, fields that change no parameter's shape too: heads and the epsilon of the layer norms."""
    from transformers import GPT2Config as TheirConfig

    with torch.device("meta"):
        gpt2 = GPT2(GPT2Config())
    assert len(list(gpt2.parameters())) == 148
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808
    theirs = TheirConfig()
    assert asdict(gpt2.config) == {name: getattr(theirs, name) for name in asdict(gpt2.config)}


def test_a_copy_keeps_the_lm_head_tied_to_its_own_embedding_and_not_to_the_original(ids, gpt2_folder):
    original = load(gpt2_folder)
    copy, before = deepcopy(original), original(ids)
    with torch.no_grad():
        copy.wte.weight.zero_()
    assert copy(ids).abs().max() == 0
    assert torch.equal(original(ids), before)


def test_initial_weights_have_the_spread_of_the_paper():
    """N(0, 0.02), and 0.02 / sqrt(2 n_layer) into the residual stream; biases 0, gains 1."""
    torch.manual_seed(0)
    gpt2 = GPT2(GPT2Config(vocab_size=500, n_positions=64, n_embd=64, n_layer=8, n_head=2)).init_weights()
    block = gpt2.h[3]
    for weight, std in [
        (gpt2.wte.weight, 0.02),
        (block.attn.c_attn.weight, 0.02),
        (block.attn.c_proj.weight, 0.005),
        (block.mlp.c_proj.weight, 0.005),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert all((p == 0).all() for name, p in gpt2.named_parameters() if name.endswith("bias"))
    assert (block.ln_1.weight == 1).all()


def test_the_context_may_be_filled_to_its_last_position_and_one_token_more_is_refused():
    gpt2 = small_gpt2()
    assert gpt2(some_ids(1, 24)).shape == (1, 24, 30)
    with pytest.raises(ValueError, match="25 tokens .* context of 24"):
        gpt2(some_ids(1, 25))
    with pytest.raises(ValueError, match="25 tokens .* context of 24"):
        gpt2.generate(some_ids(1, 20), 6, 1.0, eos_id=-1)


def test_logits_from_a_position_on_are_the_tail_of_all_logits():
    gpt2, ids = small_gpt2(), some_ids(2, 9)
    for first in (0, 1, 5, 8):
        torch.testing.assert_close(gpt2(ids, first=first), gpt2(ids)[:, first:], **CLOSE)


def test_a_later_token_changes_no_earlier_logit():
    gpt2, ids = small_gpt2(), some_ids(1, 9)
    changed = ids.clone()
    changed[0, 5] = ids[0, 5] % 29 + 1
    difference = (gpt2(ids) - gpt2(changed)).abs().amax(-1)[0]
    assert difference[:5].max() == 0
    assert difference[5:].min() > 1e-6


# ---- the KV cache and sampling


@pytest.mark.parametrize("prompt_len", [1, 4])
def test_a_cached_decode_step_gives_the_logits_of_a_full_forward(prompt_len):
    """A causal mask on the one new token would show it only the first key; a position that stands still shows too."""
    gpt2, ids = small_gpt2(), some_ids(3, 24)
    full, cache = gpt2(ids), KVCache(gpt2.config, 3, 24)
    new = ids[:, :prompt_len]
    for t in range(prompt_len, 24):
        torch.testing.assert_close(gpt2.logits(gpt2.trunk(new, cache)[:, -1]), full[:, t - 1], **CLOSE)
        assert cache.filled == t
        new = ids[:, t : t + 1]


def test_a_cache_takes_the_memory_of_the_keys_and_values_of_all_tokens():
    gpt2 = small_gpt2()
    cache = KVCache(gpt2.config, 3, 24)
    gpt2.trunk(some_ids(3, 5), cache)
    assert cache.buffer.numel() == 2 * 2 * 3 * 24 * 16  # 2 layers, keys and values, 3 rows, 24 tokens, 16 wide


def test_behind_a_filled_cache_only_one_token_at_a_time_is_taken():
    gpt2 = small_gpt2()
    cache = KVCache(gpt2.config, 1, 8)
    gpt2.trunk(some_ids(1, 3), cache)
    with pytest.raises(ValueError, match="only one token at a time is supported, not 2"):
        gpt2.trunk(some_ids(1, 2), cache)


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
@pytest.mark.parametrize("width", [7, 58, 256])  # a prime, two blocks, two blocks of 128
def test_the_linear_layers_of_a_decoding_step_are_linear_layers(rows, width):
    """The layouts that are faster for one token a row, for few rows and for many, with a bias and without."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1, 12, dtype=torch.float64), torch.randn(width, 12, dtype=torch.float64)
    for bias in (None, torch.randn(width, dtype=torch.float64)):
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (2, 3), (2, 3, 1), (2, 3, 2), (3, 4, 1)], ids=str)
def test_a_linear_layer_takes_any_number_of_dimensions(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 12, dtype=torch.float64), torch.randn(58, 12, dtype=torch.float64)
    for bias in (None, torch.randn(58, dtype=torch.float64)):
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cached_logprobs_are_those_of_the_policy(temperature):
    policy, ids = small_policy(), some_ids(3, 20)
    cached = cached_logprobs(policy, ids, 4, temperature)
    assert cached.shape == (3, 16)
    torch.testing.assert_close(cached, policy(ids, 4, temperature)[0], **CLOSE)


def test_cached_logprobs_hold_on_rows_of_different_response_lengths():
    policy = small_policy()
    sequences = policy.gpt2.generate(some_ids(8, 3), 20, 1.0, eos_id=0, generator=random_generator("cpu", 0))
    lengths = (sequences[:, 3:] != 0).sum(1)
    assert lengths.min() < lengths.max()
    torch.testing.assert_close(cached_logprobs(policy, sequences, 3), policy(sequences, 3)[0], **CLOSE)


def test_a_row_holds_nothing_but_eos_behind_its_first_eos_and_all_it_drew_before():
    """The same draws with and without an end: a row is cut at its eos, and no other row changes."""
    gpt2, prompts, eos = small_gpt2(), some_ids(16, 3), 7
    prompts[:, 1] = eos  # an eos in the prompt ends nothing
    ended, free = (
        gpt2.generate(prompts, 20, 1.0, eos_id, generator=random_generator("cpu", 3))[:, 3:] for eos_id in (eos, -1)
    )
    behind = (free == eos).cumsum(1) - (free == eos).long() > 0
    assert torch.equal(ended, free.masked_fill(behind, eos))
    assert 0 < behind.any(1).sum() < 16  # some rows end and some do not
    assert len(set(behind.sum(1).tolist())) > 2


def test_decoding_stops_soon_after_every_row_has_ended(monkeypatch):
    calls, trunk = [], GPT2.trunk
    monkeypatch.setattr(GPT2, "trunk", lambda self, *args: calls.append(1) or trunk(self, *args))
    gpt2 = GPT2(GPT2Config(vocab_size=4, n_positions=64, n_embd=8, n_layer=1, n_head=1), n_tokens=1)  # eos or nothing
    assert torch.equal(gpt2.generate(torch.ones(2, 3, dtype=torch.long), 40, 1.0, eos_id=0)[:, 3:], torch.zeros(2, 40))
    assert len(calls) == model_file.STOP_CHECK


def test_decoding_computes_each_token_once():
    """Without the cache each step would go through the whole sequence again, here 11 times the work."""
    gpt2 = small_gpt2(n_embd=64)
    with FlopCounterMode(display=False) as counter:
        gpt2.generate(some_ids(4, 8), 16, 1.0, eos_id=-1, generator=random_generator("cpu", 0))
    products = 4 * (23 * 2 * 12 * 64**2 + 16 * 30 * 64)  # of 4 rows: 23 tokens in two blocks, 16 times the head
    assert 1 <= counter.get_total_flops() / (2 * products) < 1.1  # a multiply and an add; the rest is attention


class Widest(TorchDispatchMode):
    """The most numbers of a tensor whose last dimension is the vocabulary, and how many such tensors were made."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.numbers, self.storages = vocab_size, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == self.vocab_size:
            self.numbers = max(self.numbers, out.numel())
            if not any(out.untyped_storage() is kept or out.data_ptr() == kept.data_ptr() for kept in self.storages):
                self.storages.append(out.untyped_storage())  # kept, so that no other takes its place
        return out


def test_a_gradient_of_log_probabilities_is_one_more_tensor_of_their_logits_size():
    """Autograd's own way makes five: a gather's zeros, a softmax, products and sums."""
    logits, ids = torch.randn(4, 6, 30, dtype=torch.float64, requires_grad=True), some_ids(4, 6)
    logprobs = token_logprobs(logits, ids)
    with Widest(30) as backward:
        logprobs.sum().backward()
    assert len(backward.storages) == 1


def test_the_gradient_of_log_probabilities_is_that_of_log_softmax():
    logits, ids = torch.randn(4, 6, 30, dtype=torch.float64, requires_grad=True), some_ids(4, 6)
    weights = torch.randn(4, 6, dtype=torch.float64)
    ours = token_logprobs(logits, ids)
    theirs = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad((found * weights).sum(), logits)[0] for found in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda logits: token_logprobs(logits, ids), logits)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_a_draw_is_never_a_token_without_probability(u, monkeypatch):
    """The first and the last have none: catches a uniform number of 0 that draws the first, an id behind the last."""
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.full(size, u, dtype=how["dtype"]))
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]]).repeat(3, 1)
    assert draw(logits).tolist() == [2 if u == 0 else 1] * 3


def test_a_draw_is_in_the_vocabulary_where_probabilities_sum_to_less_than_1(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.zeros(size, dtype=how["dtype"]))
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    assert (logits.softmax(-1).double().sum(-1) < 1 - 1e-8).any()  # float32 probabilities are rounded
    assert (draw(logits) < 1000).all()


def test_tokens_below_the_rounding_of_float32_are_all_drawn(monkeypatch):
    """100,000 of them at 1e-8 each, behind one of .999: uniform numbers 1e-8 apart draw neighbours, each another one.

    Near 1 float32 steps by 6e-8: catches sums in it, of which five in six tokens could never be drawn.
    """
    numbers = 5e-4 + 1e-8 * torch.arange(20, dtype=torch.float64)[:, None]
    monkeypatch.setattr(torch, "rand", lambda *size, **how: numbers.to(how["dtype"]))
    logits = torch.full((20, 10**5 + 1), 1e-8).log()
    logits[:, 0] = math.log(0.999)
    assert len(draw(logits).unique()) > 15


def test_only_the_response_meets_the_vocabulary():
    """Logits of the prompt too would be three times the memory, where a prompt is twice as long as its response."""
    policy, ids = small_policy(), some_ids(20, 15)
    with Widest(30) as evaluated:
        policy(ids, 10)
    with Widest(30) as sampled:
        policy.gpt2.generate(ids[:, :10], 5, 1.0, eos_id=-1)
    assert (evaluated.numbers, sampled.numbers) == (20 * 5 * 30, 20 * 30)


def test_rows_of_the_embedding_beyond_the_tokenizer_have_no_logit_and_are_never_sampled(tmp_path, tokenizer):
    n = len(tokenizer)
    theirs = hf_gpt2(n + 12)
    with torch.no_grad():
        theirs.transformer.wte.weight[n:] *= 50  # every one of them would win
    deepcopy(theirs).float().save_pretrained(tmp_path)
    ours = load(tmp_path, n_tokens=n)
    ids = some_ids(4, 3, n)
    torch.testing.assert_close(ours(ids), theirs(ids).logits[..., :n], **CLOSE)
    sequences = ours.generate(ids, 40, 1.0, eos_id=-1, generator=random_generator("cpu", 0))
    assert sequences.max() < n
    expected = theirs(sequences).logits[:, 2:-1, :n].log_softmax(-1).gather(-1, sequences[:, 3:, None])[..., 0]
    torch.testing.assert_close(Policy(ours)(sequences, 3)[0], expected, **CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_softmax_of_the_logits_over_the_temperature(temperature):
    """200,000 draws from 16 tokens: chi-square on 15 degrees of freedom, below its 0.9999 quantile, 44.3."""
    gpt2 = small_gpt2(vocab_size=16, n_embd=8, n_layer=1, scale=0.7).float()
    prompt = torch.tensor([[3, 5]])
    probs = (gpt2(prompt)[0, -1].detach().double() / temperature).softmax(-1)
    draws = gpt2.generate(prompt.expand(200_000, 2), 1, temperature, eos_id=-1, generator=random_generator("cpu", 0))[
        :, 2
    ]
    expected = 200_000 * probs
    assert expected.min() > 20
    assert expected.max() > 2 * expected.min()
    observed = torch.bincount(draws, minlength=16)
    assert ((observed - expected) ** 2 / expected).sum() < 44.3


def test_a_token_of_probability_zero_is_never_sampled():
    gpt2 = small_gpt2(vocab_size=16, n_embd=8, n_layer=1, scale=0.7).float()
    prompt = torch.tensor([[3, 5]])
    with torch.no_grad():
        hidden = gpt2.trunk(prompt)[0, -1]
        gpt2.wte.weight[9] = -200 * hidden / hidden.dot(hidden)  # a logit of -200: exp underflows in float32
    draws = gpt2.generate(prompt.expand(20_000, 2), 1, 1.0, eos_id=-1, generator=random_generator("cpu", 0))[:, 2]
    assert gpt2(prompt)[0, -1].softmax(-1)[9] == 0
    assert sorted(set(draws.tolist())) == [i for i in range(16) if i != 9]


def test_generate_samples_from_the_distribution_that_the_policy_reports(monkeypatch):
    """Softmax as generate takes it, step by step at a temperature, is exp(logprob) of the token it drew."""
    drawn_from, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda z, dim: drawn_from.append(softmax(z, dim)) or drawn_from[-1])
    policy = small_policy()
    sequences = policy.gpt2.generate(some_ids(3, 4), 10, 0.7, eos_id=-1, generator=random_generator("cpu", 0))
    probs = torch.stack(drawn_from, dim=1).gather(-1, sequences[:, 4:, None])[..., 0]
    torch.testing.assert_close(policy(sequences, 4, 0.7)[0], probs.log(), **CLOSE)


@pytest.mark.parametrize("static", [False, True])
def test_all_that_decoding_and_a_policy_make_is_on_the_device_of_the_weights(static):
    """Whatever torch's default device is; on the meta device a tensor has no numbers."""
    gpt2, prompts, dice = small_gpt2(), some_ids(3, 4), torch.Generator()
    gpt2.static_caches = {} if static else None
    expected = gpt2.generate(prompts, 12, 1.0, 7, dice.manual_seed(0))
    gpt2.static_caches = {} if static else None
    with torch.device("meta"):
        assert torch.equal(gpt2.generate(prompts, 12, 1.0, 7, dice.manual_seed(0)), expected)
        assert all(parameter.device.type == "cpu" for parameter in Policy(gpt2).parameters())


def test_a_generator_draws_the_same_for_the_same_key_only():
    def draws(*key):
        return tuple(torch.rand(4, generator=random_generator("cpu", *key)).tolist())

    assert draws(1, 2) == draws(1, 2)
    assert len({draws(1, 2), draws(2, 1), draws(1, 3), draws(1), draws(1, 2, 1)}) == 5


# ---- log-probabilities, values, KL


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_logprob_is_read_from_the_logits_of_the_position_before_its_token(temperature):
    policy, ids, P = small_policy(), some_ids(2, 9), 4
    logprobs, values = policy(ids, P, temperature)
    assert logprobs.shape == values.shape == (2, 5)
    table = (policy.gpt2(ids) / temperature).log_softmax(-1)
    for row in range(2):
        for t in range(5):
            assert logprobs[row, t].item() == pytest.approx(table[row, P - 1 + t, ids[row, P + t]].item(), abs=1e-9)


def test_a_value_is_read_from_the_hidden_state_before_its_token():
    policy, ids, P = small_policy(), some_ids(2, 9), 4
    expected = policy.value_head(policy.gpt2.trunk(ids))[..., 0]
    torch.testing.assert_close(policy(ids, P)[1], expected[:, P - 1 : -1], **CLOSE)


@pytest.mark.parametrize("t", range(5))
def test_changing_a_token_changes_its_logprob_and_only_later_values(t):
    policy, ids, P = small_policy(), some_ids(1, 9), 4
    changed = ids.clone()
    changed[0, P + t] = ids[0, P + t] % 29 + 1
    logprobs, values = ((a - b).abs()[0] for a, b in zip(policy(ids, P), policy(changed, P)))
    assert (logprobs[:t] == 0).all()
    assert (logprobs[t:] > 1e-6).all()
    assert (values[: t + 1] == 0).all()
    assert (values[t + 1 :] > 1e-6).all()


def test_values_are_zero_before_training(gpt2_folder):
    policy = load_policy(*open_gpt2(str(gpt2_folder)))
    assert (policy(some_ids(2, 9), 4)[1] == 0).all()


def test_exact_kl_is_the_sum_over_the_vocabulary_and_the_real_tokens():
    policy, reference, ids, P = small_policy(0), small_policy(1), some_ids(2, 7), 3
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    p, q = ((m.gpt2(ids) / 0.7).softmax(-1).tolist() for m in (policy, reference))
    expected = [
        sum(a * math.log(a / b) for t in range(length) for a, b in zip(p[row][P - 1 + t], q[row][P - 1 + t]))
        for row, length in [(0, 2), (1, 4)]
    ]
    kl = exact_kl(policy, reference, ids, mask, P, 0.7)
    assert kl.tolist() == pytest.approx(expected, abs=1e-9)
    assert (kl > 0.01).all()
    assert exact_kl(policy, deepcopy(policy), ids, mask, P, 0.7).abs().max() == 0
    assert torch.equal(exact_kl(policy, reference, ids, mask, P), exact_kl(policy, reference, ids, mask, P, 1.0))


def test_exact_kl_has_the_logits_of_one_row_at_a_time():
    policy, reference, ids, P = small_policy(0), small_policy(1), some_ids(8, 23), 3
    vocabulary = policy.gpt2.n_tokens
    with LogitsMemory(vocabulary) as memory:
        exact_kl(policy, reference, ids, torch.ones(8, 20).bool(), P)
    assert memory.largest == 20 * vocabulary
    assert memory.most <= 5 * memory.largest


def test_bf16_rounds_the_trunk_and_never_the_logits():
    """GPT-2's logits lie near -100, where bf16 steps by 0.5: rounding them would cost a tenth of a nat a token."""
    exact = small_gpt2(n_embd=64)
    with torch.no_grad():  # an offset of -100 on every logit, along a direction of its own
        exact.wte.weight[:, 0] = -10
        exact.ln_f.weight[0] = 0
        exact.ln_f.bias[0] = 10
    policy, ids = Policy(deepcopy(exact).float()), some_ids(16, 20)
    policy.gpt2.bf16 = True
    logits, expected = policy.gpt2(ids), Policy(exact)(ids, 4)[0]
    assert -110 < exact(ids).mean() < -90
    assert logits.dtype == policy(ids, 4)[0].dtype == policy(ids, 4)[1].dtype == torch.float32
    rounded = token_logprobs(logits.bfloat16().float()[:, 3:-1], ids[:, 4:])
    assert 0 < (policy(ids, 4)[0] - expected).abs().mean() < 0.03
    assert (rounded - expected).abs().mean() > 0.05


def test_bf16_is_bf16_where_autocast_has_float16_by_default():
    """As on a GPU. A cache is of the dtype that autocast computes in, what leaves the trunk of that of the weights."""
    gpt2 = small_gpt2().float()
    gpt2.bf16, cache = True, KVCache(gpt2.config, 2, 5)
    with torch.autocast("cpu", torch.float16):
        hidden = gpt2.trunk(some_ids(2, 5), cache)
    assert (cache.buffer.dtype, hidden.dtype) == (torch.bfloat16, torch.float32)


def test_the_head_of_a_bf16_run_is_exact_where_logits_lie_near_minus_100(monkeypatch):
    """L5, from final hidden states on: logits of -100 +- 3 rounded to bf16 cost .17 nats a token, to fp16 .02."""
    policy, ids = Policy(small_gpt2(vocab_size=500, n_embd=64)), some_ids(16, 20, 500)
    hidden = torch.randn(16, 19, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden[..., 0] = 10
    with torch.no_grad():
        policy.gpt2.wte.weight.mul_(1.25)[:, 0] = -10  # .3 * 1.25 * sqrt(64) = 3
    monkeypatch.setattr(GPT2, "trunk", lambda self, ids: hidden.to(self.wte.weight.dtype))
    logits, expected = policy.gpt2.logits(hidden), policy(ids, 4)[0]
    assert -101 < logits.mean() < -99 and 2.5 < logits.std() < 3.5
    policy.float().gpt2.bf16 = True
    assert (policy(ids, 4)[0] - expected).abs().mean() < 1e-3


# ---- the self-check before PPO's first step


@pytest.fixture
def check_args():
    """A policy, its copy, prompts, and a config at a temperature other than 1."""
    policy = small_policy()
    return policy, deepcopy(policy), some_ids(4, 4), PPOConfig(response_len=12, temperature=0.7)


def refuses(check_args, name):
    largest, mean = ROUNDING[check_args[0].gpt2.bf16]
    with pytest.raises(BadInput, match=f"self-check: {name} is off by .* rounding explains at most {largest} and {mean}$"):
        check_policy(*check_args)
    return True


def test_the_self_check_passes_for_a_policy_and_its_copy(check_args):
    names, number = ("log ratio", "KL", "KV cache"), r"\d[\d.e-]*"
    line = "; ".join(rf"\|{name}\| at most {number}, mean {number}" for name in names)
    assert re.fullmatch(f"{line} nats", check_policy(*check_args))


def test_the_self_check_looks_at_whole_responses_that_its_seed_alone_draws(monkeypatch):
    """An id that ended a row would leave the check nothing but that id; global random numbers are the training's."""
    seen, forward = [], Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, ids, *args: seen.append(ids) or forward(self, ids, *args))
    policy, cfg = small_policy(vocab_size=3), PPOConfig(response_len=16)
    before = torch.get_rng_state()
    for seed in (0, 0, 1):
        check_policy(policy, deepcopy(policy), some_ids(8, 4, 3), replace(cfg, seed=seed))
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = seen[::3]
    assert torch.equal(first, again) and not torch.equal(first, other)
    last, new = first[:, 4:-1], first[:, 5:]
    assert all((new[last == token] != token).any() for token in range(3))


def test_the_self_check_refuses_a_reference_that_is_not_the_policy(check_args):
    with torch.no_grad():
        check_args[1].gpt2.wte.weight[5] += 0.1
    assert refuses(check_args, "KL")


def test_the_self_check_refuses_a_reference_of_not_a_number(check_args):
    with torch.no_grad():
        check_args[1].gpt2.wte.weight[5] = math.nan
    assert refuses(check_args, "KL")


def test_the_self_check_refuses_dropout(check_args):
    check_args[0].gpt2.ln_f.register_forward_hook(lambda module, args, out: F.dropout(out, 0.1))
    assert refuses(check_args, "log ratio")


def test_the_self_check_refuses_a_trunk_that_ignores_the_cache(check_args, monkeypatch):
    trunk = GPT2.trunk
    monkeypatch.setattr(GPT2, "trunk", lambda self, ids, cache=None: trunk(self, ids))
    assert refuses(check_args, "KV cache")


def test_the_self_check_refuses_a_causal_mask_on_a_cached_step(check_args, monkeypatch):
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, attn_mask, is_causal: attention(q, k, v, is_causal=True)
    )
    assert refuses(check_args, "KV cache")


def test_the_self_check_refuses_a_temperature_in_the_cached_pass_alone(check_args, monkeypatch):
    """It runs at the temperature of the config: at 1 it would not see that the policy ignores the temperature."""
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, ids, prompt_len, temperature: forward(self, ids, prompt_len))
    assert refuses(check_args, "KV cache")


@pytest.mark.parametrize("bf16", [False, True])
def test_the_self_check_bounds_the_largest_and_the_mean_error(check_args, monkeypatch, bf16):
    policy, ref_policy, prompts, cfg = check_args
    policy.float().gpt2.bf16 = ref_policy.float().gpt2.bf16 = bf16
    largest, mean = ROUNDING[bf16]
    for everywhere, at_one_token, passes in (
        (0.5 * mean, 0.8 * largest, True),
        (1.1 * mean, 0.0, False),
        (0.0, 1.1 * largest, False),
    ):
        error = torch.full((len(prompts), cfg.response_len), everywhere)
        error[0, 0] += at_one_token
        monkeypatch.setattr(self_check, "cached_logprobs", lambda policy, *args, error=error: policy(*args)[0] + error)
        assert check_policy(*check_args) if passes else refuses(check_args, "KV cache")


@pytest.fixture(scope="module")
def mini():
    return open_gpt2(str(ROOT / "asset" / "mini" / "gpt2"))


def check_mini(mini, bf16, seed=0):
    policy, cfg = load_policy(*mini, bf16), PPOConfig(response_len=40, seed=seed)
    return check_policy(policy, deepcopy(policy), some_ids(8, 5, 8000, seed), cfg)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_self_check_passes_on_the_mini_model_at_half_of_each_bound(mini, bf16, monkeypatch):
    monkeypatch.setitem(ROUNDING, bf16, tuple(bound / 2 for bound in ROUNDING[bf16]))
    for seed in range(3):
        assert "KV cache" in check_mini(mini, bf16, seed)


def late_positions(hidden):
    def wrong(self, ids, positions, cache):
        if cache and positions.start:
            positions = slice(positions.start + 1, positions.stop + 1)
        return hidden(self, ids, positions, cache)

    return wrong


def warmer(forward):
    return lambda self, sequences, prompt_len, temperature=1.0: forward(self, sequences, prompt_len, 1.05 * temperature)


def bidirectional(attention):
    def wrong(q, k, v, attn_mask, is_causal):
        return attention(q, k, v, attn_mask=attn_mask, is_causal=False)

    return wrong


def blind(attention):
    """A cached step that attends to all tokens but the first."""

    def wrong(q, k, v, attn_mask, is_causal):
        seen = slice(int(q.shape[2] == 1), None)
        return attention(q, k[:, :, seen], v[:, :, seen], attn_mask=attn_mask, is_causal=is_causal)

    return wrong


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "owner, name, mistake",
    [
        (GPT2, "hidden", late_positions),
        (Policy, "forward", warmer),
        (F, "scaled_dot_product_attention", bidirectional),
        (F, "scaled_dot_product_attention", blind),
    ],
)
def test_the_self_check_tells_typical_mistakes_from_rounding(mini, monkeypatch, owner, name, mistake, bf16):
    monkeypatch.setattr(owner, name, mistake(getattr(owner, name)))
    assert "self-check: KV cache is off by" in message(check_mini, mini, bf16)


# ---- reading folders


def prefixed(state):
    return state


def bare(state):
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def with_lm_head(state):
    return state | {"lm_head.weight": state["transformer.wte.weight"].clone()}


def with_masks(state):
    """As the hub's `gpt2` is stored; a filter for names ending in `attn.bias` drops c_attn.bias too."""
    masks = {}
    for layer in range(2):
        masks[f"h.{layer}.attn.bias"] = torch.ones(1, 1, N_POSITIONS, N_POSITIONS, dtype=torch.uint8).tril()
        masks[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return bare(state) | masks


def to_safetensors(state, folder):
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def to_bin(state, folder):
    torch.save(state, folder / "pytorch_model.bin")


def in_shards(writer, single, index):
    """A writer of two files and the index that says which tensor lies where."""

    def write_shards(state, folder):
        names, weight_map = sorted(state), {}
        for i in range(2):
            part, file = names[i::2], single.replace(".", f"-0000{i + 1}-of-00002.", 1)
            writer({name: state[name] for name in part}, folder)
            (folder / single).rename(folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return write_shards


WRITERS = {
    "safetensors": to_safetensors,
    "bin": to_bin,
    "safetensors shards": in_shards(to_safetensors, "model.safetensors", "model.safetensors.index.json"),
    "bin shards": in_shards(to_bin, "pytorch_model.bin", "pytorch_model.bin.index.json"),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("style", [prefixed, bare, with_lm_head, with_masks])
def test_every_style_of_key_and_file_gives_the_same_weights(tmp_path, hf, state, style, writer):
    hf.config.save_pretrained(tmp_path)
    writer(style(state), tmp_path)
    expected = bare(state)
    loaded = load_gpt2(tmp_path, read_config(tmp_path)).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name].t() if name.endswith(TRANSPOSED) else expected[name]), name
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.float32


def test_shards_as_transformers_writes_them_are_read(tmp_path, hf, ids):
    deepcopy(hf).float().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(load(tmp_path)(ids), hf(ids).logits, **CLOSE)


def test_half_precision_weights_become_float32(tmp_path, hf, state):
    write(tmp_path, {name: tensor.bfloat16() for name, tensor in state.items()}, hf.config)
    gpt2 = load_gpt2(tmp_path, read_config(tmp_path))
    assert {p.dtype for p in gpt2.parameters()} == {torch.float32}
    assert torch.equal(gpt2.wte.weight, state["transformer.wte.weight"].bfloat16().float())


def test_loaded_weights_can_be_trained_and_none_is_left_on_the_meta_device(gpt2_folder):
    parameters = list(load_gpt2(gpt2_folder, read_config(gpt2_folder)).parameters())
    assert all(p.requires_grad and p.device.type == "cpu" for p in parameters)


def missing(state):
    del state["transformer.h.1.mlp.c_fc.bias"]


def extra(state):
    state["transformer.h.2.ln_1.weight"] = torch.ones(64)


def mis_shaped(state):
    state["transformer.wpe.weight"] = torch.zeros(32, 64)


def no_conv1d(state):
    """nn.Linear's layout where transformers' Conv1D is the format."""
    state["transformer.h.0.attn.c_attn.weight"] = state["transformer.h.0.attn.c_attn.weight"].t()


def untied(state):
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1e-3


@pytest.mark.parametrize(
    "damage, message",
    [
        (missing, r"does not fit: missing h\.1\.mlp\.c_fc\.bias \(256,\)"),
        (extra, r"does not fit: unexpected h\.2\.ln_1\.weight \(64,\)"),
        (mis_shaped, r"does not fit: wpe\.weight is \(32, 64\), expected \(48, 64\)"),
        (no_conv1d, r"does not fit: h\.0\.attn\.c_attn\.weight is \(64, 192\), expected \(192, 64\)"),
        (untied, r"lm_head\.weight differs from wte\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, hf, state, damage, message):
    """transformers only warns, and fills what is missing with random numbers."""
    damaged = dict(state)
    damage(damaged)
    write(tmp_path, damaged, hf.config)
    with pytest.raises(BadInput, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("model_type", "gpt_neo"),
        ("model_type", None),
        ("activation_function", "gelu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
    ],
)
def test_a_config_that_asks_for_other_arithmetic_is_refused(tmp_path, hf, name, value):
    hf.config.save_pretrained(tmp_path)
    edit_config(tmp_path, **{name: value})
    with pytest.raises(BadInput) as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / 'config.json'}: {name} is {value!r}, supported: " in message
    assert all(repr(supported) in message for supported in SUPPORTED[name])


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, hf):
    hf.config.save_pretrained(tmp_path)
    edit_config(tmp_path, n_head=5)
    with pytest.raises(BadInput, match="n_head 5 does not divide n_embd 64"):
        read_config(tmp_path)


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused_with_both_sizes(gpt2_folder, tokenizer):
    n = len(tokenizer)
    assert len(load_tokenizer(gpt2_folder, GPT2Config(vocab_size=n))) == n
    with pytest.raises(BadInput, match=f"tokenizer has {n} ids, the embedding {n - 1} rows"):
        load_tokenizer(gpt2_folder, GPT2Config(vocab_size=n - 1))


def test_a_tokenizer_that_is_missing_or_has_no_end_of_text_is_refused(tmp_path, tokenizer):
    with pytest.raises(BadInput, match="no tokenizer can be read"):
        load_tokenizer(tmp_path, GPT2Config())
    without = deepcopy(tokenizer)
    without.eos_token = None
    without.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="no end-of-text token"):
        load_tokenizer(tmp_path, GPT2Config())


def test_prompt_and_response_must_fit_the_context(tokenizer):
    cfg = PPOConfig(max_prompt_len=8, response_len=16)
    assert check_context(cfg, GPT2Config(n_positions=24), tokenizer) is None
    with pytest.raises(BadInput, match=r"max_prompt_len 8 \+ response_len 16 is over the model's 23 positions"):
        check_context(cfg, GPT2Config(n_positions=23), tokenizer)


def test_a_control_must_fit_the_context_too(tokenizer):
    longest = max(len(tokenizer(control).input_ids) for control in ("[negative]", "[positive]"))
    cfg = PPOConfig(max_prompt_len=8, response_len=16, task="controlled")
    assert check_context(cfg, GPT2Config(n_positions=24 + longest), tokenizer) is None
    with pytest.raises(BadInput, match=f"a control of {longest} tokens"):
        check_context(cfg, GPT2Config(n_positions=23 + longest), tokenizer)


def test_loading_draws_no_random_number(gpt2_folder):
    """M10: weights that the file's overwrite are not initialised first, which takes half a minute for GPT-2 XL."""
    before = torch.get_rng_state()
    load_gpt2(gpt2_folder, read_config(gpt2_folder))
    assert torch.equal(torch.get_rng_state(), before)


PEAK = """
import sys
from pathlib import Path
from runtime.hub import load_gpt2, read_config

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

small, large = map(Path, sys.argv[1:])
load_gpt2(small, read_config(small))
before = peak()
model = load_gpt2(large, read_config(large))
print((peak() - before) / sum(p.numel() * 4 for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path, gpt2_folder):
    """Twice the weights, if the state dict were read as a whole and copied."""
    config = GPT2Config(vocab_size=8192, n_embd=512, n_head=8)  # 168 MB
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT2(config).state_dict().items()}
    weights = {name: torch.zeros(shape[::-1] if name.endswith(TRANSPOSED) else shape) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "vocab_size": 8192, "n_embd": 512, "n_head": 8})
    )
    del weights
    command = [sys.executable, "-c", PEAK, str(gpt2_folder), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) <= 1.3


# ---- writing folders


@pytest.fixture(scope="module")
def exported(tmp_path_factory, gpt2_folder, tokenizer):
    """gpt2_folder, loaded and saved again, with a value head."""
    folder = tmp_path_factory.mktemp("exported")
    policy = load_policy(*open_gpt2(str(gpt2_folder)))
    with torch.no_grad():
        policy.value_head.weight.copy_(torch.arange(64.0))
        policy.value_head.bias.fill_(-3)
    save_gpt2(policy.gpt2, tokenizer, folder, policy.value_head)
    return folder


def test_load_and_save_give_back_every_tensor(gpt2_folder, exported):
    """As transformers wrote them: the same names, so no lm_head.weight and no value head, and the same numbers."""
    before, after = dict(read_tensors(gpt2_folder)), dict(read_tensors(exported))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with safe_open(exported / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_transformers_reads_an_export_and_computes_the_same(exported, hf, ids):
    from transformers import GPT2LMHeadModel

    theirs, info = GPT2LMHeadModel.from_pretrained(exported, output_loading_info=True)
    assert theirs.dtype == torch.float32
    assert not any(info.values()), info
    assert torch.equal(theirs.double().eval()(ids).logits, hf(ids).logits)


def test_transformers_decodes_an_export_greedily_as_we_do(exported, tokenizer):
    from transformers import GPT2LMHeadModel

    ours, ids = load(exported), some_ids(1, 4, len(tokenizer))
    theirs = GPT2LMHeadModel.from_pretrained(exported).double()
    found = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    expected = ids
    while expected.shape[1] < 16 and expected[0, -1] != tokenizer.eos_token_id:
        expected = torch.cat([expected, ours(expected)[:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == expected.tolist()


def test_an_export_opens_in_a_transformers_pipeline(exported):
    from transformers import pipeline

    generator = pipeline("text-generation", model=str(exported))
    text = generator("I loved this", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("I loved this")
    assert len(text) > len("I loved this")
    assert generator.model.config.activation_function == "gelu_new"
    assert generator.model.config.eos_token_id == generator.tokenizer.eos_token_id == 0


def test_the_config_of_an_export_is_the_config_that_was_read(tmp_path, tokenizer):
    config = GPT2Config(len(tokenizer), 20, 16, 1, 2, n_inner=24, layer_norm_epsilon=1e-6)
    save_gpt2(GPT2(config).init_weights(), tokenizer, tmp_path)
    assert read_config(tmp_path) == config
    assert not (tmp_path / VALUE_HEAD).exists()


def test_the_value_head_lies_in_a_file_of_its_own_and_is_read_back(exported):
    assert load_file(exported / VALUE_HEAD).keys() == {"weight", "bias"}
    head = load_policy(*open_gpt2(str(exported))).value_head
    assert torch.equal(head.weight, torch.arange(64.0)[None])
    assert head.bias.tolist() == [-3]
    assert head.weight.requires_grad


@pytest.fixture
def folder_with_head(tmp_path, gpt2_folder):
    """gpt2_folder, and the path where its value head belongs."""
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    return tmp_path, tmp_path / VALUE_HEAD


def test_a_value_head_of_another_width_is_refused(folder_with_head):
    folder, file = folder_with_head
    save_file({"weight": torch.zeros(1, 32), "bias": torch.zeros(1)}, file)
    with pytest.raises(BadInput, match=r"value_head\.safetensors .*weight is \(1, 32\), expected \(1, 64\)"):
        load_policy(*open_gpt2(str(folder)))


def test_a_damaged_value_head_is_refused_with_its_path(folder_with_head):
    folder, file = folder_with_head
    file.write_bytes(b"half of a")
    with pytest.raises(BadInput, match=r"value_head\.safetensors"):
        load_policy(*open_gpt2(str(folder)))


# ---- the compiled decoding step, as far as a CPU can tell


@pytest.fixture
def compiled_eagerly(monkeypatch):
    """torch.compile without a compiler: what it traces is run as it is, and a second trace is an error."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: compile(function, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def test_the_compiled_decoding_step_writes_the_same_and_is_traced_once(compiled_eagerly):
    """For prompts of all lengths, with a cache that held longer responses before, after weights that changed in place.

    Catches a mask that shows a place to come or hides the last one, a position that stands still, and a step whose
    shapes change: one CUDA graph for each of them.
    """
    model = GPT2(GPT2Config(vocab_size=50, n_positions=80, n_embd=32, n_layer=2, n_head=4)).init_weights()
    for parameter in model.parameters():
        parameter.data *= 3
    compiled = deepcopy(model)
    compiled.compile_decoding()
    for prompt_len, new_tokens in ((5, 30), (2, 30), (7, 11)):
        prompts = torch.randint(1, 50, (4, prompt_len), generator=torch.Generator().manual_seed(prompt_len))
        for gpt2 in (model, compiled):
            gpt2.wte.weight.data *= 1.1
        written = [
            gpt2.generate(prompts, new_tokens, 1.0, eos_id=0, generator=random_generator("cpu", prompt_len))
            for gpt2 in (model, compiled)
        ]
        assert torch.equal(*written)
    assert list(compiled.static_caches) == [(4, 64)]


@pytest.fixture
def static_gpt2():
    """A GPT-2 that decodes with a static cache as after compile_decoding, and that nothing compiles."""
    gpt2 = small_gpt2(n_positions=70, n_layer=3)
    gpt2.static_caches = {}
    return gpt2


@pytest.mark.parametrize("length", [9, 65])  # 64 places are the least
@torch.no_grad()
def test_a_static_step_gives_the_logits_of_a_full_forward(static_gpt2, length):
    """In float64 to 1e-9, so that no draw can hide a difference; up to the last place of the cache."""
    ids, start = some_ids(3, length), length - 5
    full, cache = static_gpt2(ids), KVCache(static_gpt2.config, 3, length)
    static_gpt2.next_logits(ids[:, :start], cache)
    cache = static_gpt2.static_cache(cache)
    for t in range(start, length):
        torch.testing.assert_close(static_gpt2.next_logits(ids[:, t : t + 1], cache), full[:, t], **CLOSE)


def test_every_token_but_the_first_takes_a_static_step(static_gpt2, monkeypatch):
    steps, step = [], static_gpt2.static_step
    monkeypatch.setattr(static_gpt2, "static_step", lambda new, cache: steps.append(new.shape) or step(new, cache))
    static_gpt2.generate(some_ids(3, 4), 6, 1.0, -1, random_generator("cpu", 0))
    assert steps == 5 * [(3, 1)]


def test_the_decoding_step_is_compiled_with_cuda_graphs(static_gpt2, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, mode: modes.append(mode) or function)
    static_gpt2.compile_decoding()
    assert [torch._inductor.list_mode_options(mode)["triton.cudagraphs"] for mode in modes] == [True]
