"""The forward and the backward pass of an update on a GPU as two CUDA graphs instead of a thousand kernel launches.

A graph repeats its kernels on the same memory, so sequences of another shape need other graphs.
"""

import weakref

import torch

from runtime.decoding import end_failed_capture
from runtime.device import warn
from runtime.errors import first_line

MAX_SHAPES = 32  # sequences of further shapes launch their kernels one by one


class Passes:
    """The graphs of a policy, for each shape of the sequences.

    The first call for a shape initializes libraries, the second one captures its graphs. If that fails, all calls
    launch their kernels one by one. Graphs add to gradients that stay where they are: a call makes them the parameters'
    .grad.
    """

    def __init__(self, policy):
        self.parameters = list(policy.parameters())
        self.grads = [torch.zeros_like(parameter) for parameter in self.parameters]
        torch._foreach_add_(self.grads, self.grads)  # loads its kernels: a capture failed when it had to load them
        self.passes, self.latest, self.usable = {}, None, True
        self.pool = None  # the memory that all graphs share
        self.anchor = torch.zeros((), requires_grad=True)  # an input with a gradient, without which autograd stops

    def __call__(self, compute, sequences, *how):
        """Return compute(sequences, *how), tensors with gradients. Other numbers in `how` need other graphs, too."""
        key = *sequences.shape, *how
        if key in self.passes and self.usable:
            if not self.passes[key]:
                self.capture(key, compute, sequences, how)
        elif len(self.passes) < MAX_SHAPES:
            self.passes[key] = None
        if not self.passes.get(key):
            return compute(sequences, *how)
        self.hold_gradients()
        self.latest = self.passes[key]
        return Replay.apply(self.anchor, self, sequences)

    def capture(self, key, compute, sequences, how):
        try:
            self.passes[key] = Pass(self, compute, sequences, how)
        except RuntimeError as error:
            self.passes, self.usable = {}, False
            end_failed_capture(sequences.device)
            warn(f"no CUDA graphs of an update, so it is slower: {first_line(error)}")

    def hold_gradients(self):
        """Make self.grads the .grad of the parameters, and give them its values: Stepper.step sets it to None."""
        before = [parameter.grad for parameter in self.parameters]
        if before[0] is None:
            torch._foreach_zero_(self.grads)
        elif before[0] is not self.grads[0]:
            torch._foreach_copy_(self.grads, before)
        for parameter, grad in zip(self.parameters, self.grads):
            parameter.grad = grad


class Pass:
    """The two graphs for one shape, and the tensors on which they work."""

    def __init__(self, passes, compute, sequences, how):
        self.sequences, self.parameters, self.grads = sequences.clone(), passes.parameters, passes.grads
        passes.pool = passes.pool or new_pool()
        self.forward = captured(passes.pool, lambda: self.run_forward(compute, how))
        self.output_grads = [torch.zeros_like(output) for output in self.outputs]
        self.backward = captured(passes.pool, self.run_backward)

    def run_forward(self, compute, how):
        self.outputs = compute(self.sequences, *how)

    def run_backward(self):
        torch._foreach_add_(self.grads, torch.autograd.grad(self.outputs, self.parameters, self.output_grads))


class Replay(torch.autograd.Function):
    """A call of the two graphs, for autograd an operation on the anchor. Its gradients are added by the graph."""

    @staticmethod
    def forward(ctx, anchor, passes, sequences):
        ctx.passes, ctx.used = passes, passes.latest
        ctx.used.sequences.copy_(sequences)
        ctx.used.forward()
        return tuple(output.detach().clone() for output in ctx.used.outputs)  # the next call overwrites them

    @staticmethod
    def backward(ctx, *output_grads):
        if ctx.passes.latest is not ctx.used:
            raise RuntimeError("another forward pass has overwritten the activations of this one")
        for static, grad in zip(ctx.used.output_grads, output_grads):
            static.copy_(grad)
        ctx.used.backward()
        return None, None, None


def new_pool():
    return torch.cuda.graph_pool_handle()


def captured(pool, function):
    """Capture the kernels of a function in a CUDA graph; return the function that repeats them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph.replay


PASSES = weakref.WeakKeyDictionary()  # {Policy: Passes}; not attributes, since a graph cannot be copied with its model


def passes(policy):
    """Return the Passes of a policy, the same ones in each call."""
    if policy not in PASSES:
        PASSES[policy] = Passes(policy)
    return PASSES[policy]
