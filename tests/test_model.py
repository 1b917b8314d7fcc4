"""The network compared with transformers' GPT-2 in float64; sampling, log-probabilities, model folders."""

import json
import math
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, LogitsMemory, hf_gpt2
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model import GPT2, STOP_CHECK, GPT2Config, KVCache, Policy, draw, exact_kl, token_logprobs
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

CLOSE = dict(atol=1e-9, rtol=0)
N_POSITIONS = 48  # of conftest.hf_gpt2


def load(folder, n_tokens=None):
    """Load the GPT-2 of a folder with our loader, in float64."""
    return load_gpt2(folder, read_config(folder), n_tokens).double()


def write(folder, state, config, **changes):
    """Write a model folder: tensors, and a transformers config with these changes to config.json."""
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    edit_config(folder, **changes)
    return folder


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def small_gpt2(seed=0, scale=1.0, **changes):
    """Return our GPT-2 with random weights of standard deviation 0.3 * scale, in float64."""
    shape = dict(vocab_size=30, n_positions=24, n_embd=16, n_layer=2, n_head=2)
    gpt2 = GPT2(GPT2Config(**(shape | changes))).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3 * scale)
    return gpt2


def small_policy(seed=0, **changes):
    """Return a policy whose value head is not zero, so that values differ between positions."""
    policy = Policy(small_gpt2(seed, **changes))
    nn.init.constant_(policy.value_head.weight, 0.5)
    return policy


