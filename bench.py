"""Where the time of a PPO step goes: seconds and FLOPs of each phase, beside the machine's own peak.

    python bench.py                  # GPT-2 124M and BERT-base: 32 episodes of 8 + 24 tokens, 16 optimizer steps
    python bench.py --preset mini    # the models of preset mini: 128 episodes of 6 + 24 tokens, 4 optimizer steps
    python bench.py --growth True    # how the time grows with batch size, response length and model size
    python bench.py --json True      # for machines

What is timed is ppo.rollout and ppo.update as main calls them. FLOPs are counted in calls of their own
(torch.utils.flop_counter). The peak is that of a large matrix product, measured between the steps: machines differ, and
so does one machine from minute to minute. Logits and rewards are in fp32 also where the trunk is in bf16: the peak is
that of the faster of the two, so no phase can exceed it.
"""

import copy
import json
import statistics
import time
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from config import PRESETS, BenchConfig, PPOConfig, run
from data import load_splits, prompt_batch, prompt_pool
from device import peak_flops, pick_device, random_generator
from hub import load_policy, open_gpt2
from log import peak_memory, sheet
from model import GPT2, GPT2Config, Policy
from optimizer import Stepper
from ppo import compile_passes, rollout, update
from reward import SentimentReward

MINI = PRESETS["mini"][PPOConfig]
WORKS = {  # preset: the PPO that is timed; its prompts have one length, so that every step has the same tokens
    "gpt2": PPOConfig(
        batch_size=32, minibatch_size=8, micro_batch_size=8, min_prompt_len=8, max_prompt_len=8, response_len=24
    ),
    "mini": PPOConfig(**MINI | dict(micro_batch_size=32, min_prompt_len=6, max_prompt_len=6, response_len=24)),
}
MINIBATCHES = ("minibatch_size", "micro_batch_size")
SIZES = {"gpt2": GPT2Config(), "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16)}
GROWTH = {  # what grows: (model, what else differs from its work in WORKS, to be done in minutes; values)
    "batch_size": ("mini", {"ppo_epochs": 1}, (32, 64, 128, 256, 512)),
    "response_len": ("mini", {"ppo_epochs": 1}, (6, 12, 24, 48, 96)),
    "model": ("gpt2", {"batch_size": 8, "ppo_epochs": 1}, ("mini", "gpt2", "gpt2-medium")),
}


class Folded:
    """The small tokenizer of preset mini for a model with more ids, which it takes modulo its size: texts to score.

    No id ends a response, so that every step costs the same.
    """

    eos_token_id = -1

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def batch_decode(self, sequences, **how):
        return self.tokenizer.batch_decode(sequences % len(self.tokenizer), **how)


def load(name, device, bf16):
    """(policy, tokenizer, reward_fn): those of preset mini, or random weights of the published sizes in SIZES."""
    opened = open_gpt2(MINI["policy"])
    reward_fn = SentimentReward.load(MINI["reward"], device=device)
    if name == "mini":
        return load_policy(*opened, bf16).to(device), opened[2], reward_fn
    from transformers import BertConfig, BertForSequenceClassification

    bert = BertForSequenceClassification(BertConfig(num_labels=2))  # the cost does not depend on the weights
    policy = Policy(GPT2(SIZES[name], bf16=bf16).init_weights()).to(device)
    return policy, opened[2], SentimentReward(bert, reward_fn.tokenizer, positive=1, device=device)


def flops(function, *args):
    """FLOPs of the matrix products in a call. What is compiled runs eagerly in it, as in any dispatch mode of torch."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def measure(ppo, model, texts, cfg):
    """{phase: {"seconds": [one a step], "flops": n}} of steps of a PPOConfig, and facts about the machine, by name.

    The facts: "device", "dtypes" of the products, "peak_flops" (FLOP/s, one a step), "peak_memory_gb". model: a name
    that load knows. texts: what the prompts begin.
    """
    device, bf16 = pick_device(cfg)
    ppo, dtypes = replace(ppo, compile=cfg.compile), [torch.float32] + [torch.bfloat16] * bf16
    policy, tokenizer, reward_fn = load(model, device, bf16)
    ref_policy = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), ppo.lr, eps=ppo.adam_eps, fused=device.type != "mps")
    stepper = Stepper(policy, [optimizer], ppo.grad_clip)
    pool = prompt_pool(texts, tokenizer, ppo.max_prompt_len)
    if cfg.compile:
        compile_passes(policy, ref_policy)
    steps, peaks, memory = [], [], 0.0
    for step in range(cfg.repeats + 1):
        prompts = prompt_batch(pool, step, ppo).to(device)
        generator = random_generator(device, ppo.seed, step)
        batch = rollout(policy, ref_policy, Folded(tokenizer), reward_fn, prompts, ppo.kl_coef, ppo, generator)
        start = time.time()
        update(policy, stepper, batch, ppo, random_generator("cpu", ppo.seed, step))
        steps.append(batch.seconds | {"update": time.time() - start})
        memory = memory or peak_memory(device)  # of the first step, before the matrices of peak_flops
        peaks.append(max(peak_flops(device, dtype) for dtype in dtypes))

    def evaluate(policy):
        with torch.no_grad():
            for part in batch.sequences.split(ppo.micro_batch_size):
                policy(part, batch.prompt_len)

    counted = {
        "generate": flops(policy.gpt2.generate, prompts, ppo.response_len, ppo.temperature, -1, generator),
        "score": flops(reward_fn, batch.texts),
        "logprobs": flops(evaluate, policy),
        "reference": flops(evaluate, ref_policy),
        "update": flops(update, policy, stepper, batch, ppo),
    }
    phases = {name: {"seconds": [s[name] for s in steps[1:]], "flops": n} for name, n in counted.items()}
    totals = [sum(step.values()) for step in steps[1:]]
    phases["step"] = {"seconds": totals, "flops": sum(counted.values())}
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return phases, dict(device=str(device), dtypes=names, peak_flops=peaks[1:], peak_memory_gb=memory)


def growth(texts, cfg):
    """Print how the time of a step grows beside its FLOPs, one axis after the other: linear is a constant speed."""
    for axis, (model, changes, values) in GROWTH.items():
        rows = {"": f"{'ms':>10} {'TFLOP':>8} {'of the peak':>12} {'ms a TFLOP':>12}"}
        for value in values:
            size, sizes = (value, changes) if axis == "model" else (model, changes | {axis: value})
            batch_size = sizes.get("batch_size", WORKS[model].batch_size)
            smaller = {name: min(getattr(WORKS[model], name), batch_size) for name in MINIBATCHES}
            ppo = replace(WORKS[model], **sizes | smaller)
            phases, machine = measure(ppo, size, texts, cfg)
            seconds, n = statistics.median(phases["step"]["seconds"]), phases["step"]["flops"]
            share = n / seconds / statistics.median(machine["peak_flops"])
            rows[str(value)] = f"{seconds * 1e3:10.1f} {n / 1e12:8.3f} {share:12.2f} {seconds / n * 1e15:12.1f}"
        print(sheet(f"a PPO step against {axis}", rows), flush=True)


def main(cfg):
    texts = load_splits("movie-reviews")["prompts"].texts[:2000]
    if cfg.growth:
        growth(texts, cfg)
        return
    ppo = WORKS[cfg.preset]
    table, machine = measure(ppo, cfg.preset, texts, cfg)
    peaks, device, threads = machine["peak_flops"], machine["device"], torch.get_num_threads()
    peak, tokens = statistics.median(peaks), ppo.batch_size * ppo.response_len
    if cfg.json:
        print(json.dumps(dict(preset=cfg.preset, phases=table, threads=threads) | machine))
        return
    rows = {"": f"{'ms':>10} {'min':>10} {'max':>10} {'TFLOP':>8} {'of the peak':>12}"}
    for name, phase in table.items():
        seconds = statistics.median(phase["seconds"])
        spread = " ".join(f"{1e3 * x:10.1f}" for x in (seconds, min(phase["seconds"]), max(phase["seconds"])))
        rows[name] = f"{spread} {phase['flops'] / 1e12:8.3f} {phase['flops'] / seconds / peak:12.2f}"
    rows["generation"] = f"{tokens / statistics.median(table['generate']['seconds']):.0f} tokens/s"
    spread = f"{min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f}"
    rows["peak"] = f"{peak / 1e9:.0f} GFLOP/s, {spread}, a large product in {' or '.join(machine['dtypes'])}"
    rows["memory"] = f"{machine['peak_memory_gb']:.2f} GB at most"
    print(sheet(f"a PPO step, {cfg.preset}, {cfg.repeats} of them, {device}, {threads} threads", rows))


if __name__ == "__main__":
    run(main, BenchConfig)
