"""How often the host waits for the GPU in a PPO step: each time, the GPU runs out of work. Counted on the CPU."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from host_waits import HostWaits

from config import PPOConfig
from ppo import rollout, update
from reward import GPU_BATCH_TOKENS, SentimentReward
from runtime.device import random_generator, to_device, true_places
from runtime.hub import load_policy, open_gpt2
from runtime.monitor import rollout_metrics
from runtime.optimizer import Stepper

GPU = torch.device("cpu")  # in these tests


@pytest.mark.parametrize(
    "changes", [{}, {"whiten_rewards": True}, {"advantage": "grpo"}, {"micro_batch_size": 32}], ids=str
)
def test_a_rollout_and_its_update_make_the_host_wait_12_times(gpt2_folder, bert_folder, judge_folder, changes):
    """As in preset gpt2: 128 episodes of 8 + 16 tokens, a reward, a judge, and four optimizer steps. A classifier waits
    twice, the first time in transformers. Reading the metrics of the rollout is one wait more."""
    cfg = replace(PPOConfig(micro_batch_size=128), **changes)
    opened = open_gpt2(str(gpt2_folder))
    policy = load_policy(*opened)
    ref_policy, waits = copy.deepcopy(policy).requires_grad_(False), [HostWaits() for _ in range(3)]
    reward_fn, judge = (SentimentReward.load(str(folder), device=GPU) for folder in (bert_folder, judge_folder))
    reward_fn.batch_tokens = judge.batch_tokens = GPU_BATCH_TOKENS
    stepper = Stepper(policy, [torch.optim.Adam(policy.parameters(), 1e-4, fused=True)], cfg.grad_clip)
    prompts, rng = torch.arange(1, 1025).view(128, 8) % 250, random_generator("cpu", 0)
    with waits[0]:
        batch = rollout(policy, ref_policy, opened[2], reward_fn, prompts, 0.1, cfg, rng, judge)
    with waits[1]:
        rollout_metrics(batch, policy, ref_policy, 0.0, cfg)
    with waits[2]:
        update(policy, stepper, batch, cfg, rng)
    places = [dict(counted.places) for counted in waits]
    assert [counted.total for counted in waits] == [7, 1, 5], places


def test_a_classifier_copies_its_logits_once_whatever_the_number_of_batches(bert_folder):
    """The other waits are in transformers, one per batch."""
    classifier, host = SentimentReward.load(str(bert_folder), device=GPU), HostWaits()
    classifier.batch_tokens = 24
    with host:
        classifier([" ".join(["movie"] * n) for n in (1, 20, 4, 40)])
    waits = Counter(place.split(":")[0] for place in host.places.elements())
    assert waits == {"reward.py": 1, "masking_utils.py": 4}


def test_every_kind_of_wait_is_counted_and_no_other_operation():
    x, mask, places, host = torch.arange(6.0), torch.arange(6) > 2, torch.tensor([1, 2]), HostWaits()
    wait = (
        lambda: x.sum().item(),
        lambda: float(x[0]),
        lambda: bool(mask.all()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x[mask],
        lambda: x[: places[0]],
        lambda: x.masked_select(mask),
        lambda: mask.nonzero(),
        lambda: torch.zeros(3).to(GPU),
        lambda: torch.tensor([1.0], device=GPU),
        lambda: max(x[0], x[1]),
        lambda: x[torch.tensor([0])],
    )
    do_not = (
        lambda: x[places],
        lambda: x.where(mask, 0),
        lambda: x * torch.ones(()),
        lambda: x.to(torch.float64),
        lambda: to_device(torch.zeros(3), GPU)[places],
        lambda: torch.ones(3).sum().item(),
        lambda: torch.zeros(3, device=GPU).sum(),
    )
    for function in wait:
        before = host.total
        with host:
            function()
        assert host.total == before + 1
    with host:
        for function in do_not:
            function()
        on_host = x.cpu()
        on_host[:2].tolist(), int(on_host.sum())
    assert host.total == len(wait) + 1
    assert set(Counter(place.split(":")[0] for place in host.places)) == {"test_host_waits.py"}


def test_an_operation_on_tensors_of_host_and_gpu_is_an_error():
    x = torch.arange(6.0)
    with pytest.raises(AssertionError, match="add"), HostWaits():
        x + torch.ones(6)


def test_the_places_of_a_mask_select_the_elements_of_the_mask():
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(5, 7, generator=generator), torch.rand(5, 7, generator=generator) > 0.5
    assert torch.equal(x[true_places(mask, GPU)], x[mask])
