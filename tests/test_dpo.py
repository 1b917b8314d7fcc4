"""Test dpo.py: the losses against formulas written by hand, update and main with tiny policies, and known optima."""

import copy
import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import message, reviews_csv
from test_ppo import EOS, VOCAB, FakeTokenizer, close, count_sevens, float64, sgd, tiny_policy  # noqa: F401

import dpo
from analysis.plot import DPO_PANELS, curves
from config import DPOConfig, EvaluateConfig
from dpo import dpo_loss, response_logprobs, rollout, update, weighted_loss
from evaluate import main as evaluate
from runtime.checkpoint import latest_checkpoint
from runtime.cli import evaluation
from runtime.hub import load_policy, open_gpt2
from runtime.log import read_lines
from runtime.optimizer import Stepper

SMALL = dict(
    batch_size=8, minibatch_size=8, micro_batch_size=2, samples_per_prompt=2, response_len=6, min_prompt_len=3,
    max_prompt_len=3,
)  # fmt: skip
methods = pytest.mark.parametrize("method", ["dpo", "weighted"])


def config(**changes):
    return DPOConfig(**(SMALL | changes))


def random_losses(k, prompts=2):
    """Return logprobs with gradient, ref_logprobs and scores of k responses to each prompt, and a config."""
    generator = torch.Generator().manual_seed(3)
    logprobs, ref_logprobs, scores = (3 * torch.randn(k * prompts, generator=generator) for _ in range(3))
    cfg = config(samples_per_prompt=k, batch_size=k, minibatch_size=k, micro_batch_size=k, beta=0.3)
    return logprobs.requires_grad_(), ref_logprobs, scores, cfg


def pairs_of(scores, k):
    """Return (preferred row, other row) for all pairs of responses to the same prompt."""
    pairs = (pair for first in range(0, len(scores), k) for pair in combinations(range(first, first + k), 2))
    return [pair if scores[pair[0]] > scores[pair[1]] else pair[::-1] for pair in pairs]


# ---- losses


@pytest.mark.parametrize("k", [2, 4])
def test_dpo_loss_and_gradient_are_those_of_the_paper_for_each_pair(k):
    """Eq. 7, and its gradient in section 4: beta sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l))."""
    logprobs, ref_logprobs, scores, cfg = random_losses(k)
    loss, metrics = dpo_loss(logprobs, ref_logprobs, scores, cfg)
    loss.backward()
    pairs, total, right, margins = pairs_of(scores.tolist(), k), 0.0, 0, 0.0
    gradient = [0.0] * len(scores)
    assert len(pairs) == k * (k - 1)  # of both prompts together
    for w, l in pairs:  # noqa: E741 - as in the paper
        ratio_w, ratio_l = (float(logprobs.detach()[i] - ref_logprobs[i]) for i in (w, l))
        margin = 0.3 * (ratio_w - ratio_l)
        total += -math.log(1 / (1 + math.exp(-margin))) / len(pairs)
        right, margins = right + (margin > 0), margins + margin
        gradient[w] -= 0.3 / (1 + math.exp(margin)) / len(pairs)
        gradient[l] += 0.3 / (1 + math.exp(margin)) / len(pairs)
    assert close(loss, total) and close(logprobs.grad, gradient)
    assert close(metrics["accuracy"], right / len(pairs)) and close(metrics["margin"], margins / len(pairs))
    assert k == 2 or right != len(pairs) / 2  # otherwise the accuracy of the opposite order would be the same
    assert metrics["tie_frac"] == 0 and metrics["loss"] == loss and not metrics["loss"].requires_grad


def test_dpo_loss_at_the_start_is_log_2():
    """Policy and reference are equal then."""
    _, ref_logprobs, scores, cfg = random_losses(4)
    assert close(dpo_loss(ref_logprobs.clone(), ref_logprobs, scores, cfg)[0], math.log(2))