def random_ids(rows, length, vocab_size=30, seed=1):
    return torch.randint(1, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def hf(tokenizer):
    """The model of conftest's gpt2_folder in transformers' implementation, in float64."""
    return hf_gpt2(len(tokenizer))


@pytest.fixture(scope="module")
def state(hf):
    """The weights of hf as transformers stores them: float32, without the LM head."""
    tensors = {name: tensor.detach().float().clone() for name, tensor in hf.state_dict().items()}
    del tensors["lm_head.weight"]
    return tensors


@pytest.fixture(scope="module")
def ids(tokenizer):
    return random_ids(3, 20, len(tokenizer))


# ---- the network


def test_logits_are_those_of_transformers(gpt2_folder, hf, ids):
    """In float64 to 1e-9: on a model this small, GPT-2's tanh GELU and the exact GELU differ by only 1e-4."""
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
def test_every_field_of_the_config_that_defines_the_network_is_used(tmp_path, changes):
    theirs = hf_gpt2(30, **changes)
    deepcopy(theirs).float().save_pretrained(tmp_path)
    ids = random_ids(2, 10)
    torch.testing.assert_close(load(tmp_path)(ids), theirs(ids).logits, **CLOSE)


def test_dropout_in_the_config_and_train_mode_have_no_effect(tmp_path, state, hf, ids):
    """PPO computes the same log-probabilities twice: with dropout, the first ratio would not be 1."""
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
    """Fields that change no shape of a parameter, such as n_head, are compared with the defaults of transformers."""
    from transformers import GPT2Config as TheirConfig

    with torch.device("meta"):
        gpt2 = GPT2(GPT2Config())
    assert len(list(gpt2.parameters())) == 148
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808
    theirs = TheirConfig()
    assert asdict(gpt2.config) == {name: getattr(theirs, name) for name in asdict(gpt2.config)}


def test_the_lm_head_of_a_copy_is_tied_to_the_embedding_of_the_copy(ids, gpt2_folder):
    original = load(gpt2_folder)
    copy, before = deepcopy(original), original(ids)
    with torch.no_grad():
        copy.wte.weight.zero_()
    assert copy(ids).abs().max() == 0
    assert torch.equal(original(ids), before)


def test_initial_weights_have_the_standard_deviations_of_the_paper():
    """0.02, divided by sqrt(2 n_layer) for projections into the residual stream; biases are 0 and gains 1."""
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


def test_the_whole_context_can_be_used_and_one_more_token_is_refused():
    gpt2 = small_gpt2()
    assert gpt2(random_ids(1, 24)).shape == (1, 24, 30)
    with pytest.raises(ValueError, match="25 tokens .* context of 24"):
        gpt2(random_ids(1, 25))
    with pytest.raises(ValueError, match="25 tokens .* context of 24"):
        gpt2.generate(random_ids(1, 20), 6, 1.0, eos_id=-1)


def test_logits_from_a_first_position_are_the_tail_of_all_logits():
    gpt2, ids = small_gpt2(), random_ids(2, 9)
    for first in (0, 1, 5, 8):
        torch.testing.assert_close(gpt2(ids, first=first), gpt2(ids)[:, first:], **CLOSE)


def test_a_later_token_changes_no_earlier_logit():
    gpt2, ids = small_gpt2(), random_ids(1, 9)
    changed = ids.clone()
    changed[0, 5] = ids[0, 5] % 29 + 1
    difference = (gpt2(ids) - gpt2(changed)).abs().amax(-1)[0]
    assert difference[:5].max() == 0
    assert difference[5:].min() > 1e-6


# ---- the KV cache and sampling


@pytest.mark.parametrize("prompt_len", [1, 2, 3])
def test_a_prompt_of_any_length_is_causal_in_an_empty_cache(prompt_len):
    """Catches a first token that attends to the second one of a prompt of two."""
    gpt2, ids = small_gpt2(), random_ids(4, 3)[:, :prompt_len]
    torch.testing.assert_close(gpt2.trunk(ids, KVCache(gpt2.config, 4, 8)), gpt2.trunk(ids))


@pytest.mark.parametrize("prompt_len", [1, 4])
def test_a_cached_decode_step_gives_the_logits_of_a_full_forward(prompt_len):
    """Fails with a causal mask on a single new token, which would see only the first key, or if positions stay at 0."""
    gpt2, ids = small_gpt2(), random_ids(3, 24)
    full, cache = gpt2(ids), KVCache(gpt2.config, 3, 24)
    new = ids[:, :prompt_len]
    for t in range(prompt_len, 24):
        torch.testing.assert_close(gpt2.logits(gpt2.trunk(new, cache)[:, -1]), full[:, t - 1], **CLOSE)
        assert cache.filled == t
        new = ids[:, t : t + 1]


def test_the_cache_has_the_size_of_the_keys_and_values_of_all_tokens():
    gpt2 = small_gpt2()
    cache = KVCache(gpt2.config, 3, 24)
    gpt2.trunk(random_ids(3, 5), cache)
    assert cache.buffer.numel() == 2 * 2 * 3 * 24 * 16  # layers, keys and values, rows, tokens, width


def test_with_a_non_empty_cache_only_one_token_at_a_time_is_accepted():
    gpt2 = small_gpt2()
    cache = KVCache(gpt2.config, 1, 8)
    gpt2.trunk(random_ids(1, 3), cache)
    with pytest.raises(ValueError, match="only one token at a time is supported, not 2"):
        gpt2.trunk(random_ids(1, 2), cache)


def test_a_row_is_padded_with_eos_after_its_first_one_and_no_other_token_changes():
    """Responses from the same random numbers, once with an eos_id and once without one."""
    gpt2, prompts, eos = small_gpt2(), random_ids(16, 3), 7
    prompts[:, 1] = eos  # in the prompt it does not end the response
    padded, unpadded = (
        gpt2.generate(prompts, 20, 1.0, eos_id, generator=random_generator("cpu", 3))[:, 3:] for eos_id in (eos, -1)
    )
    after_eos = (unpadded == eos).cumsum(1) - (unpadded == eos).long() > 0
    assert torch.equal(padded, unpadded.masked_fill(after_eos, eos))
    assert 0 < after_eos.any(1).sum() < 16  # some rows end and some do not
    assert len(set(after_eos.sum(1).tolist())) > 2


def test_decoding_stops_at_the_first_check_after_every_row_has_ended(monkeypatch):
    calls, trunk = [], GPT2.trunk
    monkeypatch.setattr(GPT2, "trunk", lambda self, *args: calls.append(1) or trunk(self, *args))
    gpt2 = GPT2(GPT2Config(vocab_size=4, n_positions=64, n_embd=8, n_layer=1, n_head=1), n_tokens=1)  # only eos
    assert torch.equal(gpt2.generate(torch.ones(2, 3, dtype=torch.long), 40, 1.0, eos_id=0)[:, 3:], torch.zeros(2, 40))
    assert len(calls) == STOP_CHECK


def test_decoding_computes_each_token_once():
    """Without the cache, each step would process the whole sequence again: here 11 times the FLOPs."""
    gpt2 = small_gpt2(n_embd=64)
    with FlopCounterMode(display=False) as counter:
        gpt2.generate(random_ids(4, 8), 16, 1.0, eos_id=-1, generator=random_generator("cpu", 0))
    products = 4 * (23 * 2 * 12 * 64**2 + 16 * 30 * 64)  # 4 rows: 23 tokens in two blocks, 16 in the LM head
    assert 1 <= counter.get_total_flops() / (2 * products) < 1.1  # 2 FLOPs per product; the rest is attention


def test_the_backward_pass_of_token_logprobs_needs_one_tensor_of_the_size_of_the_logits():
    """With autograd's own backward pass, there are three such tensors at a time."""
    logits, ids = torch.randn(4, 6, 30, dtype=torch.float64, requires_grad=True), random_ids(4, 6)
    logprobs = token_logprobs(logits, ids)
    with LogitsMemory(30) as backward:
        logprobs.sum().backward()
    assert backward.most == logits.numel()


def test_the_gradient_of_token_logprobs_equals_that_of_log_softmax():
    logits, ids = torch.randn(4, 6, 30, dtype=torch.float64, requires_grad=True), random_ids(4, 6)
    weights = torch.randn(4, 6, dtype=torch.float64)
    ours = token_logprobs(logits, ids)
    theirs = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad((logprobs * weights).sum(), logits)[0] for logprobs in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda logits: token_logprobs(logits, ids), logits)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(u, monkeypatch):
    """Neither by the smallest nor by the largest uniform number: the first and the last token have probability 0."""
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.full(size, u, dtype=how["dtype"]))
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]]).repeat(3, 1)
    assert draw(logits).tolist() == [2 if u == 0 else 1] * 3


