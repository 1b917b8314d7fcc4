"""What is measured during a run of ppo.py or dpo.py: metrics of a rollout, samples, alarms, the best policy so far."""

import ctypes
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data import decode
from model import exact_kl
from runtime.checkpoint import BEST, BestWeights, delete_checkpoints
from runtime.cli import evaluation
from runtime.device import random_generator, to_device, true_places
from runtime.hub import load_policy, open_gpt2, save_gpt2

try:
    import resource
except ImportError:  # on Windows
    resource = None


@dataclass(frozen=True)
class Rollout:
    """B episodes: the data of an update, and what is logged. (B, T) each unless noted otherwise."""

    sequences: torch.Tensor  # (B, P + T)
    prompt_len: int  # P
    mask: torch.Tensor  # True on real tokens; in the host's memory, the other tensors are on the device
    logprobs: torch.Tensor  # nats, of the policy that sampled
    values: torch.Tensor  # of the value head
    potentials: torch.Tensor  # the part of the value that reward.scores_so_far gives
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor  # without the potentials: what the value head learns, in units of the rewards
    kl: torch.Tensor  # k1, nats per token
    scores: torch.Tensor  # (B,), as given by the reward
    objective: torch.Tensor  # (B,), what PPO maximizes: the score, clipped and penalized, minus kl_coef times the KL
    positive_by_reward: torch.Tensor | None  # (B,), 1 if the classifier finds the text positive; None for a function
    positive_by_judge: torch.Tensor | None  # (B,), None without a judge
    ended: torch.Tensor  # (B,), True if the response has <|endoftext|>
    texts: list  # B prompts with their responses
    seconds: dict  # of each phase


class Stopwatch:
    """Measure the phases of a rollout. seconds: {name: time since the previous lap}."""

    def __init__(self):
        self.seconds, self.last = {}, time.time()

    def lap(self, name):
        now = time.time()
        self.seconds[name], self.last = now - self.last, now


@torch.no_grad()
def rollout_metrics(batch, policy, ref_policy, truncated_frac, cfg):
    """Return the metrics of a Rollout as floats; docs/troubleshooting.md says which values are healthy.

    kl is the KL of the penalty (k1, summed over a response, mean over responses), kl_stderr its standard error.
    kl_k3 is never negative; kl_exact sums over the vocabulary at each token, for 8 episodes. perplexity is that of the
    responses under the reference, as in analysis/metrics.py, but at cfg.temperature.
    """
    device, few = batch.kl.device, slice(8)
    mask, real = to_device(batch.mask, device), true_places(batch.mask, device)
    kl = batch.kl.where(mask, 0)  # (B, T)
    exact = exact_kl(policy, ref_policy, batch.sequences[few], mask[few], batch.prompt_len, cfg.temperature)
    response_kl, returns = kl.sum(1), batch.returns[real]
    metrics = {
        "score": batch.scores.mean(),
        "score_std": batch.scores.std(unbiased=False),
        "objective": batch.objective.mean(),
        "kl": response_kl.mean(),
        "kl_stderr": response_kl.std(unbiased=False) / len(response_kl) ** 0.5,
        "kl_k3": ((-kl).exp() - 1 + kl).sum(1).mean(),
        "kl_exact": exact.mean(),
        "entropy": -batch.logprobs[real].mean(),  # nats per token, of the policy's own samples: unbiased
        "perplexity": (kl - batch.logprobs)[real].mean().exp(),  # kl is the log-ratio to the reference
        "explained_variance": 1
        - (returns - batch.values[real]).var(unbiased=False)
        / ((returns + batch.potentials[real]).var(unbiased=False) + 1e-8),
        "response_length": mask.sum(1).float().mean(),
        "eos_frac": batch.ended.float().mean(),
        "truncated_frac": truncated_frac,
    }
    shares = {"positive_by_reward": batch.positive_by_reward, "positive_by_judge": batch.positive_by_judge}
    metrics |= {name: positive.mean() for name, positive in shares.items() if positive is not None}
    return to_floats(metrics) | {f"seconds_{k}": v for k, v in batch.seconds.items()} | {
        "tokens_per_second": int(batch.mask.sum()) / batch.seconds["generate"],
        "peak_memory_gb": peak_memory(device),
    }  # fmt: skip


