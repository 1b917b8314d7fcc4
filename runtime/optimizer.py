"""AdamW groups, Muon (Jordan et al. 2024), and optimizer steps with clipping."""

import math

import torch
import torch.nn as nn

from runtime.distributed import ONE_PROCESS
from runtime.errors import BadInput


def decay_groups(parameters, weight_decay):
    """Return AdamW's parameter groups: weight decay for matrices and embeddings, none for biases and gains."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizers(model, matrices, lr, weight_decay, betas=(0.9, 0.999), muon_lr=None):
    """Return [AdamW] for all parameters, or [AdamW, Muon] if `matrices`, the parameters for Muon, are not empty.

    Embeddings are not linear maps: Muon is not meant for them (kellerjordan.github.io/posts/muon).
    """
    chosen = set(matrices)
    rest = decay_groups([p for p in model.parameters() if p not in chosen], weight_decay)
    fused = next(model.parameters()).device.type != "mps"
    optimizers = [torch.optim.AdamW(rest, lr, betas=betas, fused=fused)]
    return optimizers + ([Muon(matrices, muon_lr, weight_decay)] if matrices else [])


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum for the matrices of the blocks (kellerjordan.github.io/posts/muon).

    parameters: matrices (out, in). The same arithmetic as torch.optim.Muon, but in the parameters' dtype: torch uses
    bf16, in which a CPU without bf16 units needs 0.3 to 0.7 s for a matrix of width 256. Matrices of one shape are
    processed together. A matrix of shape (3C, C) is treated as the three matrices of a c_attn.
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
    """Return matrices close to the nearest semi-orthogonal ones, singular values 0.7 to 1.2: (n, a, b) -> (n, a, b).

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
    """Optimizer steps with a clipped gradient, averaged over processes; skipped if the gradient is not finite.

    dtype: the autocast dtype of the model. In float16 the loss is multiplied by the scale of a GradScaler, since small
    gradients would become 0. If a gradient overflows, the step is skipped and the scale halved.
    """

    saved = ("skipped", "in_a_row", "scaler_state")

    def __init__(self, model, optimizers, grad_clip, ranks=ONE_PROCESS, dtype=torch.float32):
        self.model, self.optimizers, self.grad_clip, self.ranks = model, optimizers, grad_clip, ranks
        self.parameters = list(model.parameters())  # listed once: on a GPU, the host is slower than the kernels
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=dtype == torch.float16)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.skipped = self.in_a_row = 0

    @property
    def lr(self):
        """The current learning rate of the first optimizer."""
        return self.optimizers[0].param_groups[0]["lr"]

    def set_lr(self, share):
        """Set every learning rate to this share of its initial value."""
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * share

    @property
    def scaler_state(self):
        """The state of the GradScaler: a dict for JSON, {} except in float16. A new run's scale is 65,536."""
        return self.scaler.state_dict()

    @scaler_state.setter
    def scaler_state(self, state):
        if state:  # {}: the run was saved with another dtype
            self.scaler.load_state_dict(state)

    def backward(self, loss):
        """Add the gradients of a loss, in float16 those of the scaled loss."""
        self.scaler.scale(loss).backward()

    def step(self):
        """Take a step, clear the gradients, and return the norm of the gradient, without the scale, as a float.

        While the scale is above 1, a gradient that is not finite is an overflow, which is normal in the first steps: it
        is not one of the three skipped steps in a row that end a run.
        """
        self.ranks.average_gradients(self.model)  # before the check, so that all processes find the same overflows
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_clip).item()
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
            self.in_a_row = 0
        elif self.scaler.get_scale() > 1:  # it is 1 without a scaler
            self.skipped += 1
        else:
            self.skip(f"the gradient was not finite (norm {norm}): lower lr")
        self.scaler.update()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def skip(self, reason):
        """Count a skipped step; raise BadInput at the third in a row."""
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == 3:
            raise BadInput(f"three steps in a row were skipped, the last one because {reason}")


def warm_up_and_decay(step, steps):
    """Return the share of the peak learning rate: linear warm-up over a tenth of the steps, then linear decay to 0."""
    return min((step + 1) / math.ceil(steps / 10), (steps - step) / steps / 0.9)
