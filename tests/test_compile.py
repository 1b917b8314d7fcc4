"""--compile, as far as a CPU without a compiler can test it: the number of graphs, and which passes share a graph."""

import copy
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import reviews_csv
from torch._dynamo.utils import counters

import finetune_gpt2
from config import FinetuneConfig, PPOConfig
from model import GPT2, GPT2Config, Policy, compile_passes
from ppo import rollout, update
from runtime.device import random_generator
from runtime.monitor import rollout_metrics
from runtime.optimizer import Stepper

SHAPE = GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2)
CFG = PPOConfig(batch_size=8, minibatch_size=4, micro_batch_size=2, ppo_epochs=2, compile=True)


@pytest.fixture
def compiler():
    """torch.compile, without the graphs that other tests have compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield torch.compile
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch, compiler):
    """A list with an entry per compiled graph: whether gradients are enabled. The graphs run without a compiler.

    The results of each graph are multiplied by another factor, so that two graphs of one function round differently.
    """
    compiled = []

    def backend(graph, inputs):
        compiled.append(torch.is_grad_enabled())
        factor = 1 + len(compiled) / 1000
        return lambda *args: [x * factor if x.is_floating_point() else x for x in graph(*args)]

    monkeypatch.setattr(torch, "compile", lambda function, mode=None, **how: compiler(function, backend=backend, **how))
    return compiled


class IdTokenizer:
    """A tokenizer whose texts are the ids; 0 is the end-of-text token."""

    eos_token_id = 0

    def batch_decode(self, sequences, **how):
        return [" ".join(map(str, ids)) for ids in sequences.tolist()]


def count_sevens(texts):
    return torch.tensor([float(text.count("7")) for text in texts])


def train(rollouts, seed=0):
    """Run compiled PPO steps with prompts of 2 to 8 tokens and responses of up to 16; return their first log-ratios."""
    torch.manual_seed(seed)
    policy, rng, log_ratios = Policy(GPT2(SHAPE).init_weights()), np.random.default_rng(seed), []
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    compile_passes(policy, ref_policy, True)
    stepper = Stepper(policy, [torch.optim.SGD(policy.parameters(), 0.01)], 1.0)
    for step in range(rollouts):
        prompt_len, response_len = int(rng.integers(2, 9)), int(rng.integers(2, 17))
        cfg = replace(CFG, response_len=response_len, temperature=(1.0, 0.7)[step % 2])
        prompts = torch.from_numpy(rng.integers(1, 50, (cfg.batch_size, prompt_len)))
        generator = random_generator("cpu", seed, step)
        batch = rollout(policy, ref_policy, IdTokenizer(), count_sevens, prompts, 0.1, cfg, generator)
        rollout_metrics(batch, policy, ref_policy, 0.0, cfg)
        metrics = update(policy, stepper, batch, cfg, random_generator("cpu", step))
        log_ratios.append(metrics["first_max_log_ratio"])
    return log_ratios


def test_two_graphs_are_enough_for_all_lengths_of_prompts_and_responses(graphs):
    """One each for the policy and the reference, in 30 rollouts with updates and metrics.

    After 8 graphs of a function, torch runs it eagerly; after a graph break, the rest of the function.
    """
    train(rollouts=30)
    assert len(graphs) == 2 and not counters["graph_break"]


def test_the_first_ratio_is_1_when_every_graph_rounds_differently(graphs):
    """A rollout without gradients, or on a view of the sequences, would use a different graph from the update."""
    assert max(train(rollouts=4)) < 1e-6


def test_a_compiled_rollout_keeps_the_autograd_graph_of_one_micro_batch_at_a_time():
    policy, ref_policy = (Policy(GPT2(SHAPE).init_weights()) for _ in range(2))
    outputs, alive = [], []

    def count(module, args, output):
        alive.append(sum(output() is not None for output in outputs))
        outputs.append(weakref.ref(output[0]))

    policy.register_forward_hook(count)
    prompts, generator = torch.ones(8, 4, dtype=torch.long), random_generator("cpu", 0)
    rollout(policy, ref_policy, IdTokenizer(), count_sevens, prompts, 0.1, CFG, generator)
    assert max(alive) <= 1


def test_three_graphs_are_enough_for_training_and_validation(graphs, gpt2_folder, tmp_path):
    """The last block of the validation stream is shorter than the others, and the last step has fewer blocks."""
    cfg = FinetuneConfig(
        dataset=str(reviews_csv(tmp_path / "reviews.csv")),
        init_from=str(gpt2_folder),
        out=str(tmp_path / "out"),
        block_size=16,
        batch_size=8,
        micro_batch_size=4,
        epochs=0.1,
        eval_every=4,
        eval_tokens=330,
        warmup_steps=1,
        compile=True,
        report_to="none",
        device="cpu",
    )
    finetune_gpt2.main(cfg)
    assert len(graphs) == 3 and not counters["graph_break"]  # training, validation, validation of a batch of one
