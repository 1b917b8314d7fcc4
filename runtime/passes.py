"""The forward and the backward pass of an update on a GPU as two CUDA graphs instead of a thousand kernel launches.

A graph repeats its kernels on the same memory, so sequences of another shape need other graphs. Gradients are added to
the .grad of the parameters, as loss.backward() does. torch.autograd.grad and hooks of parameters do not see them.
"""

import weakref
from functools import partial

import torch

from runtime.decoding import end_failed_capture
from runtime.device import warn
from runtime.errors import first_line

MAX_SHAPES = 32  # sequences of further shapes launch their kernels one by one


class Passes:
    """The graphs of a policy, for each shape of the sequences.

    The first call for a shape initializes libraries, the second one captures its graphs. If that fails, all calls
    launch their kernels one by one. The graphs add to gradients that stay where they are: a call makes them the .grad
    of the parameters.
    """

    def __init__(self, policy):
        self.parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.grads = [torch.zeros_like(parameter) for parameter in self.parameters]
        torch._foreach_add_(self.grads, self.grads)  # loads the kernels that run_backward uses, before a capture
        self.passes, self.latest, self.usable = {}, None, True
        self.pool = None  # the memory that all graphs share
        self.anchor = torch.zeros((), requires_grad=True)  # an input with a gradient, so that autograd calls backward

    def __call__(self, compute, sequences, *arguments):
        """Return compute(sequences, *arguments), tensors with gradients.

        Each combination of shape and arguments has its own graphs.
        """
        key = *sequences.shape, *arguments
        if key in self.passes and self.usable:
            if not self.passes[key]:
                self.capture(key, compute, sequences, arguments)
        elif len(self.passes) < MAX_SHAPES:
            self.passes[key] = None
        if not self.passes.get(key):
            return compute(sequences, *arguments)
        self.hold_gradients()
        self.latest = self.passes[key]
        return Replay.apply(self.anchor, self, sequences)

    def capture(self, key, compute, sequences, arguments):
        try:
            self.passes[key] = Pass(self, compute, sequences, arguments)
        except RuntimeError as error:
            self.passes, self.usable = {}, False
            end_failed_capture(sequences.device)
            reason = first_line(error.__context__ or error)  # the end of a failed capture raises, too
            warn(f"no CUDA graphs of an update, so it is slower: {reason}")

    def hold_gradients(self):
        """Make self.grads the .grad of the parameters, and give them its values: Stepper.step sets it to None."""
        held = list(zip(self.parameters, self.grads))
        new = [grad for parameter, grad in held if parameter.grad is None]
        if new:
            torch._foreach_zero_(new)
        for parameter, grad in held:
            if parameter.grad is not None and parameter.grad is not grad:
                grad.copy_(parameter.grad)
            parameter.grad = grad


class Pass:
    """The two graphs for one shape, and the tensors on which they work."""

    def __init__(self, passes, compute, sequences, arguments):
        self.sequences, self.parameters, self.grads = sequences.clone(), passes.parameters, passes.grads
        passes.pool = passes.pool or new_pool()
        self.forward = captured(passes.pool, partial(self.run_forward, compute, arguments))
        self.output_grads = [torch.zeros_like(output) for output in self.outputs]
        self.backward = captured(passes.pool, self.run_backward)
        self.outputs = [output.detach() for output in self.outputs]  # autograd's graph would keep the capture's stream

    def run_forward(self, compute, arguments):
        self.outputs = compute(self.sequences, *arguments)

    def run_backward(self):
        torch._foreach_add_(self.grads, torch.autograd.grad(self.outputs, self.parameters, self.output_grads))


class Replay(torch.autograd.Function):
    """A call of the two graphs, for autograd an operation on the anchor. Its gradients are added by the graph."""

    @staticmethod
    def forward(ctx, anchor, passes, sequences):
        ctx.passes, ctx.used = passes, passes.latest
        ctx.used.sequences.copy_(sequences)
        ctx.used.forward()
        return tuple(output.clone() for output in ctx.used.outputs)  # the next call overwrites them

    @staticmethod
    def backward(ctx, *output_grads):
        if ctx.passes.latest is not ctx.used:
            raise RuntimeError(
                "the activations of this forward pass are gone: one backward pass may follow it directly"
            )
        for static, grad in zip(ctx.used.output_grads, output_grads):
            static.copy_(grad)
        ctx.used.backward()
        ctx.passes.latest = None
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
    """Return the Passes of a policy: the same ones in each call, new ones if other parameters are frozen."""
    known = PASSES.get(policy)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if known is None or [*map(id, trained)] != [*map(id, known.parameters)]:  # == would compare the numbers
        PASSES[policy] = Passes(policy)
    return PASSES[policy]
