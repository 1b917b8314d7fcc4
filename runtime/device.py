"""The device of a run, the rows that fit into its memory, and random numbers that depend on a key alone."""

import ctypes
import gc
import os
import platform
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from runtime.errors import BadInput, first_line

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by dtype and save_dtype of config.py
# CUDA 13.0 has kernels for the RTX series 20 to 50; pip would keep an installed torch of the same version
INSTALL_CUDA = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"


def pick_device(cfg):
    """Return (torch.device, torch.dtype): where to compute, and the autocast dtype of the transformers.

    Raises BadInput if device or dtype is not available. If `auto` picks the CPU of a machine with an NVIDIA GPU, warn
    and say why. On CUDA with bf16, the products that stay in fp32 are computed in TF32, which rounds to 10 bits: little
    next to the branches of the transformer, rounded to 7. Otherwise TF32 is turned off, also if an environment
    variable turned it on.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's warning about a GPU that it cannot use: unused_gpu has the reason
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    devices = [device for device in available if available[device]]
    # starting the small kernels of preset mini on Apple's GPU should take longer than computing them on the CPU; not
    # measured
    automatic = [device for device in devices if not (device == "mps" and cfg.preset == "mini")]
    name = automatic[0] if cfg.device == "auto" else cfg.device
    expected = cfg.device == "cuda" or cfg.device == "auto" and name == "cpu"
    reason = unused_gpu() if expected and "cuda" not in devices else ""
    if name not in devices:
        end = f" ({reason})" if reason else ""
        raise BadInput(f"device is {name}, but torch {torch.__version__} finds only: {', '.join(devices)}{end}")
    if reason:
        warn(f"this machine has an NVIDIA GPU, but the CPU is used: {reason}")
    dtypes = {"cpu": ["fp32", "bf16", "fp16"], "mps": ["fp32"], "cuda": ["fp16", "fp32"]}[name]  # the best first
    if name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes.insert(0, "bf16")
    dtype = dtypes[0] if cfg.dtype == "auto" else cfg.dtype
    if dtype not in dtypes:
        raise BadInput(f"dtype is {dtype}, which this {name} device does not support: use --dtype fp32 or auto")
    if name == "cpu":
        keep_freed_memory()
        use_avx512()
        # MKL detects the processor in the first exp or log of a process. If several threads do so at once, some results
        # of that call are off by 1e-4 (in 1 of 500 processes). A single number is computed by one thread.
        torch.zeros(1).exp()
    if name == "cuda":
        if dtype == "bf16":
            torch.set_float32_matmul_precision("high")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: a GPU for each process of a machine
    return torch.device(name), DTYPES[dtype]


def use_avx512():
    """On a CPU of AMD with AVX-512, let oneDNN compute the fp32 products of torch instead of MKL.

    MKL uses AVX-512 only on CPUs of Intel; with it, large products take half the time. The setting "medium" also allows
    oneDNN to round to bf16, as it does on CPUs with matrix units for bf16: it is reset if products are not precise.
    """
    if "AVX512" in torch.backends.cpu.get_cpu_capability() and "AuthenticAMD" in cpu_name():
        torch.set_float32_matmul_precision("medium")
        if not products_are_precise():
            torch.set_float32_matmul_precision("highest")


def cpu_name():
    """Return a text with the vendor of the CPU, or an empty text if the system does not say it."""
    if sys.platform == "linux":
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return platform.processor()


def products_are_precise():
    """Return whether an fp32 product is computed in fp32: its error is 1e-5, and 0.05 in bf16."""
    x = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    return (x @ x - x.double() @ x.double()).abs().max().item() < 1e-3


def unused_gpu():
    """Return why PyTorch cannot use the NVIDIA GPU of this machine, or an empty text if there is none."""
    if not (shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia")):
        return ""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} was built without CUDA; for an RTX card: {INSTALL_CUDA}"
    try:
        torch.cuda.init()  # raises the reason; is_available only warns, and only once per process
    except RuntimeError as error:
        return first_line(error)
    return "torch finds no CUDA device"


def warn(message):
    """Print a warning on stderr, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def peak_flops(device, dtype=torch.float32, n=None, seconds=0.5):
    """Return the FLOP/s of products of n x n matrices, by default with n = 2,048 on a CPU and 8,192 elsewhere.

    The products are queued one after the other; the time is measured once, at the end of all.
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


def micro_batch_size(cfg, rows, tokens, gpt2, copies, device, ranks, sets=1):
    """Return the micro-batch size, in rows of all processes: cfg's, or if that is 0 the largest that fits.

    It is a divisor of `rows`. tokens: per row. copies: number of copies of the weights that are not allocated yet, such
    as gradients, moments and reference. sets: of activations; the graphs of an update keep one.
    """
    if cfg.micro_batch_size:
        return cfg.micro_batch_size
    weights = sum(p.numel() for p in gpt2.parameters())
    vocabulary = gpt2.n_tokens * (2 if getattr(cfg, "teacher", "") else 1)  # a teacher's targets are as large as logits
    gc.collect()  # an earlier run in this process may hold memory in cycles of objects
    fit = rows_that_fit(tokens, gpt2.config.n_embd, gpt2.config.n_layer, vocabulary, device, copies * weights, sets)
    sizes = [n for n in range(ranks.size, rows + 1, ranks.size) if rows % n == 0]
    size = max([n for n in sizes if n <= fit * ranks.size], default=ranks.size)
    return rows - ranks.any(rows - size)  # the smallest of all processes


def rows_that_fit(tokens, width, layers, vocabulary, device, reserved=0, sets=1):
    """Return how many rows of `tokens` tokens fit into memory in a training pass of a language model; 0 if none does.

    On CUDA: the free memory minus `reserved` float32 numbers, for `sets` of activations. Elsewhere: 2,048 tokens in
    total, more are not faster.
    """
    if device.type != "cuda":
        return 2048 // tokens
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, free for tensors
    numbers = numbers_per_token(width, layers, vocabulary)
    return int(0.8 * (torch.cuda.mem_get_info(device)[0] + cached) - 4 * reserved) // (4 * tokens * numbers * sets)


def numbers_per_token(width, layers, vocabulary):
    """Return how many float32 numbers per token a training pass of a language model keeps for the backward pass."""
    return 16 * width * layers + 2 * vocabulary


def free_memory(device):
    """Return the bytes of the device's memory that are free; None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and (info := Path("/proc/meminfo")).is_file():  # on Linux
        lines = info.read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    return None


