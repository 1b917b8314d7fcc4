"""Several processes as one run, by torch's DistributedDataParallel; one process never imports this file.

    torchrun --nproc_per_node 8 ppo.py              # one machine; finetune_gpt2.py likewise
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 ppo.py    # on both machines

Each process answers, scores and learns from an equal share of the episodes. What they find out is gathered before
anything is decided or averaged: advantages, KL coefficient and alarms are those of one process with all episodes.
"""

import atexit
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import first_line
from config import BadInput
from device import OneProcess
from reward import scored


class Processes(OneProcess):
    """The processes that torchrun started: NCCL on CUDA, Gloo elsewhere. Only rank 0 prints, logs and saves."""

    def __init__(self, device):
        if device.type == "mps":
            raise BadInput("several processes compute on cuda or cpu, not on mps: use --device cpu")
        if device.type == "cuda":
            if device.index >= torch.cuda.device_count():
                raise BadInput(f"there are {torch.cuda.device_count()} GPUs here, too few for process {device.index}")
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        self.device, self.rank, self.size = device, dist.get_rank(), dist.get_world_size()
        if self.rank:
            sys.stdout = open(os.devnull, "w")

    def share(self, rows):
        n, rest = divmod(len(rows), self.size)
        assert rest == 0, f"{len(rows)} rows for {self.size} processes"
        return rows[self.rank * n : (self.rank + 1) * n]

    def gather(self, part):
        parts = [torch.empty_like(part) for _ in range(self.size)]
        try:
            dist.all_gather(parts, part.detach().contiguous())
        except RuntimeError as error:  # Gloo's; NCCL waits until torchrun ends this process too
            raise BadInput(f"another process ended, see what it said: {first_line(error)}") from None
        return torch.cat(parts)

    def mean(self, metrics):
        values = self.gather(torch.tensor([list(metrics.values())], dtype=torch.float64, device=self.device))
        both = zip(metrics, values.mean(0).tolist(), values.amax(0).tolist())
        return {name: largest if "max_" in name else mean for name, mean, largest in both}

    def any(self, flag):
        return int(self.gather(torch.tensor([flag], device=self.device)).max())

    def learner(self, model):
        return DistributedDataParallel(model)

    def spread(self, policy, ref_policy, reward_fn, judge):
        shared = (SharedPolicy(model, self.by_shares) for model in (policy, ref_policy))
        rewards = (some and SharedReward(some, self.by_shares, self.device) for some in (reward_fn, judge))
        return self.learner(policy), *shared, *rewards

    def by_shares(self, function):
        """function(rows, ...) -> tensors by row: each process calls it for its share of rows and gets those of all."""

        def call(rows, *args):
            found = function(self.share(rows), *args)
            return tuple(map(self.gather, found)) if isinstance(found, tuple) else self.gather(found)

        return call

    def accumulate(self, learner, last):
        return nullcontext() if last else learner.no_sync()


class SharedPolicy:
    """A policy as ppo.rollout calls it, generate and forward, each process doing its share of the rows."""

    def __init__(self, policy, by_shares):
        self.evaluate = by_shares(lambda part, *args: policy(part.clone(), *args))  # no view, as in ppo.rollout
        self.gpt2 = SimpleNamespace(generate=by_shares(policy.gpt2.generate))

    def __call__(self, *args):
        return self.evaluate(*args)


class SharedReward:
    """A reward or a judge as reward.scored calls it, each process scoring its share of the texts."""

    def __init__(self, reward_fn, by_shares, device):
        def columns(texts):
            scores, positive = scored(reward_fn, texts)
            self.is_classifier = positive is not None
            return torch.stack([scores, positive] if self.is_classifier else [scores], dim=1).to(device)  # (B, 2 or 1)

        self.columns = by_shares(columns)

    def scored(self, texts):
        scores, *positive = self.columns(texts).cpu().unbind(1)
        return scores, positive[0] if self.is_classifier else None