def test_a_pair_of_equal_scores_has_no_loss_and_no_gradient():
    """Of the three pairs of the first prompt, two have a preference; of the second, none."""
    logprobs, ref_logprobs, _, cfg = random_losses(3)
    loss, metrics = dpo_loss(logprobs, ref_logprobs, torch.tensor([1.0, 0, 0, 5, 5, 5]), cfg)
    loss.backward()
    rewards = 0.3 * (logprobs - ref_logprobs).detach()
    slopes = [0.3 * float(torch.sigmoid(rewards[i] - rewards[0])) / 6 for i in (1, 2)]
    assert close(logprobs.grad, [-sum(slopes), *slopes, 0, 0, 0])
    assert close(loss, sum(math.log1p(math.exp(rewards[i] - rewards[0])) for i in (1, 2)) / 6)
    assert close(metrics["tie_frac"], 4 / 6)


def test_with_labels_of_bradley_terry_the_gradient_of_dpo_is_0_at_the_policy_pi_star():
    """pi* has log-ratios of score / beta plus a constant. This fixes the meaning of beta, and the sign of the loss."""
    cfg, scores = config(beta=0.7), torch.tensor([1.3, 0.4])
    logprobs = (scores / 0.7 + 5).requires_grad_()
    p = torch.sigmoid(scores[0] - scores[1])  # that the first response is labelled as the better one
    losses = [dpo_loss(logprobs, torch.zeros(2), torch.tensor(labels), cfg)[0] for labels in ([1.0, 0], [0, 1.0])]
    (p * losses[0] + (1 - p) * losses[1]).backward()
    assert close(logprobs.grad, [0, 0])


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_weighted_loss_has_the_weights_of_pi_star_within_each_prompt(beta):
    """The gradient of the log-probability of a response is its weight, exp(score / beta) over the sum of its prompt."""
    logprobs, _, scores, cfg = random_losses(4)
    loss, metrics = weighted_loss(logprobs, scores, replace(cfg, beta=beta))
    loss.backward()
    weights = []
    for group in scores.view(2, 4).tolist():
        exps = [math.exp(score / beta) for score in group]
        weights.append([e / sum(exps) for e in exps])
    assert close(logprobs.grad, [-w / 2 for group in weights for w in group])
    assert close(loss, -sum(w * x for w, x in zip(sum(weights, []), logprobs.tolist())) / 2)
    assert close(metrics["effective_samples"], sum(1 / sum(w * w for w in group) for group in weights) / 2)


def test_equal_scores_have_equal_weights():
    logprobs, _, _, cfg = random_losses(4)
    loss, metrics = weighted_loss(logprobs, torch.full((8,), 900.0), cfg)  # e^(900 / beta) is inf
    assert close(loss, -logprobs.detach().mean()) and close(metrics["effective_samples"], 4)


# ---- rollout and update


