"""Count, on a CPU, how often the host would wait for a GPU."""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

READS = {"item", "tolist", "numpy", "cpu", "equal", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
UNKNOWN_SHAPES = {"nonzero", "argwhere", "masked_select", "unique"}  # depend on the values
INDEXING = {"__getitem__", "__setitem__"}


class HostWaits(TorchFunctionMode):
    """places: where the host would wait in the block if models and data were on a GPU, a Counter of "file:line".

    It waits when it reads a tensor, needs the shape of a result that depends on values, or copies a tensor to the GPU
    other than by device.to_device. Tensors in the host's memory are the results of `cpu`, those created without a
    device, and the results of operations on such tensors. An operation on tensors of both memories is an error.
    """

    def __init__(self):
        super().__init__()
        self.places = Counter()

    @property
    def total(self):
        return self.places.total()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name, caller = kwargs or {}, function.__name__, sys._getframe(1)
        inputs = tensors((args, kwargs))
        on_host = all(map(is_on_host, inputs)) and (bool(inputs) or kwargs.get("device") is None)
        to_gpu = on_host and name == "to" and any(isinstance(arg, torch.device) for arg in args)
        result = function(*args, **kwargs)
        if to_gpu:
            waits, on_host = caller.f_code.co_name != "to_device", False
        elif on_host:
            waits = False
        else:
            mixed = any(is_on_host(x) and x.dim() > 0 for x in inputs)
            assert not mixed or name in INDEXING, f"{name} of tensors on host and GPU"
            waits = name in READS | UNKNOWN_SHAPES or not inputs and name in ("tensor", "as_tensor")
            waits |= name in INDEXING and any(map(is_read, tree_leaves(args[1])))
            on_host = name == "cpu"
        if waits:
            self.places[f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"] += 1
        if to_gpu or name == "cpu":
            result = result.clone()  # on a CPU, it is the tensor itself
        for tensor in tensors(result) if on_host else ():
            tensor.on_host = True
        return result


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def is_on_host(tensor):
    return getattr(tensor, "on_host", False)


def is_read(index):
    """Return whether the host waits for an index of a tensor on the GPU."""
    if isinstance(index, slice):
        return bool(tensors([index.start, index.stop, index.step]))
    return isinstance(index, torch.Tensor) and (index.dtype == torch.bool or index.dim() == 0 or is_on_host(index))
