"""Decode on a GPU with one CUDA graph per token instead of hundreds of kernel launches.

A graph repeats its kernels on the same memory: cache, position and random numbers are tensors that stay where they are.
"""

import copy
import weakref

import torch
import torch.nn as nn

from runtime.device import warn
from runtime.errors import first_line
from runtime.linear import Linear


def uses_graphs(device):
    """Return whether generate decodes, and an update computes its passes, with CUDA graphs."""
    return device.type == "cuda"


def end_failed_capture(device):
    """Give the default random generator of the device a new state: the old one still waits for the capture's end."""
    fresh = torch.Generator(device).manual_seed(torch.cuda.initial_seed())
    torch.cuda.default_generators[device.index or 0].graphsafe_set_state(fresh.graphsafe_get_state())


class StaticKVCache:
    """A KV cache of fixed shape. The position to write to is a tensor, and each token attends to all places, the empty
    ones masked."""

    def __init__(self, cache, length):
        *sizes, _, width = cache.shape
        self.buffer = cache.buffer.new_zeros(*sizes, length, width)  # (n_layer, 2, B, H, length, C / H)
        self.position = torch.zeros(1, dtype=torch.long, device=self.buffer.device)
        self.places = torch.arange(length, device=self.buffer.device)[None]

    def fill(self, cache):
        """Initialize from a KVCache."""
        self.buffer[..., : cache.filled, :] = cache.buffer[..., : cache.filled, :]
        self.buffer[..., cache.filled :, :] = 0  # a masked place has weight 0, and 0 * nan is nan
        self.position.fill_(cache.filled)

    def extend(self, layer, k, v):
        """Append k and v, (B, H, 1, C / H), to a layer; return the keys and values of all places."""
        keys, values = self.buffer[layer]
        keys.index_copy_(2, self.position, k)
        values.index_copy_(2, self.position, v)
        return keys, values

    @property
    def mask(self):
        return self.places <= self.position  # (1, length)


class Step:
    """Decode a token of each row: transformer, logits and draw, as one CUDA graph from the third call on.

    The first call initializes libraries, the second one captures the graph. If that fails, or on another device than
    CUDA, each call runs the kernels one by one.
    """

    def __init__(self, gpt2, cache, length, temperature, eos_id):
        self.gpt2, self.cache, self.temperature, self.eos_id = gpt2, StaticKVCache(cache, length), temperature, eos_id
        rows, device = cache.shape[2], cache.buffer.device
        self.new = torch.zeros(rows, 1, dtype=torch.long, device=device)  # the latest token of each row
        self.uniform = torch.zeros(rows, 1, dtype=torch.float64, device=device)
        self.graph, self.warm, self.capturable = None, False, device.type == "cuda"

    def __call__(self, generator):
        """Return the next token of each row, (B, 1) ids, in a tensor that the next call overwrites."""
        self.uniform.uniform_(generator=generator)
        if self.warm and self.capturable:
            self.capture()
        self.graph.replay() if self.graph else self.decode()
        self.warm = True
        return self.new

    def decode(self):
        hidden, ended = self.gpt2.hidden(self.new, self.cache.position, self.cache), self.new == self.eos_id
        self.new.copy_(self.gpt2.next_ids(hidden, ended, self.temperature, self.eos_id, u=self.uniform))
        self.cache.position += 1

    def capture(self):
        self.capturable, graph = False, torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.decode()
            self.graph = graph
        except RuntimeError as error:
            end_failed_capture(self.new.device)
            warn(f"no CUDA graph of a decoding step, so generation is slower: {first_line(error)}")


class Decoder:
    """The decoding steps of a GPT2, one for each shape of the batch, and low-precision copies of its weights.

    Autocast would convert the weights of the linear layers for each token. The copies are updated once per call of
    generate. All other parameters are those of the model, which must stay where they are.
    """

    def __init__(self, gpt2):
        self.steps, self.copies, self.originals = {}, [], []
        self.gpt2 = copy.deepcopy(gpt2, {id(parameter): parameter for parameter in gpt2.parameters()})  # shared
        low = gpt2.dtype != torch.float32
        for linear in (module for module in self.gpt2.modules() if isinstance(module, Linear) and low):
            for name, original in list(linear.named_parameters()):
                setattr(linear, name, nn.Parameter(original.detach().to(gpt2.dtype), requires_grad=False))
                self.copies.append(getattr(linear, name))
                self.originals.append(original)

    def start(self, cache, new, temperature, eos_id):
        """Return the Step that continues new (B, 1), the latest ids, whose predecessors are in a KVCache."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.originals)
        length = -(-cache.shape[4] // 32) * 32  # a multiple of 32, so that most lengths share a graph
        key = cache.shape[2], length, temperature, eos_id
        if key not in self.steps:
            self.steps[key] = Step(self.gpt2, cache, length, temperature, eos_id)
        step = self.steps[key]
        step.cache.fill(cache)
        step.new.copy_(new)
        return step


DECODERS = weakref.WeakKeyDictionary()  # {GPT2: Decoder}; not attributes, since a graph cannot be copied with its model


def decoder(gpt2):
    """Return the Decoder of a GPT2, the same one in each call."""
    if gpt2 not in DECODERS:
        DECODERS[gpt2] = Decoder(gpt2)
    return DECODERS[gpt2]