def prompts_of(cfg):
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(1, VOCAB, (cfg.batch_size // cfg.samples_per_prompt, 3), generator=generator)
    return prompts.repeat_interleave(cfg.samples_per_prompt, 0)


def tiny_rollout(cfg, reward=count_sevens):
    return rollout(tiny_policy(1), FakeTokenizer(), reward, prompts_of(cfg), cfg, torch.Generator().manual_seed(1))


def test_a_rollout_has_the_samples_of_the_model_it_is_given_and_their_scores():
    cfg = config(temperature=0.5)
    sequences, mask, scores = tiny_rollout(cfg)
    expected = tiny_policy(1).gpt2.generate(prompts_of(cfg), 6, 0.5, EOS, torch.Generator().manual_seed(1))
    assert torch.equal(sequences, expected) and sequences.shape == (8, 9) and mask.shape == (8, 6)
    assert scores.tolist() == [float(row.count(7)) for row in sequences.tolist()]  # of the prompt too


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_response_has_the_log_probability_of_its_tokens_up_to_and_including_the_end(temperature):
    """What follows <|endoftext|> does not count, whatever its log-probability is."""
    policy, cfg = tiny_policy(0), config(temperature=temperature)
    sequences = torch.tensor(
        [[3, 4, 5, EOS, EOS, EOS], [3, 4, 5, 6, EOS, EOS], [3, 4, 5, 6, 7, 8], [3, 4, EOS, 6, 7, 8]]
    )
    lengths, table = [2, 3, 4, 1], policy.gpt2(sequences).div(temperature).log_softmax(-1)
    mask = dpo.response_mask(sequences[:, 2:], EOS)
    expected = [sum(table[i, t - 1, sequences[i, t]] for t in range(2, 2 + n)) for i, n in enumerate(lengths)]
    assert close(response_logprobs(policy, sequences, mask, cfg), torch.stack(expected), 1e-10)
    assert mask.sum(1).tolist() == lengths


def test_the_mask_of_a_rollout_keeps_the_first_end_of_text_and_nothing_after_it():
    cfg = config(batch_size=64, minibatch_size=64)
    sequences, mask, _ = tiny_rollout(cfg)
    lengths = [row.index(EOS) + 1 if EOS in row else 6 for row in sequences[:, 3:].tolist()]
    assert mask.tolist() == [[t < n for t in range(6)] for n in lengths] and 1 <= min(lengths) < max(lengths) == 6


def parameters(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@methods
def test_an_update_is_a_step_down_the_gradient_of_the_loss_whatever_the_micro_batch_size(method):
    """The whole rollout as one minibatch, against one loss over all of its rows. Policy and reference differ."""
    cfg = config(method=method, beta=0.5)
    sequences, mask, scores = batch = tiny_rollout(cfg, lambda texts: torch.arange(len(texts)) % 5 * 1.0)
    policy, ref_policy, before = tiny_policy(0), tiny_policy(1), parameters(tiny_policy(0))
    logprobs, ref_logprobs = (response_logprobs(p, sequences, mask, cfg) for p in (policy, ref_policy))
    arguments = (logprobs, ref_logprobs.detach()) if method == "dpo" else (logprobs,)
    loss, _ = {"dpo": dpo_loss, "weighted": weighted_loss}[method](*arguments, scores, cfg)
    loss.backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.parameters()])
    for size in (2, 4, 8):
        policy = tiny_policy(0)
        metrics = update(policy, ref_policy, sgd(policy), batch, replace(cfg, micro_batch_size=size))
        assert close(parameters(policy), before - 0.1 * gradient)
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-12)
        assert metrics["grad_norm"] == pytest.approx(float(gradient.norm()), abs=1e-9)
    assert gradient.norm() > 0.1


def test_each_epoch_has_every_response_once_beside_the_others_to_its_prompt_in_a_new_order(monkeypatch):
    """With the rows of several prompts mixed, pairs would compare responses to different prompts."""
    cfg, calls = config(method="weighted", batch_size=32, minibatch_size=8, micro_batch_size=4, epochs=3), []
    batch = tiny_rollout(cfg, lambda texts: torch.arange(len(texts)) * 1.0)
    loss = dpo.weighted_loss
    monkeypatch.setattr(dpo, "weighted_loss", lambda x, scores, c: calls.append(scores.tolist()) or loss(x, scores, c))
    policy = tiny_policy(0)
    stepper = sgd(policy, lr=0)
    steps = []
    monkeypatch.setattr(stepper, "step", lambda: steps.append(len(calls)) or 0.0)
    update(policy, policy, stepper, batch, cfg, torch.Generator().manual_seed(0))
    rows = torch.tensor(calls).view(3, 32)
    assert steps == list(range(2, 25, 2))  # 3 epochs of 4 minibatches of 2 micro-batches
    assert all(epoch.sort()[0].tolist() == list(range(32)) for epoch in rows)
    assert all(a % 2 == 0 and b == a + 1 for a, b in rows.view(-1, 2).tolist())
    assert len({tuple(epoch.tolist()) for epoch in rows}) == 3


# ---- a problem with a known optimum: 5 responses of one token

SCORES = torch.tensor([0.0, 0.3, 1.0, 0.6, 0.1])