def to_floats(metrics):
    """Return metrics, tensors of one number or floats by name, as floats; the tensors leave the GPU in one copy."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, torch.Tensor)}
    return metrics | dict(zip(tensors, torch.stack(list(tensors.values())).tolist()))


def average(parts, shares=None):
    """Average dicts of metrics with the same names, but take the largest of those named max_...

    shares: of each dict, equal ones without them.
    """
    shares = shares or [1 / len(parts)] * len(parts)
    return {
        name: torch.stack([part[name] for part in parts]).max()
        if name.startswith("max_")
        else sum(part[name] * share for part, share in zip(parts, shares))
        for name in parts[0]
    }


def peak_memory(device):
    """Return the peak memory of this process in GB: allocated on the GPU on CUDA, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        counters = (ctypes.c_size_t * 9)()  # PROCESS_MEMORY_COUNTERS: two fields of 32 bits, then numbers of bytes
        this_process = ctypes.c_void_p(-1)
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(this_process, counters, ctypes.sizeof(counters))
        return counters[1] / 1e9  # PeakWorkingSetSize
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def sample(policy, tokenizer, reward_fn, pool, step, cfg):
    """Generate responses to the first prompts of the pool (M, P), every cfg.sample_every steps and in the last one.

    Returns a list of dicts for samples.jsonl, or None in other steps. The random numbers are the same in each call.
    Raises BadInput if the reward of a user fails.
    """
    if step % cfg.sample_every and step < cfg.steps - 1:
        return None
    if not cfg.sample_prompts:
        return []
    device = policy.gpt2.wte.weight.device
    prompts, generator = torch.from_numpy(pool[: cfg.sample_prompts]).to(device), random_generator(device, cfg.seed)
    sequences = policy.gpt2.generate(prompts, cfg.response_len, cfg.temperature, tokenizer.eos_token_id, generator)
    texts = decode(sequences, tokenizer)
    scores = [round(score, 4) if math.isfinite(score) else None for score in reward_fn(texts).tolist()]
    rows = zip(decode(prompts, tokenizer), texts, scores)
    return [{"prompt": prompt, "response": text[len(prompt) :], "score": score} for prompt, text, score in rows]


class Alarms:
    """Alarms of a run: the KL or the perplexity is above its ceiling, or the judge falls as the score rises.

    The last is overoptimization (Gao et al. 2022, arXiv:2210.10760): the policy exploits the reward model. The last
    cfg.alarm_window rollouts are compared, the second half with the first; a change counts if it exceeds twice its
    standard error. history: [score, share positive by the judge] of each of them.

    A policy can mislead the judge too, because it is a classifier like the reward. The perplexity under the reference
    does not depend on classifiers. Its ceiling is relative to first_perplexity, that of the first rollout, in which the
    policy is the reference. A change over a window is no sign: it also rises at the start of runs that go well.
    """

    saved = ("history", "first_perplexity")

    def __init__(self, cfg):
        self.kl_ceiling, self.perplexity_ceiling = cfg.kl_ceiling, cfg.perplexity_ceiling
        self.window, self.on_alarm = cfg.alarm_window // 2 * 2, cfg.on_alarm
        self.history, self.first_perplexity, self.above, self.stopped = [], None, set(), False

    def stop(self, step, metrics, log, ranks):
        """Print an alarm if there is one after this rollout; return whether the run must stop."""
        alarm = self.check(metrics)
        if alarm:
            log.print(f"alarm at step {step}: {alarm}")
        self.stopped = self.on_alarm == "stop" and bool(ranks.any(bool(alarm)))
        return self.stopped

    def check(self, metrics):
        """Return the alarms for the metrics of the next rollout as text, or an empty text."""
        return ". ".join(filter(None, (*self.check_ceilings(metrics), self.check_judge(metrics))))

    def check_ceilings(self, metrics):
        """Return the alarms of values that are above their ceilings, and were not in the rollout before."""
        if self.first_perplexity is None:
            self.first_perplexity = metrics["perplexity"]
        kl, perplexity, first = metrics["kl"], metrics["perplexity"], self.first_perplexity
        texts = {}
        if 0 < self.kl_ceiling < kl:
            texts["kl"] = (
                f"KL is {kl:.1f} nats per response, above kl_ceiling {self.kl_ceiling}: raise kl_coef or lower lr"
            )
        if 0 < self.perplexity_ceiling * first < perplexity:
            texts["perplexity"] = (
                f"perplexity under the reference is {perplexity:.1f}, above perplexity_ceiling "
                f"{self.perplexity_ceiling} times the {first:.1f} of the first rollout: the texts are less fluent: "
                "raise kl_coef, or stop here"
            )
        before, self.above = self.above, set(texts)
        return [text for name, text in texts.items() if name not in before]

    def check_judge(self, metrics):
        """Return the alarm that the judge falls as the score rises, or an empty text."""
        if not self.window or "positive_by_judge" not in metrics:
            return ""
        self.history.append([metrics["score"], metrics["positive_by_judge"]])
        del self.history[: -self.window]
        if len(self.history) == self.window:
            score, judge = (change(values) for values in zip(*self.history))
            if score > 2 and judge < -2:
                self.history.clear()  # once per window
                return (
                    f"in {self.window} rollouts the score rose and the share positive by the judge fell: the policy "
                    "exploits the reward model: raise kl_coef, or stop here"
                )
        return ""


