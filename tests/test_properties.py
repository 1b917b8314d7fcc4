"""Padding, order and batch split change no result, whatever episodes, texts and sizes hypothesis comes up with.

Every property is tried on the same examples each time; a failure is reduced to the smallest one.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXTS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_ppo import TABLES, VOCAB, close, config, moved_policy, sgd, parameters, tiny_policy

from config import FinetuneConfig, PPOConfig
from data import EOS, block_order, encode, pack, prompt_batch, train_bpe
from finetune_gpt2 import blocks, plan
from ppo import Rollout, gae, response_mask, token_rewards, update, whiten
from runtime.monitor import rollout_metrics

many = settings(derandomize=True, deadline=None, max_examples=60)
few = settings(many, max_examples=12)  # each example takes optimizer steps
shares = st.floats(0, 1)


@pytest.fixture(scope="module", autouse=True)
def float64(tmp_path_factory):
    """float64, and a folder of its own for the cache of data.pack: per module, since hypothesis calls a test often."""
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("properties"))
        yield
    torch.set_default_dtype(torch.float32)


def ends(lengths, width):
    """The mask of responses of these lengths: (B, width)."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


@st.composite
def episodes(draw):
    """(mask, kl, values, scores) of up to 5 responses of up to 6 tokens, with garbage behind their ends."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    width = max(lengths) + draw(st.integers(0, 2))

    def numbers(*shape):
        n = int(np.prod(shape))
        return torch.tensor(draw(st.lists(st.floats(-9, 9), min_size=n, max_size=n))).reshape(shape)

    B = len(lengths)
    return ends(lengths, width), numbers(B, width), numbers(B, width), numbers(B)


# ---- the arithmetic


@many
@given(st.integers(1, 8).flatmap(lambda T: st.lists(st.lists(st.integers(0, 3), min_size=T, max_size=T), min_size=1)))
def test_a_mask_keeps_the_tokens_up_to_the_first_eos_or_all_of_them(responses):
    lengths = [min((response + [3]).index(3) + 1, len(response)) for response in responses]
    assert torch.equal(response_mask(torch.tensor(responses), 3), ends(lengths, len(responses[0])))


@many
@given(episodes(), shares, shares, shares)
def test_an_episode_has_the_same_rewards_advantages_and_returns_alone_and_in_any_batch(episode, kl_coef, gamma, lam):
    """To the bit, so padding, its garbage, the order and the number of the episodes count for nothing."""

    def results(mask, kl, values, scores):
        rewards = token_rewards(scores, kl, mask, kl_coef)
        return torch.stack([rewards, *gae(rewards, values, mask, gamma, lam)])  # (3, B, T)

    mask, kl, values, scores = episode
    together = results(*episode)
    assert not together[:, ~mask].any()
    for i, length in enumerate(mask.sum(1).tolist()):
        one, own = slice(i, i + 1), slice(length)
        alone = results(mask[one, own], kl[one, own], values[one, own], scores[one])
        assert torch.equal(together[:, one, own], alone)


@many
@given(episodes(), shares)
def test_the_rewards_of_any_response_sum_to_its_score_minus_beta_kl(episode, kl_coef):
    mask, kl, _, scores = episode
    assert close(token_rewards(scores, kl, mask, kl_coef).sum(1), scores - kl_coef * (kl * mask).sum(1))


@many
@given(episodes(), shares, shares)
def test_gae_is_the_discounted_sum_of_future_td_errors(episode, gamma, lam):
    """Eq. 16 as it is written, a double sum; with lambda 1 it telescopes to the rewards to come less the value."""
    mask, rewards, values, _ = episode
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    monte_carlo, _ = gae(rewards, values, mask, gamma, 1.0)
    for i, length in enumerate(mask.sum(1).tolist()):
        r, v = rewards[i, :length], torch.cat([values[i, :length], torch.zeros(1)])
        deltas = r + gamma * v[1:] - v[:-1]
        for t in range(length):
            steps = torch.arange(length - t)
            assert close(advantages[i, t], ((gamma * lam) ** steps * deltas[t:]).sum(), 1e-9)
            assert close(returns[i, t], advantages[i, t] + v[t], 1e-9)
            assert close(monte_carlo[i, t], (gamma**steps * r[t:]).sum() - v[t], 1e-9)


@many
@given(st.lists(st.tuples(st.floats(-9, 9), st.booleans()), min_size=12, max_size=12), st.booleans())
def test_whitened_values_have_variance_1_and_mean_0_or_their_original_mean(numbers, shift_mean):
    """All rows together, under any mask, holes in it too, wherever two of the numbers differ."""
    x, mask = (torch.tensor(column).reshape(3, 4) for column in zip(*numbers))
    assume(mask.sum() > 1 and x[mask].std() > 1e-3)
    whitened = whiten(x, mask, shift_mean)
    assert close(whitened[mask].mean(), 0 if shift_mean else x[mask].mean(), 1e-9)
    assert close(whitened[mask].var(), 1, 1e-4)  # 1e-8 in the denominator is 1e-5 of the smallest spread here
    assert not whitened[~mask].any()


@many
@given(st.data(), episodes(), st.integers(1, 4), st.floats(-1e9, 1e9))
def test_whitening_ignores_padding_and_does_not_depend_on_the_order_of_episodes(data, episode, columns, garbage):
    mask, x, _, _ = episode
    assume(mask.sum() > 1 and x[mask].std() > 1e-3)
    order = data.draw(st.permutations(range(len(x))))
    wide = torch.cat([x, torch.full((len(x), columns), garbage)], 1)
    wide_mask = torch.cat([mask, torch.zeros(len(x), columns).bool()], 1)
    for shift_mean in (True, False):
        whitened = whiten(x, mask, shift_mean)
        assert torch.equal(whiten(wide, wide_mask, shift_mean)[:, : x.shape[1]], whitened)
        assert close(whiten(x[order], mask[order], shift_mean), whitened[order], 1e-9)


@many
@given(episodes())
def test_the_arithmetic_does_not_modify_its_arguments(episode):
    """O8: `x -= mean` in whiten would turn a rollout's advantages or rewards into others under the same name."""
    mask, kl, values, scores = copies = [x.clone() for x in episode]
    whiten(kl, mask), whiten(kl, mask, shift_mean=False)
    gae(kl, values, mask, 0.9, 0.95), token_rewards(scores, kl, mask, 0.1), response_mask(mask.long(), 1)
    assert all(torch.equal(now, before) for now, before in zip(copies, episode))


