"""Several processes as one run; a run that torchrun did not start has one process.

    torchrun --nproc_per_node 8 ppo.py              # one machine; finetune_gpt2.py likewise
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 ppo.py    # on both machines

Batch sizes are those of all processes together. Each process generates, scores and trains on its share of the rows,
and the results are gathered: advantages, the KL coefficient and alarms depend on all episodes. Gradients are averaged
once per optimizer step.
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist

from runtime.errors import BadInput, first_line


class OneProcess:
    """A run of one process: all rows are its own."""

    rank, size = 0, 1

    def share(self, rows):
        """Return the rows of this process: an equal part, in order."""
        return rows

    def gather(self, part):
        """Concatenate the parts (n, ...) of all processes in the order of their ranks: (size * n, ...)."""
        return part

    def mean(self, metrics):
        """Average the metrics (floats by name) over all processes, but take the largest of those named max_..."""
        return metrics

    def any(self, flag):
        """Return the largest of the numbers (>= 0) of all processes: 0 only if it is 0 in each of them."""
        return flag

    def attempt(self, function, *args):
        """Call a function that may raise BadInput. If it does in one process, raise BadInput in all of them."""
        return function(*args)

    def average_gradients(self, model):
        """Replace the gradients by their mean over all processes."""


class Processes(OneProcess):
    """The processes that torchrun started: NCCL on CUDA, otherwise Gloo. Only rank 0 prints, logs and saves."""

    def __init__(self, device):
        if device.type == "mps":
            raise BadInput("several processes need cuda or cpu, not mps: use --device cpu")
        if device.type == "cuda":
            if device.index >= torch.cuda.device_count():
                raise BadInput(f"there are {torch.cuda.device_count()} GPUs here, too few for process {device.index}")
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        self.device, self.rank, self.size = device, dist.get_rank(), dist.get_world_size()
        if self.rank:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")

    def share(self, rows):
        n, rest = divmod(len(rows), self.size)
        assert rest == 0, f"{len(rows)} rows for {self.size} processes"
        return rows[self.rank * n : (self.rank + 1) * n]

    def gather(self, part):
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self.call(dist.all_gather, parts, part.detach().contiguous())
        return torch.cat(parts)

    def mean(self, metrics):
        values = self.gather(torch.tensor([list(metrics.values())], dtype=torch.float64, device=self.device))
        both = zip(metrics, values.mean(0).tolist(), values.amax(0).tolist())
        return {name: largest if "max_" in name else mean for name, mean, largest in both}

    def any(self, flag):
        return int(self.gather(torch.tensor([flag], device=self.device)).max())

    def attempt(self, function, *args):
        result = error = None
        try:
            result = function(*args)
        except BadInput as raised:
            error = raised
        if self.any(error is not None):
            raise error or BadInput("another process ended with an error, see its message")
        return result

    def average_gradients(self, model):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.call(dist.all_reduce, flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))

    def call(self, collective, *args):
        try:
            collective(*args)
        except RuntimeError as error:  # raised by Gloo; NCCL waits until torchrun ends this process too
            raise BadInput(f"another process ended, see its message: {first_line(error)}") from None


ONE_PROCESS = OneProcess()


def join(device, cfg):
    """Return the processes of this run, a OneProcess or Processes.

    Raises BadInput unless their number divides the batch sizes of cfg, which count the rows of all processes.
    """
    if "WORLD_SIZE" not in os.environ:
        return ONE_PROCESS
    processes = Processes(device)
    for name in ("batch_size", "minibatch_size", "micro_batch_size"):
        if (rows := getattr(cfg, name, 0)) % processes.size:
            raise BadInput(f"{name} {rows} is not divisible by the number of processes, {processes.size}")
    return processes


def refuse_processes(script):
    """Raise BadInput if torchrun started several processes of a script that is written for one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput(f"{script} runs in one process: start it with python, not with torchrun")
