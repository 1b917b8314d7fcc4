"""Where a run computes, in how many rows at a time, with how many other processes, and from which random numbers."""

import ctypes
import os
import shutil
import sys
import time
import warnings
from contextlib import nullcontext

import numpy as np
import torch

from config import BadInput

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def pick_device(cfg):
    """(torch.device, bf16): where to compute, and whether the trunk runs in bf16; BadInput for what is not there.

    fp32 products stay in fp32: TF32 is turned off, also where an environment variable turned it on. Where `auto` picks
    the CPU although there is an NVIDIA GPU, a warning on stderr says why.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about a GPU that it cannot use: unused_gpu has the reason
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(device for device in there if there[device]) if cfg.device == "auto" else cfg.device
    if not there[name]:
        found = ", ".join(device for device in there if there[device])
        reason = unused_gpu() if name == "cuda" else ""
        end = f" ({reason})" if reason else ""
        raise BadInput(f"device is {name}, and torch {torch.__version__} finds only: {found}{end}")
    if cfg.device == "auto" and name == "cpu" and (reason := unused_gpu()):
        warn(f"this machine has an NVIDIA GPU, but the CPU is used: {reason}")
    can_bf16 = name == "cpu" or name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if cfg.dtype == "bf16" and not can_bf16:
        raise BadInput(f"dtype is bf16, and this {name} device does not compute in it: use --dtype fp32, or auto")
    if name == "cpu":
        keep_freed_memory()
        # MKL looks at the processor in the first exp or log of a process. Where several threads make it at once, some
        # get approximations that are off by 1e-4, this once (in 1 of 500 processes); one number is one thread's
        torch.zeros(1).exp()
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives each process of a machine its own
    return torch.device(name), cfg.dtype == "bf16" or cfg.dtype == "auto" and name.startswith("cuda") and can_bf16


def unused_gpu():
    """Why torch, which finds no CUDA, cannot use the NVIDIA GPU of this machine, as text; empty where there is none."""
    if not (shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia")):
        return ""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} was built without CUDA; pytorch.org/get-started/locally has other builds"
    try:
        torch.cuda.init()  # is_available only warns, and once a process; this raises the reason
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "torch finds no CUDA device"


def warn(message):
    """Print a warning on stderr; of several processes, only the first one does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def peak_flops(device, dtype=torch.float32, n=None, seconds=0.5):
    """FLOP/s of products of n x n matrices, by default of 2,048 on a CPU and 8,192 elsewhere.

    The products are queued one after the other and waited for once, at the end.
    """
    n = n or (2048 if device.type == "cpu" else 8192)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)

    def seconds_for(products):
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=product)
        product[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    seconds_for(1)  # the first product loads libraries
    products = max(1, round(seconds / seconds_for(1)))
    return 2 * n**3 * products / seconds_for(products)


def micro_batch_size(cfg, rows, tokens, gpt2, copies, device, ranks):
    """Rows of all processes in a forward and backward pass: cfg's, or where that is 0 what fits, a divisor of `rows`.

    See rows_that_fit, beside `copies` of the weights that are still to come: gradient, moments, reference. tokens: of a
    row.
    """
    if cfg.micro_batch_size:
        return cfg.micro_batch_size
    weights = sum(p.numel() for p in gpt2.parameters())
    fit = rows_that_fit(tokens, gpt2.config.n_embd, gpt2.config.n_layer, gpt2.n_tokens, device, copies * weights)
    sizes = [n for n in range(ranks.size, rows + 1, ranks.size) if rows % n == 0]
    size = max([n for n in sizes if n <= fit * ranks.size], default=ranks.size)
    return rows - ranks.any(rows - size)  # what the process with the least memory can do


def rows_that_fit(tokens, width, layers, vocabulary, device, reserved=0):
    """Rows of so many tokens in a forward and backward pass of a language model; 0 where not even one fits.

    On CUDA what the free memory holds, less `reserved` numbers. Elsewhere 2,048 tokens: more are no faster.
    """
    if device.type != "cuda":
        return 2048 // tokens
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, free for tensors
    numbers = 16 * width * layers + 2 * vocabulary  # kept for a token's backward pass
    return int(0.8 * (torch.cuda.mem_get_info(device)[0] + cached) - 4 * reserved) // (4 * tokens * numbers)


def to_device(tensor, device):
    """A tensor on the device: on CUDA by way of pinned memory, so that the host need not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def keep_freed_memory():
    """Let glibc keep what tensors free for the tensors to come: a PPO step on a CPU then takes a quarter less time.

    Else large blocks go back to the system, and the next ones come back a page fault every 4 kB: written at 3 GB/s
    instead of 20.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # not in musl
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # as unsigned: never


class OneProcess:
    """A run of one process: all rows are its own. distributed.Processes does the same with several."""

    rank, size = 0, 1

    def share(self, rows):
        """The rows of this process: an equal part, in order."""
        return rows

    def gather(self, part):
        """The parts (n, ...) of all processes as one, (size * n, ...), in the order of their ranks."""
        return part

    def mean(self, metrics):
        """Metrics (floats by name) of all processes as one: means, and of a maximum the largest."""
        return metrics

    def any(self, flag):
        """The largest of the numbers (>= 0) of all processes: 0 only where it is 0 in every one."""
        return flag

    def learner(self, model):
        """The model to call where gradients are wanted: each process then has their mean over all processes."""
        return model

    def spread(self, policy, ref_policy, reward_fn, judge):
        """(learner, policy, ref_policy, reward_fn, judge): all but the first, for a rollout, share the rows."""
        return policy, policy, ref_policy, reward_fn, judge

    def accumulate(self, learner, last):
        """A context for a backward pass: only the `last` one before an optimizer step needs the other processes."""
        return nullcontext()


ONE_PROCESS = OneProcess()


def join(device, cfg, sizes):
    """The processes of this run: those that torchrun started, or this one alone.

    sizes: names of cfg's fields that say how many rows all processes have together; BadInput if they cannot share them.
    """
    if "WORLD_SIZE" not in os.environ:
        return ONE_PROCESS
    from distributed import Processes

    processes = Processes(device)
    for name in sizes.split():
        if getattr(cfg, name) % processes.size:
            raise BadInput(f"{name} {getattr(cfg, name)} cannot be shared evenly by {processes.size} processes")
    return processes


def seed_of(*key):
    """A seed for each key of integers, such as (seed, step): what a run draws depends on nothing else."""
    key = (len(key), *key)  # numpy takes (1,) and (1, 0) for the same seed
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def random_generator(device, *key):
    """A generator for each key of integers."""
    return torch.Generator(device).manual_seed(seed_of(*key))
