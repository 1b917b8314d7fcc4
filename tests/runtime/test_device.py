"""The device of a run, its micro-batch size, and what makes a CPU fast and exact."""

import ctypes
import itertools
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, message
from torch.utils._python_dispatch import TorchDispatchMode

from config import FinetuneConfig, PPOConfig
from model import GPT2, GPT2Config
from runtime import device
from runtime.device import DTYPES, micro_batch_size, peak_flops, pick_device, rows_that_fit
from runtime.distributed import ONE_PROCESS
from runtime.errors import BadInput

# ---- the device


@pytest.fixture
def only_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_an_unavailable_device_is_refused(only_a_cpu, name):
    with pytest.raises(BadInput, match=f"device is {name}, .* finds only: cpu"):
        pick_device(FinetuneConfig(device=name))


CPU, GPU, MPS = torch.device("cpu"), torch.device("cuda:0"), torch.device("mps")


@pytest.mark.parametrize("name, dtype", [("auto", "float32"), *zip(DTYPES, ("float32", "bfloat16", "float16"))])
def test_a_cpu_computes_in_float32_by_default(only_a_cpu, name, dtype):
    assert pick_device(FinetuneConfig(dtype=name)) == (CPU, getattr(torch, dtype))


@pytest.mark.parametrize("native", [True, False])
def test_auto_picks_cuda_if_available_and_fp16_on_cards_without_bf16(only_a_cpu, monkeypatch, native):
    """A T4 emulates bf16, which is slow: it does not count."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert pick_device(FinetuneConfig()) == (GPU, torch.bfloat16 if native else torch.float16)
    assert pick_device(FinetuneConfig(dtype="fp32")) == (GPU, torch.float32)
    assert pick_device(FinetuneConfig(dtype="fp16")) == (GPU, torch.float16)
    if not native:
        assert "dtype is bf16, which this cuda device" in message(pick_device, FinetuneConfig(dtype="bf16"))


def test_mps_computes_in_float32(only_a_cpu, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device(FinetuneConfig()) == pick_device(FinetuneConfig(dtype="fp32")) == (MPS, torch.float32)
    for name in ("bf16", "fp16"):
        with pytest.raises(BadInput, match=f"dtype is {name}, .* mps device .*: use --dtype fp32"):
            pick_device(FinetuneConfig(dtype=name))


@pytest.mark.parametrize(
    "dtype, precision", [("auto", "high"), ("bf16", "high"), ("fp16", "highest"), ("fp32", "highest")]
)
def test_a_gpu_computes_fp32_products_in_tf32_only_next_to_bf16(only_a_cpu, monkeypatch, dtype, precision):
    """In TF32 a log-probability is off by up to .005 nats: too much for the self-check of fp32, and a lot in fp16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for before in ("highest", "high"):
        torch.set_float32_matmul_precision(before)
        pick_device(FinetuneConfig(dtype=dtype))
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "high")


# ---- a GPU that PyTorch cannot use

OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"


@pytest.fixture
def nvidia(only_a_cpu, monkeypatch):
    """A machine with an NVIDIA GPU: it has nvidia-smi."""
    monkeypatch.setattr("shutil.which", {"nvidia-smi": "/bin/nvidia-smi"}.get)


@pytest.fixture
def old_driver(nvidia, monkeypatch):
    def init():
        raise RuntimeError(f"{OLD_DRIVER}\nand more")

    def is_available():
        warnings.warn(f"CUDA initialization: {OLD_DRIVER}", stacklevel=1)
        return False

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)