def test_a_drawn_id_is_in_the_vocabulary_even_if_probabilities_sum_to_less_than_1(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.zeros(size, dtype=how["dtype"]))
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    assert (logits.softmax(-1).double().sum(-1) < 1 - 1e-8).any()  # float32 probabilities are rounded
    assert (draw(logits) < 1000).all()


def test_tokens_less_probable_than_the_rounding_of_float32_are_drawn(monkeypatch):
    """100,000 tokens of probability 1e-8 after one of .999: uniform numbers 1e-8 apart draw different tokens.

    With cumulative sums in float32, whose spacing near 1 is 6e-8, five of six of these tokens could never be drawn.
    """
    uniform = 5e-4 + 1e-8 * torch.arange(20, dtype=torch.float64)[:, None]
    monkeypatch.setattr(torch, "rand", lambda *size, **how: uniform.to(how["dtype"]))
    logits = torch.full((20, 10**5 + 1), 1e-8).log()
    logits[:, 0] = math.log(0.999)
    assert len(draw(logits).unique()) > 15


def test_logits_are_computed_for_the_response_only():
    """The prompt is twice as long as the response: logits of all tokens would need three times the memory."""
    policy, ids = small_policy(), random_ids(20, 15)
    with LogitsMemory(30) as forward:
        policy(ids, 10)
    with LogitsMemory(30) as generation:
        policy.gpt2.generate(ids[:, :10], 5, 1.0, eos_id=-1)
    assert (forward.largest, generation.largest) == (20 * 5 * 30, 20 * 30)


def test_embedding_rows_without_a_token_have_no_logits_and_are_never_sampled(tmp_path, tokenizer):
    n = len(tokenizer)
    theirs = hf_gpt2(n + 12)
    with torch.no_grad():
        theirs.transformer.wte.weight[n:] *= 50  # so that they would have the largest logits
    deepcopy(theirs).float().save_pretrained(tmp_path)
    ours = load(tmp_path, n_tokens=n)
    ids = random_ids(4, 3, n)
    torch.testing.assert_close(ours(ids), theirs(ids).logits[..., :n], **CLOSE)
    sequences = ours.generate(ids, 40, 1.0, eos_id=-1, generator=random_generator("cpu", 0))
    assert sequences.max() < n
    expected = theirs(sequences).logits[:, 2:-1, :n].log_softmax(-1).gather(-1, sequences[:, 3:, None])[..., 0]
    torch.testing.assert_close(Policy(ours)(sequences, 3)[0], expected, **CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_softmax_of_logits_divided_by_the_temperature(temperature):
    """Chi-square test of 200,000 draws from 16 tokens: 44.3 is the 0.9999 quantile for 15 degrees of freedom."""
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
    """The probabilities that generate samples from are exp(logprob) of the policy, also at a temperature of 0.7."""
    probs, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda z, dim: probs.append(softmax(z, dim)) or probs[-1])
    policy = small_policy()
    sequences = policy.gpt2.generate(random_ids(3, 4), 10, 0.7, eos_id=-1, generator=random_generator("cpu", 0))
    expected = torch.stack(probs, dim=1).log().gather(-1, sequences[:, 4:, None])[..., 0]
    torch.testing.assert_close(policy(sequences, 4, 0.7)[0], expected, **CLOSE)