def change(values):
    """Return the mean of the second half of the values minus that of the first half, in standard errors."""
    halves = torch.tensor(values, dtype=torch.float64).view(2, -1)
    stderr = (halves.var(1, correction=0).sum() / halves.shape[1]).sqrt()
    return float((halves[1].mean() - halves[0].mean()) / (stderr + 1e-12))


class BestPolicy(BestWeights):
    """The policy with the highest mean objective over a window of cfg.save_every rollouts, at first the initial policy.

    Windows are compared at the latest KL coefficient. best: means of the best; rollouts: [score, KL] of the current.
    """

    saved = ("best", "rollouts")

    def __init__(self, policy, tokenizer, cfg):
        super().__init__(policy)
        self.tokenizer, self.cfg, self.best, self.rollouts = tokenizer, cfg, None, []

    def update(self, metrics, kl_coef):
        """Call after each rollout and before its update, so that the policy is the one that sampled."""
        self.rollouts.append([metrics["objective"] + kl_coef * metrics["kl"], metrics["kl"]])  # (score, KL)
        complete, best = len(self.rollouts) == self.cfg.save_every, self.best
        if complete or not best:
            score, kl = (statistics.fmean(values) for values in zip(*self.rollouts))
            rollouts = len(self.rollouts)
            if not best or best["rollouts"] < rollouts or score - best["score"] > kl_coef * (kl - best["kl"]):
                self.best = {"score": score, "kl": kl, "rollouts": rollouts}
                self.keep()
        if complete:
            self.rollouts.clear()

    def save(self, weights):
        folder, parts = Path(self.cfg.out, BEST), {"gpt2": {}, "value_head": {}}
        for name, tensor in weights.items():
            part, _, name = name.partition(".")
            parts[part][name] = tensor
        folder.mkdir(exist_ok=True)
        save_gpt2(self.model.gpt2, self.tokenizer, folder, parts["value_head"], weights=parts["gpt2"])

    def finish(self, stopped):
        """Write the policy of a run that is over: the last one, or the best one if an alarm stopped the run."""
        self.write()
        policy, out = self.model, self.cfg.out
        if stopped:
            policy = load_policy(*open_gpt2(f"{out}/{BEST}"))
        save_gpt2(policy.gpt2, self.tokenizer, out, policy.value_head.state_dict())
        delete_checkpoints(out)
        print(f"the policy is in {out}: {evaluation(self.cfg)} evaluates it")