# ---- texts, blocks and prompts

tricky = st.sampled_from(
    [EOS, "<|endoftext", "|>", "\x00", "\x1b[0m", "\r\n", " ", "😀", "e\u0301", "\ufeff", "\u2028"]
)
texts = st.lists(st.lists(tricky | st.text(max_size=6), max_size=4).map("".join), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 300)


@many
@given(texts)
def test_any_texts_are_recovered_from_the_packed_stream(bpe, texts):
    """Also what spells <|endoftext|>, control characters, emoji, and nothing at all."""
    stream = pack(texts, bpe)
    documents = np.split(stream, np.flatnonzero(stream == bpe.eos_token_id) + 1)
    assert len(documents.pop()) == 0
    assert [bpe.decode(ids[:-1]) for ids in documents] == texts
    assert [ids[:-1].tolist() for ids in documents] == [encode([text], bpe)[0] for text in texts]


@many
@given(st.integers(2, 60), st.integers(1, 12))
def test_the_blocks_of_any_stream_have_no_gap_or_overlap(n_tokens, block_size):
    """What is left over at the end is less than a block: every other token is an input once and a target once."""
    assume(n_tokens > block_size)
    n_blocks, *_ = plan(n_tokens, FinetuneConfig(block_size=block_size, epochs=1000))
    stream = np.random.default_rng(0).permutation(n_tokens).astype(np.int32)
    x, y = blocks(stream, np.arange(n_blocks), block_size)
    assert x.flatten().tolist() == stream[: n_blocks * block_size].tolist()
    assert y.flatten().tolist() == stream[1 : n_blocks * block_size + 1].tolist()
    assert n_tokens - 1 - n_blocks * block_size in range(block_size)