def to_device(tensor, device):
    """Copy a tensor to the device; on CUDA through pinned memory, so that the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def true_places(mask, device):
    """Return the indices (rows, columns), on the device, of the True elements of a mask in the host's memory.

    x[true_places(mask, device)] is x[mask], but the host does not wait until the GPU has counted the elements.
    """
    return to_device(mask.nonzero(), device).unbind(1)


def release_memory(device):
    """Free what PyTorch caches on MPS, which grows with every new shape of a batch. Call it after each step."""
    if device.type == "mps":
        torch.mps.empty_cache()
        if hasattr(torch.mps, "clear_graph_cache"):  # compiled graphs; torch 2.13 does not have it
            torch.mps.clear_graph_cache()


def keep_freed_memory():
    """Let glibc reuse the memory of freed tensors: a PPO step on a CPU then takes a quarter less time.

    By default large blocks are returned to the system, and new ones cost a page fault per 4 kB.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # not in musl
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # as unsigned: never


def seed_of(*key):
    """Return a seed for a key of integers, such as (seed, step): random numbers depend on nothing else."""
    key = (len(key), *key)  # numpy takes (1,) and (1, 0) for the same seed
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def random_generator(device, *key):
    """Return a torch.Generator for a key of integers."""
    return torch.Generator(device).manual_seed(seed_of(*key))
