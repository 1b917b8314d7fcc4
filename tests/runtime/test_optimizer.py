"""Optimizer steps: clipping, gradients that are not finite, schedules, weight decay, Muon."""

import json
import math

import pytest
import torch
from torch import nn

from model import GPT2, GPT2Config
from runtime.errors import BadInput
from runtime.optimizer import Muon, Stepper, decay_groups, make_optimizers, orthogonal, warm_up_and_decay


@pytest.fixture
def stepper():
    """SGD with learning rate 1 on a weight vector of zeros, clipped at 1."""
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    return Stepper(module, [torch.optim.SGD(module.parameters(), lr=1.0)], grad_clip=1.0)


def take_step(stepper, *gradient):
    stepper.model.weight.grad = torch.tensor([gradient])
    norm = stepper.step()
    assert stepper.model.weight.grad is None
    return norm, stepper.model.weight.tolist()[0]


def test_a_step_clips_the_gradient_and_returns_its_norm_before_clipping(stepper):
    norm, weight = take_step(stepper, 6.0, 8.0)
    assert norm == pytest.approx(10)
    assert weight == pytest.approx([-0.6, -0.8], abs=1e-5)
    norm, weight = take_step(stepper, 0.3, 0.0)  # within the bound: unchanged
    assert norm == pytest.approx(0.3)
    assert weight == pytest.approx([-0.9, -0.8], abs=1e-5)
    assert stepper.skipped == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(stepper, bad):
    """Clipping with an infinite norm would make every weight nan."""
    assert take_step(stepper, bad, 1.0)[1] == [0, 0]
    assert stepper.skipped == 1


def test_three_bad_gradients_in_a_row_stop_the_run_and_two_with_a_good_one_between_do_not(stepper):
    for gradient in (math.nan, math.nan, 0.5, math.nan, math.nan):
        take_step(stepper, gradient, 0.0)
    assert stepper.skipped == 4
    with pytest.raises(BadInput, match="three steps in a row were skipped, .*norm nan"):
        take_step(stepper, math.nan, 0.0)
    assert stepper.model.weight.tolist() == [[-0.5, 0]]


# ---- float16


@pytest.fixture
def scaled(stepper):
    """The stepper, for a model that runs in float16."""
    return Stepper(stepper.model, stepper.optimizers, grad_clip=1.0, dtype=torch.float16)


def take_scaled_step(stepper, *gradient):
    """Take a step on a loss with this gradient."""
    stepper.backward(stepper.model(torch.tensor(gradient)).sum())
    return stepper.step()


def test_in_float16_a_step_clips_the_gradient_without_the_scale_and_returns_its_norm(scaled):
    assert take_scaled_step(scaled, 6.0, 8.0) == pytest.approx(10)
    assert scaled.model.weight.tolist()[0] == pytest.approx([-0.6, -0.8], abs=1e-5)
    assert take_scaled_step(scaled, 0.3, 0.0) == pytest.approx(0.3)
    assert scaled.model.weight.tolist()[0] == pytest.approx([-0.9, -0.8], abs=1e-5)
    assert scaled.skipped == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_the_loss_is_scaled_in_float16_only(stepper, dtype):
    stepper = Stepper(stepper.model, stepper.optimizers, 1.0, dtype=dtype)
    stepper.backward(stepper.model(torch.ones(2)).sum())
    assert stepper.model.weight.grad.tolist() == [2 * [65536.0 if dtype == torch.float16 else 1.0]]


def test_an_overflow_in_float16_halves_the_scale_and_does_not_end_the_run_until_the_scale_is_1(scaled):
    for n in range(1, 17):
        take_scaled_step(scaled, math.inf, 0.0)
        assert (scaled.scaler.get_scale(), scaled.skipped, scaled.in_a_row) == (2.0 ** (16 - n), n, 0)
    assert scaled.model.weight.tolist() == [[0, 0]]
    for _ in range(2):
        take_scaled_step(scaled, math.nan, 0.0)
    with pytest.raises(BadInput, match="three steps in a row were skipped, .*norm nan"):
        take_scaled_step(scaled, math.nan, 0.0)


