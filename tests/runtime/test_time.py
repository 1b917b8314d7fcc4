"""The estimated time of a run on a CPU: its FLOPs compared with counted ones, the row in the table, the warning."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from config import FinetuneConfig, PPOConfig, RewardConfig
from model import GPT2, GPT2Config, Policy
from ppo import rollout, update
from reward import load_reward, tokens_of
from runtime import log
from runtime.device import random_generator
from runtime.log import classifier_flops, duration, finetune_sheet, ppo_flops, ppo_sheet, time_on_cpu
from runtime.optimizer import Stepper

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = GPT2Config(vocab_size=300, n_positions=32, n_embd=64, n_layer=2, n_head=2)


@pytest.fixture
def gigaflops(monkeypatch):
    """A CPU with a peak of 1 GFLOP/s, of which a run reaches six tenths."""
    monkeypatch.setattr(log, "peak_flops", lambda *args, **sizes: 1e9)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def counted(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def test_the_flops_of_a_forward_pass_are_those_that_pytorch_counts():
    """For short sequences: the products of the attention, which grow with the length, are not counted."""
    gpt2 = GPT2(SHAPE)
    ids = torch.ones(4, 8, dtype=torch.long)
    assert gpt2.flops(tokens=32, predicted=12) == pytest.approx(counted(gpt2, ids, 5), rel=0.03)
    padded = GPT2(replace(SHAPE, vocab_size=320), n_tokens=300)  # rows of padding have no logits
    assert padded.flops(32, 12) == gpt2.flops(32, 12)


def test_the_flops_of_ppo_are_those_that_pytorch_counts_in_a_rollout_and_its_update(bert_folder, tokenizer):
    """The last token of a response counts, although nothing is predicted from it."""
    cfg = PPOConfig(
        reward=str(bert_folder), judge="", steps=3, batch_size=8, minibatch_size=4, micro_batch_size=4, ppo_epochs=2,
        min_prompt_len=4, max_prompt_len=4, response_len=12,
    )  # fmt: skip
    policy, reward_fn = Policy(GPT2(SHAPE).init_weights()), load_reward(cfg, CPU)
    stepper = Stepper(policy, [torch.optim.SGD(policy.parameters(), 0.1)], 1.0)

    class WithoutEnd:
        eos_token_id = -1
        batch_decode = staticmethod(tokenizer.batch_decode)

    def step():
        prompts, generator = torch.ones(8, 4, dtype=torch.long), random_generator("cpu", 0)
        batch = rollout(
            policy, policy, WithoutEnd(), lambda texts: torch.ones(len(texts)), prompts, 0.1, cfg, generator
        )
        update(policy, stepper, batch, cfg)

    policy_flops, classifier = ppo_flops(cfg, policy.gpt2, [len, None]), 24 * classifier_flops(reward_fn.model, 16)
    assert policy_flops == pytest.approx(3 * counted(step), rel=0.1)
    assert ppo_flops(cfg, policy.gpt2, [reward_fn, None]) == pytest.approx(policy_flops + classifier)
    assert ppo_flops(cfg, policy.gpt2, [len, reward_fn]) == pytest.approx(policy_flops + classifier)
    assert ppo_flops(cfg, policy.gpt2, [reward_fn, reward_fn]) == pytest.approx(policy_flops + 2 * classifier)
    shaped = replace(cfg, shaping_every=5)  # texts of 4, 9 and 14 tokens
    for rewards in ([reward_fn, None], [reward_fn, len]):
        expected = policy_flops + classifier * (1 + (4 + 9 + 14) / 16)
        assert ppo_flops(shaped, policy.gpt2, rewards) == pytest.approx(expected)
    assert ppo_flops(shaped, policy.gpt2, [len, reward_fn]) == pytest.approx(policy_flops + classifier)
    rloo = replace(shaped, advantage="rloo")
    assert ppo_flops(rloo, policy.gpt2, [reward_fn, None]) == pytest.approx(policy_flops + classifier)


def test_the_flops_of_a_classifier_are_those_that_pytorch_counts(bert_folder):
    """Its head, which reads a single token, is counted for all: little in a large model."""
    model = load_reward(PPOConfig(reward=str(bert_folder)), CPU).model
    ids = torch.ones(4, 8, dtype=torch.long)
    assert classifier_flops(model, 32) == pytest.approx(counted(model, ids), rel=0.15)


def test_a_classifier_reads_a_token_per_4_characters_and_at_most_max_length_per_text():
    assert tokens_of(["x" * 40] * 100 + ["x" * 1600] * 10, RewardConfig(max_length=256)) == 1000 + 2560


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (147_600, "41 h"),
        (1e6, "12 days"),
    ],
)
def test_a_duration_is_in_the_unit_that_leaves_two_or_three_digits(seconds, text):
    assert duration(seconds) == text


def test_the_time_is_that_of_the_flops_at_a_share_of_the_peak(gigaflops, capsys, monkeypatch):
    cfg = PPOConfig()
    assert time_on_cpu(1.1e12, cfg, CPU) == {"time": "about 33 min on this CPU"}
    assert time_on_cpu(1.1e12, cfg, GPU) == {}
    assert not capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")  # two processes
    assert time_on_cpu(1.1e12, cfg, CPU) == {"time": "about 17 min on this CPU"}


def test_a_run_over_an_hour_prints_a_warning_that_names_the_preset_for_a_cpu(gigaflops, capsys):
    warning = "warning: this run takes about 41 h on this CPU"
    time_on_cpu(81.4e12, PPOConfig(), CPU)
    assert capsys.readouterr().err == f"{warning}; --preset mini is made for a CPU\n"
    time_on_cpu(81.4e12, PPOConfig(preset="mini"), CPU)
    assert capsys.readouterr().err == f"{warning}\n"
    time_on_cpu(1.98e12, PPOConfig(), CPU)  # 3,600 s
    assert not capsys.readouterr().err
    time_on_cpu(1.9801e12, PPOConfig(), CPU)
    assert capsys.readouterr().err


def test_the_table_of_a_run_has_its_time_only_on_a_cpu(gigaflops):
    ppo, finetune = PPOConfig(micro_batch_size=1), FinetuneConfig(eval_every=10)
    policy = Policy(GPT2(SHAPE))
    for device in (CPU, GPU):
        assert ("on this CPU" in ppo_sheet(ppo, policy, len, None, 10, device)) == (device == CPU)
        assert ("on this CPU" in finetune_sheet(finetune, policy.gpt2, None, 20, 1, 1, 1, 1, device)) == (device == CPU)


def test_the_rows_of_the_table_of_fine_tuning(gigaflops):
    text = finetune_sheet(FinetuneConfig(lr=1.0), GPT2(SHAPE), None, 20, 1000, 2, 3, 4, GPU)
    names = [line.split("  ")[1] for line in text.splitlines()[1:]]
    assert names == ["parameters", "reviews", "tokens", "optimizer steps", "teacher", "device", "output"]
    assert "1,000 for training, 3 for validation" in text and "fp32" in text


def test_a_step_of_fine_tuning_takes_three_forward_passes_and_an_evaluation_one(gigaflops, monkeypatch):
    estimated = []
    monkeypatch.setattr(log, "time_on_cpu", lambda flops, *args: estimated.append(flops) or {})
    cfg, gpt2 = FinetuneConfig(eval_every=10, batch_size=4, block_size=8), GPT2(SHAPE)
    for steps, evaluations in ((20, 4), (21, 5)):  # at steps 0, 10, 20, at the last one, and of the stored weights
        finetune_sheet(cfg, gpt2, None, steps, 1, 1, 1, 100, CPU)
        tokens = 3 * steps * 4 * 8 + evaluations * 100
        assert estimated.pop() == gpt2.flops(tokens, tokens)
        finetune_sheet(cfg, gpt2, gpt2, steps, 1, 1, 1, 100, CPU)  # with a teacher of the same size
        tokens += steps * 4 * 8
        assert estimated.pop() == gpt2.flops(tokens, tokens)