def test_decoding_and_the_value_head_use_the_device_of_the_weights():
    """With another default device: tensors on the meta device have no data."""
    gpt2, prompts, generator = small_gpt2(), random_ids(3, 4), torch.Generator()
    expected = gpt2.generate(prompts, 12, 1.0, 7, generator.manual_seed(0))
    with torch.device("meta"):
        assert torch.equal(gpt2.generate(prompts, 12, 1.0, 7, generator.manual_seed(0)), expected)
        assert all(parameter.device.type == "cpu" for parameter in Policy(gpt2).parameters())


def test_random_generators_draw_the_same_numbers_only_for_the_same_key():
    def draws(*key):
        return tuple(torch.rand(4, generator=random_generator("cpu", *key)).tolist())

    assert draws(1, 2) == draws(1, 2)
    assert len({draws(1, 2), draws(2, 1), draws(1, 3), draws(1), draws(1, 2, 1)}) == 5


# ---- log-probabilities, values, KL


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_logprob_is_computed_from_the_logits_of_the_position_before_its_token(temperature):
    policy, ids, P = small_policy(), random_ids(2, 9), 4
    logprobs, values = policy(ids, P, temperature)
    assert logprobs.shape == values.shape == (2, 5)
    expected = (policy.gpt2(ids) / temperature).log_softmax(-1)
    for row in range(2):
        for t in range(5):
            assert logprobs[row, t].item() == pytest.approx(expected[row, P - 1 + t, ids[row, P + t]].item(), abs=1e-9)


def test_a_value_is_read_from_the_hidden_state_before_its_token():
    policy, ids, P = small_policy(), random_ids(2, 9), 4
    expected = policy.value_head(policy.gpt2.trunk(ids))[..., 0]
    torch.testing.assert_close(policy(ids, P)[1], expected[:, P - 1 : -1], **CLOSE)


@pytest.mark.parametrize("t", range(5))
def test_changing_a_token_changes_its_logprob_and_only_later_values(t):
    policy, ids, P = small_policy(), random_ids(1, 9), 4
    changed = ids.clone()
    changed[0, P + t] = ids[0, P + t] % 29 + 1
    logprobs, values = ((a - b).abs()[0] for a, b in zip(policy(ids, P), policy(changed, P)))
    assert (logprobs[:t] == 0).all()
    assert (logprobs[t:] > 1e-6).all()
    assert (values[: t + 1] == 0).all()
    assert (values[t + 1 :] > 1e-6).all()


def test_values_are_zero_before_training(gpt2_folder):
    policy = load_policy(*open_gpt2(str(gpt2_folder)))
    assert (policy(random_ids(2, 9), 4)[1] == 0).all()


def test_exact_kl_is_the_sum_over_the_vocabulary_and_the_real_tokens():
    policy, reference, ids, P = small_policy(0), small_policy(1), random_ids(2, 7), 3
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


def test_exact_kl_computes_logits_one_row_at_a_time():
    policy, reference, ids, P = small_policy(0), small_policy(1), random_ids(8, 23), 3
    vocabulary = policy.gpt2.n_tokens
    with LogitsMemory(vocabulary) as memory:
        exact_kl(policy, reference, ids, torch.ones(8, 20).bool(), P)
    assert memory.largest == 20 * vocabulary
    assert memory.most <= 5 * memory.largest


