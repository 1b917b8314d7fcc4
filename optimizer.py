"""Optimizer steps: which parameters decay, Muon (Jordan et al. 2024), and a step that is clipped, or skipped."""

import math

import torch
import torch.nn as nn

from config import BadInput


def decay_groups(parameters, weight_decay):
    """AdamW's groups: matrices and embeddings decay, biases and gains (one dimension) do not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizers(model, matrices, lr, weight_decay, betas=(0.9, 0.999), muon_lr=None):
    """[AdamW] of all parameters, or [AdamW, Muon] where there are matrices for Muon, which AdamW then leaves out.

    Embeddings are tables of vectors, not maps: Muon is not meant for them (kellerjordan.github.io/posts/muon).
    """
    chosen = set(matrices)
    rest = decay_groups([p for p in model.parameters() if p not in chosen], weight_decay)
    fused = next(model.parameters()).device.type != "mps"
    optimizers = [torch.optim.AdamW(rest, lr, betas=betas, fused=fused)]
    return optimizers + ([Muon(matrices, muon_lr, weight_decay)] if matrices else [])


class Muon(torch.optim.Optimizer):
    """Steps for the matrices inside the blocks: Nesterov momentum, orthogonalised (kellerjordan.github.io/posts/muon).

    parameters: matrices (out, in). The arithmetic of torch.optim.Muon, but in the parameters' own dtype: torch's is in
    bf16, for which a CPU without bf16 units needs 0.3 to 0.7 s a matrix of width 256. Matrices of one shape are stacked
    and go together. One three times as tall as wide is taken for the three that make up a c_attn, (3C, C).
    """

    def __init__(self, parameters, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), parameters in shapes.items():
                gradients = torch.stack([p.grad for p in parameters])  # (matrices of this shape, rows, columns)
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
                torch._foreach_lerp_(momenta, gradients.unbind(), 1 - group["momentum"])
                updates = gradients.lerp_(torch.stack(momenta), group["momentum"])
                parts = 3 if rows == 3 * columns else 1
                updates = orthogonal(updates.view(-1, rows // parts, columns)).view(-1, rows, columns)
                scale = math.sqrt(max(1.0, rows / parts / columns))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates.unbind(), alpha=-group["lr"] * scale)


def orthogonal(matrices, steps=5):
    """The nearest semi-orthogonal matrices, roughly: singular values between about 0.7 and 1.2. (n, a, b) -> (n, a, b).

    Newton-Schulz iterations of the odd polynomial 3.4445 x - 4.7750 x^3 + 2.0315 x^5 on the singular values.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT  # the smaller side first: A below is a x a
    for _ in range(steps):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Stepper:
    """Optimizer steps with a clipped gradient; none where it is not finite, and three such in a row stop the run."""

    def __init__(self, model, optimizers, grad_clip):
        self.model, self.optimizers, self.grad_clip = model, optimizers, grad_clip
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.skips = {"skipped_steps": 0, "in_a_row": 0}  # part of a checkpoint's state

    @property
    def skipped(self):
        return self.skips["skipped_steps"]

    def set_lr(self, share):
        """Every learning rate becomes this share of what its optimizer was made with."""
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * share

    def step(self):
        """Take the step, clear the gradients, return their norm as a float."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip).item()
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
            self.skips["in_a_row"] = 0
        self.model.zero_grad(set_to_none=True)
        if not math.isfinite(norm):
            self.skip(f"the gradient was not finite (norm {norm}): lower lr")
        return norm

    def skip(self, what):
        """Count a step that is not taken; BadInput at the third in a row, saying what was seen."""
        for count in self.skips:
            self.skips[count] += 1
        if self.skips["in_a_row"] == 3:
            raise BadInput(f"three steps in a row were skipped, the last one because {what}")


def warm_up_and_decay(step, steps):
    """Share of the peak learning rate: linearly up over a tenth of the steps, then linearly to 0 behind the last."""
    return min((step + 1) / math.ceil(steps / 10), (steps - step) / steps / 0.9)