def test_a_pytorch_without_cuda_on_a_machine_with_a_gpu_prints_a_warning(nvidia, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert pick_device(FinetuneConfig())[0] == torch.device("cpu")
    warning = capsys.readouterr().err
    assert warning.startswith("warning: this machine has an NVIDIA GPU, but the CPU is used: torch ")
    assert "was built without CUDA; for an RTX card: pip install --force-reinstall torch --index-url " in warning
    assert len(warning.splitlines()) == 1
    assert "was built without CUDA" in message(pick_device, FinetuneConfig(device="cuda"))


def test_the_reason_why_pytorch_cannot_use_the_gpu_is_shown_once(old_driver, capsys, recwarn):
    pick_device(FinetuneConfig())
    assert capsys.readouterr().err == f"warning: this machine has an NVIDIA GPU, but the CPU is used: {OLD_DRIVER}\n"
    assert not recwarn
    assert message(pick_device, FinetuneConfig(device="cuda")).endswith(f"finds only: cpu ({OLD_DRIVER})")


def test_there_is_no_warning_with_device_cpu_or_on_another_rank(old_driver, monkeypatch, capsys):
    pick_device(FinetuneConfig(device="cpu"))
    monkeypatch.setenv("RANK", "1")
    pick_device(FinetuneConfig())
    assert not capsys.readouterr().err


def test_there_is_no_warning_without_a_gpu(only_a_cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.path.exists", lambda path: False)
    pick_device(FinetuneConfig())
    assert not capsys.readouterr().err and "(" not in message(pick_device, FinetuneConfig(device="cuda"))


# ---- the speed of products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_measured_with_one_synchronization_after_all_products(dtype, monkeypatch):
    """On a clock by which a product takes a millisecond: 20 of them take the 0.02 seconds."""

    class Calls(TorchDispatchMode):
        names, dtypes = [], set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in ("mm", "_local_scalar_dense"):
                self.names.append(name)
                self.dtypes.add(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with Calls() as calls:
        monkeypatch.setattr("runtime.device.time.perf_counter", lambda: 0.001 * calls.names.count("mm"))
        assert peak_flops(torch.device("cpu"), dtype, n=256, seconds=0.02) > 0
    assert calls.dtypes == {dtype}
    assert calls.names == 2 * ["mm", "_local_scalar_dense"] + 20 * ["mm"] + ["_local_scalar_dense"]


def test_a_product_of_n_x_n_matrices_counts_2_n_cubed_flops(monkeypatch):
    """For a product that takes a second."""
    seconds = itertools.count()
    monkeypatch.setattr("runtime.device.time.perf_counter", lambda: float(next(seconds)))
    assert peak_flops(torch.device("cpu"), n=10, seconds=1.0) == 2 * 10 * 10 * 10


# ---- on a CPU


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc only")
def test_freed_memory_is_reused_without_page_faults():
    """Otherwise the gradients of every step cost a page fault per 4 kB, a quarter of its time."""
    code = """
import resource, torch
from runtime.device import keep_freed_memory
keep_freed_memory()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(10), [faults(10) for _ in range(3)][-1])
"""
    first, second = map(int, subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split())
    assert second < first / 10  # the heap is large enough by then


def test_the_first_exp_of_a_run_is_a_single_number(only_a_cpu):
    """It is computed by one thread. If several threads compute MKL's first exp, some results may be off by 1e-4."""

    class Exps(TorchDispatchMode):
        sizes = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.exp.default:
                self.sizes.append(args[0].numel())
            return function(*args, **(kwargs or {}))

    with Exps() as exps:
        pick_device(FinetuneConfig())
    assert exps.sizes == [1]


@pytest.fixture
def amd(monkeypatch):
    """A CPU of AMD with AVX-512. Afterwards torch's setting is that of a new process."""
    monkeypatch.setattr(device, "cpu_name", lambda: "vendor_id : AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    yield monkeypatch
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precise", [True, False])
def test_onednn_computes_products_on_amd_with_avx512_if_they_are_precise(only_a_cpu, amd, precise):
    amd.setattr(device, "products_are_precise", lambda: precise)
    pick_device(FinetuneConfig())
    assert torch.get_float32_matmul_precision() == ("medium" if precise else "highest")


def test_mkl_computes_products_on_other_cpus(only_a_cpu, amd):
    for name, capability in (("GenuineIntel", "AVX512"), ("", "AVX512"), ("AMD64 Family 26, AuthenticAMD", "AVX2")):
        amd.setattr(device, "cpu_name", lambda name=name: name)
        amd.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        pick_device(FinetuneConfig())
        assert torch.get_float32_matmul_precision() == "highest"


def test_fp32_products_have_the_precision_of_fp32(only_a_cpu, monkeypatch):
    """With the setting of the CPU that runs this test. In bf16 the product has an error of 0.05."""
    pick_device(FinetuneConfig())
    assert device.products_are_precise()
    exact = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args: exact(*args).bfloat16())
    assert not device.products_are_precise()


# ---- the micro-batch size


@pytest.mark.parametrize(
    ("free_gb", "processes", "expected"),
    [(80, 1, 128), (4.5, 1, 64), (4, 1, 32), (0.1, 1, 1), (4, 2, 64), (0.1, 2, 2)],
)
def test_the_micro_batch_is_the_largest_divisor_that_fits_the_memory_of_a_gpu(
    monkeypatch, free_gb, processes, expected
):
    """GPT-2 124M, rows of 24 tokens: 24 x (16 x 768 x 12 + 2 x 50,257) x 4 bytes are 23.8 MB, four copies 2 GB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gb * 1e9), int(80e9)))
    with torch.device("meta"):
        gpt2 = GPT2(GPT2Config())
    ranks = type("Ranks", (), {"size": processes, "any": staticmethod(lambda n: n)})
    assert micro_batch_size(PPOConfig(), 128, 24, gpt2, 4, torch.device("cuda"), ranks) == expected


@pytest.mark.parametrize("teacher, expected", [("", 64), ("a teacher", 32)])
def test_the_targets_of_a_teacher_need_memory_like_the_logits(monkeypatch, teacher, expected):
    """33.5 MB per row instead of 23.8 MB: 48 rows fit instead of 67."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(4.5e9), int(80e9)))
    with torch.device("meta"):
        gpt2 = GPT2(GPT2Config())
    cfg = FinetuneConfig(teacher=teacher)
    assert micro_batch_size(cfg, 128, 24, gpt2, 4, torch.device("cuda"), ONE_PROCESS) == expected


def test_memory_that_pytorch_caches_counts_as_free(monkeypatch):
    """Otherwise each pass of an evaluation would have fewer rows than the one before, whose memory is cached."""
    rows = []
    for free, reserved, allocated in ((10, 0, 0), (4, 8, 2), (4, 8, 8)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (int(free * 1e9), int(80e9)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _, bytes=reserved: int(bytes * 1e9))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _, bytes=allocated: int(bytes * 1e9))
        rows.append(rows_that_fit(24, 768, 12, 50257, torch.device("cuda")))
    assert rows == [336, 336, 134]  # 8 and 3.2 GB, 23.8 MB per row


def test_the_process_with_the_least_memory_decides(monkeypatch):
    """Otherwise the processes would have different numbers of micro-batches, and wait for each other."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(80e9), int(80e9)))
    gpt2, ranks = GPT2(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1)), type("Ranks", (), {})
    ranks.size, ranks.any = 2, lambda difference: max(difference, 128 - 32)  # 32 fit in the other process
    assert micro_batch_size(PPOConfig(), 128, 24, gpt2, 4, torch.device("cuda"), ranks) == 32


def test_a_micro_batch_has_2048_tokens_on_a_cpu_unless_its_size_is_given():
    gpt2 = GPT2(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    for cfg, tokens, expected in (
        (PPOConfig(), 48, 32),
        (PPOConfig(), 4096, 1),
        (PPOConfig(micro_batch_size=4), 48, 4),
    ):
        assert micro_batch_size(cfg, 64, tokens, gpt2, 4, torch.device("cpu"), ONE_PROCESS) == expected


def test_with_fp32_tf32_is_off_also_if_an_environment_variable_turned_it_on():
    code = (
        "import torch; from config import PPOConfig; from runtime.device import pick_device; "
        "torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda **_: True; "
        "before = torch.backends.cuda.matmul.allow_tf32; pick_device(PPOConfig(dtype='fp32')); "
        "print(before, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)"
    )
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    assert printed.split() == ["True", "False", "False"]