def test_bf16_rounds_the_trunk_but_not_the_logits():
    """GPT-2's logits are near -100, where bf16 has steps of 0.5: rounded, they change log-probabilities by 0.1 nats."""
    exact = small_gpt2(n_embd=64)
    with torch.no_grad():  # one dimension of the hidden state adds -100 to every logit
        exact.wte.weight[:, 0] = -10
        exact.ln_f.weight[0] = 0
        exact.ln_f.bias[0] = 10
    policy, ids = Policy(deepcopy(exact).float()), random_ids(16, 20)
    policy.gpt2.dtype = torch.bfloat16
    logits, expected = policy.gpt2(ids), Policy(exact)(ids, 4)[0]
    assert -110 < exact(ids).mean() < -90
    assert logits.dtype == policy(ids, 4)[0].dtype == policy(ids, 4)[1].dtype == torch.float32
    rounded = token_logprobs(logits.bfloat16().float()[:, 3:-1], ids[:, 4:])
    assert 0 < (policy(ids, 4)[0] - expected).abs().mean() < 0.03
    assert (rounded - expected).abs().mean() > 0.05


@pytest.mark.parametrize("dtype, default", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_the_transformer_runs_in_its_dtype_whatever_the_default_dtype_of_autocast_is(dtype, default):
    """It is float16 on a GPU. The cache has the dtype of autocast, and the hidden states have that of the weights."""
    gpt2 = small_gpt2().float()
    gpt2.dtype, cache = dtype, KVCache(gpt2.config, 2, 5)
    with torch.autocast("cpu", default):
        hidden = gpt2.trunk(random_ids(2, 5), cache)
    assert (cache.buffer.dtype, hidden.dtype) == (dtype, torch.float32)


def test_the_lm_head_is_exact_in_bf16_for_logits_near_minus_100(monkeypatch):
    """Logits of -100 +- 3 rounded to bf16 would change log-probabilities by .17 nats per token, to fp16 by .02."""
    policy, ids = Policy(small_gpt2(vocab_size=500, n_embd=64)), random_ids(16, 20, 500)
    hidden = torch.randn(16, 19, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden[..., 0] = 10
    with torch.no_grad():
        policy.gpt2.wte.weight.mul_(1.25)[:, 0] = -10  # .3 * 1.25 * sqrt(64) = 3
    monkeypatch.setattr(GPT2, "trunk", lambda self, ids: hidden.to(self.wte.weight.dtype))
    logits, expected = policy.gpt2.logits(hidden), policy(ids, 4)[0]
    assert -101 < logits.mean() < -99 and 2.5 < logits.std() < 3.5
    policy.float().gpt2.dtype = torch.bfloat16
    assert (policy(ids, 4)[0] - expected).abs().mean() < 1e-3


# ---- reading model folders


def prefixed(state):
    return state


def bare(state):
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def with_lm_head(state):
    return state | {"lm_head.weight": state["transformer.wte.weight"].clone()}


def with_masks(state):
    """The format of `gpt2` on the hub. A filter for names that end with `attn.bias` would drop c_attn.bias too."""
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
    """Return a writer of two shards and their index."""

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
@pytest.mark.parametrize("names", [prefixed, bare, with_lm_head, with_masks])
def test_all_formats_of_names_and_files_give_the_same_weights(tmp_path, hf, state, names, writer):
    hf.config.save_pretrained(tmp_path)
    writer(names(state), tmp_path)
    expected = bare(state)
    loaded = load_gpt2(tmp_path, read_config(tmp_path)).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name].t() if name.endswith(TRANSPOSED) else expected[name]), name
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.float32


def test_shards_written_by_transformers_are_read(tmp_path, hf, ids):
    deepcopy(hf).float().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(load(tmp_path)(ids), hf(ids).logits, **CLOSE)


def test_half_precision_weights_are_loaded_as_float32(tmp_path, hf, state):
    write(tmp_path, {name: tensor.bfloat16() for name, tensor in state.items()}, hf.config)
    gpt2 = load_gpt2(tmp_path, read_config(tmp_path))
    assert {p.dtype for p in gpt2.parameters()} == {torch.float32}
    assert torch.equal(gpt2.wte.weight, state["transformer.wte.weight"].bfloat16().float())


def test_loaded_weights_require_gradients_and_are_on_the_cpu(gpt2_folder):
    parameters = list(load_gpt2(gpt2_folder, read_config(gpt2_folder)).parameters())
    assert all(p.requires_grad and p.device.type == "cpu" for p in parameters)