def test_an_overflow_in_the_gradients_of_one_optimizer_skips_the_steps_of_all():
    """AdamW is fused: it would skip its own step alone."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    optimizers = make_optimizers(model, [model[0].weight], 0.1, 0.1, muon_lr=0.1)
    stepper, before = Stepper(model, optimizers, 1.0, dtype=torch.float16), [p.clone() for p in model.parameters()]
    for inputs in (torch.ones(2), torch.tensor([math.inf, 1.0])):
        for p, start in zip(model.parameters(), before):
            start.copy_(p.detach())
        stepper.backward(model(torch.ones(2)).sum() + (model[0].weight * inputs).sum())
        stepper.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert (stepper.skipped, stepper.scaler.get_scale()) == (1, 2.0**15)


def test_an_overflow_on_another_process_halves_the_scale_of_this_one(scaled):
    """Catches a check of the process's own gradients, after which the scales of the processes would differ."""

    class Ranks:
        def average_gradients(self, model):
            model.weight.grad += torch.tensor([math.inf, 0.0])

    scaled.ranks = Ranks()
    take_scaled_step(scaled, 1.0, 1.0)
    assert (scaled.skipped, scaled.scaler.get_scale()) == (1, 2.0**15)
    assert scaled.model.weight.tolist() == [[0, 0]]


def test_the_state_of_the_scaler_is_in_the_checkpoint_and_is_not_needed_by_other_dtypes(stepper, scaled):
    take_scaled_step(scaled, math.inf, 0.0)
    take_scaled_step(scaled, 1.0, 0.0)
    state = json.loads(json.dumps(scaled.scaler_state))
    assert (state["scale"], state["_growth_tracker"]) == (2.0**15, 1) and "scaler_state" in Stepper.saved
    restored = Stepper(scaled.model, scaled.optimizers, 1.0, dtype=torch.float16)
    restored.scaler_state = state
    assert restored.scaler_state == state
    restored.scaler_state = stepper.scaler_state  # {}: saved in another dtype
    assert restored.scaler_state == state
    stepper.scaler_state = state
    assert stepper.scaler_state == {} and take_step(stepper, 0.5, 0.0)[0] == 0.5


# ---- learning rates and parameter groups