def learn(**changes):
    """Train by the loop of main; return the probabilities of the reference and of the policy after it, and pi*."""
    torch.set_default_dtype(torch.float32)
    changes |= dict(minibatch_size=256, micro_batch_size=256, response_len=1, min_prompt_len=1, max_prompt_len=1)
    cfg = DPOConfig(**dict(batch_size=1024, steps=60, lr=3e-3, beta=0.5) | changes)
    policy = tiny_policy(0, vocab_size=5, std=0.05)
    ref_policy, generator = copy.deepcopy(policy), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), cfg.lr, eps=cfg.adam_eps)
    stepper, prompts = Stepper(policy, [optimizer], cfg.grad_clip), torch.ones(cfg.batch_size, 1, dtype=torch.long)

    def reward(texts):
        return SCORES[[int((text.split()[1:] or ["0"])[0]) for text in texts]]

    for step in range(cfg.steps):
        stepper.set_lr(1 - step / cfg.steps)
        batch = rollout(ref_policy, FakeTokenizer(), reward, prompts, cfg, generator)
        update(policy, ref_policy, stepper, batch, cfg, generator)
    probs = [p.gpt2(torch.ones(1, 1, dtype=torch.long))[0, 0].softmax(-1).detach() for p in (ref_policy, policy)]
    return *probs, (probs[0].log() + SCORES / cfg.beta).softmax(-1)


@pytest.mark.parametrize("beta", [0.5, 0.25])
def test_weighted_fine_tuning_converges_to_the_optimum_of_the_objective_of_ppo(beta):
    """pi* = rho exp(score / beta) / Z, to 0.02 for each of 5 tokens with 64 responses per prompt.

    With 2 responses per prompt the weights are biased, and the policy stays closer to the reference, as documented.
    """
    ref_probs, probs, optimum = learn(method="weighted", samples_per_prompt=64, beta=beta)
    assert (optimum - ref_probs).abs().max() > 0.2 and (probs - optimum).abs().max() < 0.02
    few = learn(method="weighted", samples_per_prompt=2, beta=beta)[1]
    assert ref_probs[2] + 0.05 < few[2] < optimum[2] - 0.05


def test_dpo_moves_the_policy_towards_the_optimum_and_in_the_order_of_the_scores():
    """KL(pi* || pi) falls to a quarter. The optimum of DPO is elsewhere: its labels are not random."""
    ref_probs, probs, optimum = learn(samples_per_prompt=4, steps=15, lr=1e-3)
    before, after = ((optimum * (optimum / p).log()).sum() for p in (ref_probs, probs))
    assert before > 0.1 and after < before / 4
    assert (probs / ref_probs).argsort().tolist() == SCORES.argsort().tolist()


# ---- main


@pytest.fixture
def cfg(tmp_path, gpt2_folder):
    torch.set_default_dtype(torch.float32)
    reviews = reviews_csv(tmp_path / "reviews.csv")
    (tmp_path / "rewards.py").write_text(
        "def e(texts):\n    return [sum(map(ord, text)) % 97 / 20 for text in texts]\n"
    )
    return DPOConfig(
        dataset=str(reviews), policy=str(gpt2_folder), reward=f"{tmp_path}/rewards.py:e", out=str(tmp_path / "out"),
        steps=4, batch_size=8, minibatch_size=4, micro_batch_size=2, samples_per_prompt=2, response_len=6,
        max_prompt_len=4, lr=1e-3, save_every=1, save_share=1.0, sample_every=2, sample_prompts=2, report_to="none",
        device="cpu", self_check=False, seed=7,
    )  # fmt: skip