def missing(state):
    del state["transformer.h.1.mlp.c_fc.bias"]


def extra(state):
    state["transformer.h.2.ln_1.weight"] = torch.ones(64)


def mis_shaped(state):
    state["transformer.wpe.weight"] = torch.zeros(32, 64)


def no_conv1d(state):
    """The layout of nn.Linear instead of that of transformers' Conv1D."""
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
def test_weights_that_do_not_fit_are_refused_with_their_names(tmp_path, hf, state, damage, message):
    """transformers only warns, and initializes missing weights randomly."""
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
def test_a_config_with_unsupported_options_is_refused(tmp_path, hf, name, value):
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
    with pytest.raises(BadInput, match="tokenizer cannot be read"):
        load_tokenizer(tmp_path, GPT2Config())
    incomplete = deepcopy(tokenizer)
    incomplete.eos_token = None
    incomplete.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="no end-of-text token"):
        load_tokenizer(tmp_path, GPT2Config())


def test_loading_draws_no_random_number(gpt2_folder):
    """Weights are not initialized before they are loaded, which would take half a minute for GPT-2 XL."""
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
    """Reading the whole state dict and copying it would take twice the memory."""
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


# ---- writing model folders


@pytest.fixture(scope="module")
def exported(tmp_path_factory, gpt2_folder, tokenizer):
    """gpt2_folder, loaded and saved again by us, with a value head."""
    folder = tmp_path_factory.mktemp("exported")
    policy = load_policy(*open_gpt2(str(gpt2_folder)))
    with torch.no_grad():
        policy.value_head.weight.copy_(torch.arange(64.0))
        policy.value_head.bias.fill_(-3)
    save_gpt2(policy.gpt2, tokenizer, folder, policy.value_head.state_dict())
    return folder


def test_loading_and_saving_a_folder_keeps_every_tensor(gpt2_folder, exported):
    """The names are those that transformers writes: no lm_head.weight and no value head."""
    before, after = dict(read_tensors(gpt2_folder)), dict(read_tensors(exported))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with safe_open(exported / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_transformers_loads_an_export_and_computes_the_same_logits(exported, hf, ids):
    from transformers import GPT2LMHeadModel

    theirs, info = GPT2LMHeadModel.from_pretrained(exported, output_loading_info=True)
    assert theirs.dtype == torch.float32
    assert not any(info.values()), info
    assert torch.equal(theirs.double().eval()(ids).logits, hf(ids).logits)


def test_greedy_decoding_of_an_export_by_transformers_equals_ours(exported, tokenizer):
    from transformers import GPT2LMHeadModel

    ours, ids = load(exported), random_ids(1, 4, len(tokenizer))
    theirs = GPT2LMHeadModel.from_pretrained(exported).double()
    generated = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    expected = ids
    while expected.shape[1] < 16 and expected[0, -1] != tokenizer.eos_token_id:
        expected = torch.cat([expected, ours(expected)[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == expected.tolist()


def test_a_transformers_pipeline_loads_an_export(exported):
    from transformers import pipeline

    generator = pipeline("text-generation", model=str(exported))
    text = generator("I loved this", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("I loved this")
    assert len(text) > len("I loved this")
    assert generator.model.config.activation_function == "gelu_new"
    assert generator.model.config.eos_token_id == generator.tokenizer.eos_token_id == 0


def test_the_config_of_an_export_is_read_back(tmp_path, tokenizer):
    config = GPT2Config(len(tokenizer), 20, 16, 1, 2, n_inner=24, layer_norm_epsilon=1e-6)
    save_gpt2(GPT2(config).init_weights(), tokenizer, tmp_path)
    assert read_config(tmp_path) == config
    assert not (tmp_path / VALUE_HEAD).exists()


def test_the_value_head_is_saved_in_its_own_file_and_read_back(exported):
    assert load_file(exported / VALUE_HEAD).keys() == {"weight", "bias"}
    head = load_policy(*open_gpt2(str(exported))).value_head
    assert torch.equal(head.weight, torch.arange(64.0)[None])
    assert head.bias.tolist() == [-3]
    assert head.weight.requires_grad


@pytest.fixture
def folder_with_head(tmp_path, gpt2_folder):
    """A copy of gpt2_folder, and the path of its value head."""
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