def test_every_group_of_every_optimizer_follows_the_schedule_from_its_own_peak():
    """Catches a learning rate set in the first group alone, and one scaled from that of the last step."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    adamw = torch.optim.AdamW(decay_groups(model[0].parameters(), 0.1), lr=0.5)
    stepper = Stepper(model, [adamw, Muon([model[1].weight], lr=0.2)], grad_clip=1.0)
    for share in (0.1, 0.5):
        stepper.set_lr(share)
        assert [[group["lr"] for group in o.param_groups] for o in stepper.optimizers] == [
            [0.5 * share] * 2,
            [0.2 * share],
        ]


def test_the_learning_rate_rises_for_a_tenth_of_the_steps_and_falls_to_0_after_the_last():
    """Linearly, up to 1: with 20 steps it rises in two, and the last one has a share of 1/18."""
    shares = [warm_up_and_decay(step, 20) for step in range(20)]
    assert shares == pytest.approx([0.5, 1] + [(20 - step) / 18 for step in range(2, 20)])
    assert warm_up_and_decay(20, 20) == 0
    assert warm_up_and_decay(0, 110) == pytest.approx(1 / 11)
    assert [warm_up_and_decay(step, 15) for step in (0, 1, 2)] == pytest.approx([0.5, 1, 13 / 13.5])  # two of 15 too


def test_muon_has_its_own_learning_rate_and_adamw_does_not_have_its_matrices():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    adamw, muon = make_optimizers(model, [model[1].weight], 0.5, 0.1, betas=(0.8, 0.9), muon_lr=0.2)
    decayed, other = adamw.param_groups
    assert [group["params"] for group in (decayed, other)] == [[model[0].weight], [model[1].bias]]
    assert [(group["lr"], group["weight_decay"]) for group in (decayed, other)] == [(0.5, 0.1), (0.5, 0.0)]
    assert decayed["betas"] == (0.8, 0.9)
    (group,) = muon.param_groups
    assert group["params"] == [model[1].weight]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.2, 0.1, 0.95)


@pytest.mark.parametrize(("kind", "fused"), [("cpu", True), ("cuda", True), ("mps", False)])
def test_adamw_is_fused_except_on_mps(kind, fused, monkeypatch):
    class Parameter:
        device = torch.device(kind)

        def dim(self):
            return 2

    model, settings = nn.Module(), {}
    monkeypatch.setattr(model, "parameters", lambda: iter([Parameter()]), raising=False)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **options: settings.update(options))
    make_optimizers(model, [], 0.5, 0.1)
    assert settings["fused"] is fused


def test_weight_decay_applies_to_matrices_and_not_to_biases_and_gains():
    with torch.device("meta"):
        gpt2 = GPT2(GPT2Config())
    groups = decay_groups(gpt2.parameters(), 0.1)
    counts = [(len(g["params"]), sum(p.numel() for p in g["params"]), g["weight_decay"]) for g in groups]
    assert counts == [(50, 124_318_464, 0.1), (98, 121_344, 0.0)]


def test_orthogonal_keeps_the_directions_and_brings_all_singular_values_near_1():
    """Catches a wrong coefficient, a product in the wrong order and a transposed result."""
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 40, 12), (2, 12, 40)):
        matrices = torch.randn(shape, dtype=torch.float64)
        U, S, V = torch.linalg.svd(orthogonal(matrices), full_matrices=False)
        assert S.min() > 0.6 and S.max() < 1.3
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        inner = left.mT @ orthogonal(matrices) @ right.mT  # diagonal: the singular vectors are those of the matrices
        assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-9


def test_orthogonal_of_a_tiny_gradient_keeps_its_sign():
    """Its norm is below the epsilon of 1e-7 that prevents a division by 0."""
    matrices = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e-9
    assert ((orthogonal(matrices) * matrices).sum(dim=(1, 2)) > 0).all()
    assert orthogonal(torch.zeros(1, 8, 8)).abs().max() == 0


def test_muon_stores_its_momentum_and_does_not_decay_weights_by_default():
    p = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    before, p.grad = p.detach().clone(), torch.zeros(4, 4)
    muon = Muon([p], lr=0.1)
    muon.step()
    assert torch.equal(p.detach(), before)
    p.grad = torch.ones(4, 4)
    muon.step()
    assert list(muon.state[p]) == ["momentum"]  # its name in checkpoints
    torch.testing.assert_close(muon.state[p]["momentum"], torch.full((4, 4), 0.05))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 and newer")
def test_muon_equals_torch_optim_muon_up_to_bf16_rounding():
    """torch.optim.Muon is the reference: momentum, Nesterov, decay and the scale of tall matrices."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape) / 4) for shape in ((16, 16), (40, 16), (40, 16), (16, 40))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=0.02, weight_decay=0.1, momentum=0.9)
    pairs = (Muon(ours, **settings), ours), (torch.optim.Muon(theirs, **settings), theirs)
    start = [p.detach().clone() for p in ours]
    for _ in range(4):
        gradients = [torch.randn_like(p) for p in ours]
        for optimizer, parameters in pairs:
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient.clone()
            optimizer.step()
    for a, b, p in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (a - p).norm()


def test_muon_treats_a_c_attn_as_three_matrices():
    torch.manual_seed(0)
    whole, gradient = nn.Parameter(torch.randn(24, 8)), torch.randn(24, 8)
    thirds = [nn.Parameter(third.clone()) for third in whole.detach().split(8)]
    whole.grad = gradient
    for third, part in zip(thirds, gradient.split(8)):
        third.grad = part
    Muon([whole], lr=0.1).step()
    Muon(thirds, lr=0.1).step()
    torch.testing.assert_close(whole.detach(), torch.cat([third.detach() for third in thirds]))