@many
@given(st.integers(1, 15), st.integers(1, 6), st.floats(0.1, 3.5), st.integers(0, 9))
def test_every_block_is_used_once_per_epoch_for_any_batch_size(n_blocks, batch_size, epochs, seed):
    """The steps that plan counts are those that hold blocks; the batch size cuts the same order into other parts."""
    total = int(epochs * n_blocks)
    assume(total)
    cfg = FinetuneConfig(block_size=4, batch_size=batch_size, micro_batch_size=1, epochs=epochs)
    assert plan(4 * n_blocks + 1, cfg) == (n_blocks, total, -(-total // batch_size))
    order = np.concatenate([block_order(s, n_blocks, batch_size, total, seed) for s in range(-(-total // batch_size))])
    assert len(order) == total
    for start in range(0, total, n_blocks):
        epoch = order[start : start + n_blocks]
        assert len(set(epoch)) == len(epoch)
    counts = np.bincount(order, minlength=n_blocks)
    assert counts.min() == total // n_blocks and counts.max() == -(-total // n_blocks)
    assert np.array_equal(order, block_order(0, n_blocks, total, total, seed))


@many
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 3), st.integers(1, 6), st.integers(0, 9))
def test_a_pass_uses_each_prompt_at_most_once_and_leaves_out_less_than_a_batch(
    prompts, batch_size, passes, shortest, seed
):
    """The lengths are drawn apart from the order: the same reviews come up when the range of lengths is another."""
    assume(batch_size <= prompts)
    cfg = PPOConfig(
        batch_size=batch_size, minibatch_size=batch_size, micro_batch_size=1, min_prompt_len=shortest, max_prompt_len=6,
        seed=seed,
    )  # fmt: skip
    pool, steps = np.arange(prompts)[:, None] * 10 + np.arange(6), prompts // batch_size
    batches = [prompt_batch(pool, passes * steps + i, cfg) for i in range(steps)]
    rows = torch.cat([batch[:, 0] for batch in batches]) // 10
    assert len(set(rows.tolist())) == steps * batch_size and prompts - steps * batch_size < batch_size
    assert all(batch.shape[0] == batch_size and shortest <= batch.shape[1] <= 6 for batch in batches)
    longest = [prompt_batch(pool, passes * steps + i, replace(cfg, min_prompt_len=6)) for i in range(steps)]
    assert torch.equal(torch.cat(longest)[:, 0] // 10, rows)


# ---- update

READ = ("sequences", *TABLES)  # of a Rollout, what update reads at real tokens


@st.composite
def rollouts(draw):
    """8 episodes of any lengths with random numbers, as if tiny_policy had sampled them."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=8, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    mask = ends(lengths, max(lengths))
    sequences = torch.randint(VOCAB, (8, 3 + mask.shape[1]), generator=generator)
    advantages, returns, kl = torch.randn(3, *mask.shape, generator=generator)
    with torch.no_grad():
        logprobs, values = tiny_policy(0, values=0.5)(sequences, 3)
    scores, ended, seconds = torch.arange(8.0), mask.sum(1) < 4, dict(generate=1.0, score=1.0, logprobs=1.0)
    return Rollout(
        sequences,
        3,
        mask,
        logprobs,
        values,
        advantages,
        returns,
        kl * mask,
        scores,
        scores,
        None,
        None,
        ended,
        ["text"] * 8,
        seconds,
    )


def widened(batch, columns):
    """The Rollout with columns of garbage behind the longest response."""

    def wide(name, fill):
        x = getattr(batch, name)
        return torch.cat([x, torch.full((8, columns), fill, dtype=x.dtype)], 1)

    return replace(batch, **{name: wide(name, 7) for name in READ}, mask=wide("mask", False), kl=wide("kl", 0))


def learned(batch, minibatch_size=8, micro_batch_size=8):
    """Two epochs on a Rollout by a policy that has moved on since: (its parameters, the metrics)."""
    policy, cfg = moved_policy(), config(minibatch_size=minibatch_size, micro_batch_size=micro_batch_size, ppo_epochs=2)
    metrics = update(policy, sgd(policy), batch, cfg, torch.Generator().manual_seed(0))
    metrics.pop("seconds_update")
    return parameters(policy), metrics


def learns_the_same(found, expected):
    assert close(found[0], expected[0], 1e-10)
    assert found[1] == pytest.approx(expected[1], abs=1e-6)  # the shares of clipped tokens are float32
    return True


@few
@given(rollouts(), st.sampled_from([(8, 4), (8, 2), (8, 1), (4, 2), (4, 1), (2, 1)]))
def test_any_split_into_micro_batches_gives_the_same_steps(batch, sizes):
    """Whatever the lengths; of 2 tokens of loss 1 and 18 of loss 0 the mean is .1, the mean of both means .5."""
    minibatch_size, micro_batch_size = sizes
    assert learns_the_same(*(learned(batch, minibatch_size, micro) for micro in (micro_batch_size, minibatch_size)))


@few
@given(rollouts(), st.permutations(range(8)))
def test_the_order_of_episodes_within_a_minibatch_changes_no_step(batch, order):
    shuffled = replace(batch, **{name: getattr(batch, name)[order] for name in (*READ, "mask")})
    assert learns_the_same(learned(shuffled), learned(batch))


@few
@given(rollouts(), st.integers(1, 6))
def test_padding_changes_no_step_and_no_metric(batch, columns):
    """L7. A mean over the table instead of the real tokens would shrink with every column."""
    wide, policy = widened(batch, columns), tiny_policy()
    assert learns_the_same(learned(wide), learned(batch))
    found, expected = (rollout_metrics(b, policy, moved_policy(), 0.0, config()) for b in (wide, batch))
    del found["peak_memory_gb"], expected["peak_memory_gb"]
    assert found == pytest.approx(expected, abs=1e-10)