def weights(folder):
    return dict(load_policy(*open_gpt2(folder)).state_dict())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines_of(cfg):
    """Return the lines of the log without their times."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(Path(cfg.out, "log.jsonl"))]


class Killed(Exception):
    """Stands for kill -9."""


@methods
def test_a_run_killed_and_resumed_equals_an_uninterrupted_one(cfg, method, monkeypatch, tmp_path):
    """Log and weights are bitwise equal. Catches moments, learning rate, prompts or samples of another step."""
    cfg = replace(cfg, method=method)
    whole = replace(cfg, out=str(tmp_path / "whole"))
    dpo.main(whole)
    calls, original = [], dpo.update

    def update_or_die(*args):
        calls.append(args)
        if len(calls) == 4:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dpo, "update", update_or_die)
        with pytest.raises(Killed):
            dpo.main(cfg)
    assert latest_checkpoint(cfg.out).name == "00000003"
    dpo.main(replace(cfg, resume=True))
    assert lines_of(cfg) == lines_of(whole) and len(lines_of(cfg)) == 4
    assert equal(weights(cfg.out), weights(whole.out)) and not equal(weights(cfg.out), weights(cfg.policy))


@methods
def test_the_reference_samples_and_the_policy_does_not(cfg, method, monkeypatch):
    """In each step the sampler has the initial weights, and the policy has changed since the last one."""
    samplers, trained, original = [], [], dpo.rollout
    original_update = dpo.update
    state = lambda policy: {name: tensor.clone() for name, tensor in policy.state_dict().items()}  # noqa: E731
    monkeypatch.setattr(dpo, "rollout", lambda *args: samplers.append(state(args[0])) or original(*args))
    monkeypatch.setattr(dpo, "update", lambda *args: trained.append(state(args[0])) or original_update(*args))
    dpo.main(replace(cfg, method=method, sample_prompts=0))
    start = weights(cfg.policy)
    assert len(samplers) == 4 and all(equal(sampler, start) for sampler in samplers)
    assert equal(trained[0], start) and not any(equal(a, b) for a, b in zip(trained, trained[1:]))


def test_each_prompt_has_k_responses_and_rollouts_have_prompts_and_seeds_of_their_own(cfg, monkeypatch):
    batches, original = [], dpo.rollout
    monkeypatch.setattr(dpo, "rollout", lambda *args: batches.append((args[3], args[5])) or original(*args))
    dpo.main(replace(cfg, samples_per_prompt=4, micro_batch_size=4, min_prompt_len=12, max_prompt_len=12))
    for prompts, _ in batches:
        assert len(prompts) == 8 and all((prompts[i : i + 4] == prompts[i]).all() for i in (0, 4))
        assert not torch.equal(prompts[0], prompts[4])
    assert len({str(prompts.tolist()) for prompts, _ in batches}) == 4
    assert len({generator.initial_seed() for _, generator in batches}) == 4


@methods
def test_the_log_has_the_metrics_of_the_method_and_the_samples_of_the_policy(cfg, method, capsys, tmp_path):
    """The first loss of dpo is log 2 times the share of pairs with different scores; many are equal here."""
    (tmp_path / "rewards.py").write_text("def e(texts):\n    return [float('e' in text[30:]) for text in texts]\n")
    dpo.main(replace(cfg, method=method, lr_end=0.5, minibatch_size=8))
    log, output = lines_of(cfg), capsys.readouterr().out
    own = {"dpo": {"accuracy", "margin", "tie_frac"}, "weighted": {"effective_samples"}}[method]
    assert all(line.keys() == {"step", "loss", "grad_norm", "skipped_steps", "lr"} | own for line in log)
    assert [line["lr"] for line in log] == pytest.approx([1e-3 * (1 - step / 8) for step in range(4)])
    if method == "dpo":
        assert log[0]["loss"] == pytest.approx(math.log(2) * (1 - log[0]["tie_frac"]), abs=1e-6)
    samples = read_lines(Path(cfg.out, "samples.jsonl"))
    assert [line["step"] for line in samples] == [0, 2, 3]
    assert f"step 0 | loss {log[0]['loss']:.3f} | " in output
    assert f"the policy is in {cfg.out}: {evaluation(cfg)} evaluates it" in output


@methods
def test_a_run_ends_with_a_folder_that_evaluate_accepts(cfg, method, judge_folder, capsys):
    """The card says how it was trained, no token has a value or advantage, and the curves are those of the method."""
    cfg = replace(cfg, method=method, seed=11)
    dpo.main(cfg)
    common = dict(dataset=cfg.dataset, reward=cfg.reward, judge=str(judge_folder), device="cpu", self_check=False)
    evaluate(
        EvaluateConfig(
            before=cfg.policy,
            after=cfg.out,
            prompts=8,
            batch_size=8,
            samples=2,
            viewer_samples=4,
            resamples=20,
            response_len=6,
            max_prompt_len=4,
            **common,
        )  # fmt: skip
    )
    card = Path(cfg.out, "README.md").read_text()
    intro = {"dpo": "direct preference optimization (Rafailov", "weighted": "weighted by a reward (Peng"}[method]
    assert intro in card and "trained with PPO" not in card and "python dpo.py --preset gpt2 " in card
    assert "32, sampled from the reference: 4 rollouts of 2 responses to each of 4 prompts" in card
    assert "number 4 after" in card and f"--method {method}" in card or method == "dpo"
    page = json.loads(Path(cfg.out, "viewer.json").read_text())
    assert "kl_coef" not in page and page["samples"][0]["after"].keys().isdisjoint({"value", "advantage"})
    axes = curves(cfg.out).axes
    assert [len(axis.lines) for axis in axes] == [1, 1] and axes[0].get_title(loc="left") == DPO_PANELS[0][1]
    assert len(axes[1].lines[0].get_xdata()) == 4 and Path(cfg.out, "report.html").is_file()


def test_a_policy_of_an_unfinished_run_is_refused_with_the_command_that_finishes_it(cfg, monkeypatch):
    monkeypatch.setattr(dpo, "save_gpt2", lambda *args: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        dpo.main(cfg)
    text = message(evaluate, EvaluateConfig(before=cfg.policy, after=cfg.out, judge="x"))
    assert text.endswith("contains an unfinished run: python dpo.py --resume finishes it")
    assert "unfinished run: --resume" in message(dpo.main, cfg)


def test_a_finished_run_is_not_replaced_without_force(cfg):
    dpo.main(replace(cfg, steps=1))
    assert "a finished run: --force replaces it" in message(dpo.main, replace(cfg, steps=1))


def test_a_rollout_whose_score_is_not_finite_is_skipped_and_logged(cfg, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "calls = []\n\n\ndef e(texts):\n    calls.append(0)\n    bad = len(texts) == 8 and len(calls) < 2\n"
        "    return [float('nan') if bad else float(text.count('e')) for text in texts]\n"
    )
    dpo.main(replace(cfg, sample_prompts=0))
    log = lines_of(cfg)
    assert log[0] == {"step": 0, "skipped_steps": 1} and [line["skipped_steps"] for line in log] == [1] * 4
    assert all("loss" in line for line in log[1:])


def test_a_run_whose_reward_fails_is_saved_before_the_failed_step(cfg, tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(
        "calls = []\n\n\ndef e(texts):\n    calls.append(0)\n    assert len(calls) < 3, 'down'\n"
        "    return [float(text.count('e')) for text in texts]\n"
    )
    text = message(dpo.main, replace(cfg, sample_prompts=0, save_every=9))
    assert "down" in text and "The run is saved: --resume resumes it at step 2" in text
    assert latest_checkpoint(cfg.out).name == "00000002"


def test_a_resumed_run_refuses_another_reward_policy_or_prompts(cfg, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "save_gpt2", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            dpo.main(cfg)
    inputs = json.loads((latest_checkpoint(cfg.out) / "state.json").read_text())["inputs"]
    assert inputs.keys() == {"prompts", "policy", "reward"} and all(inputs.values())
    (tmp_path / "rewards.py").write_text("def e(texts):\n    return [0.0 for text in texts]\n")
    assert "was made with different inputs: reward" in message(dpo.main, replace(cfg, resume=True))


def test_the_micro_batch_size_that_fits_is_a_number_of_whole_prompts(cfg, monkeypatch):
    """Also if not even the responses to one prompt fit."""
    sizes, original = [], dpo.update
    monkeypatch.setattr(dpo, "update", lambda *args: sizes.append(args[4].micro_batch_size) or original(*args))
    for fit, expected in ((0, 4), (1, 4), (2, 8)):
        monkeypatch.setattr("runtime.device.rows_that_fit", lambda *args, fit=fit: fit)
        small = dict(samples_per_prompt=4, minibatch_size=8, micro_batch_size=0, steps=1, force=True)
        dpo.main(replace(cfg, **small))
        assert sizes.pop() == expected
