"""The source of docs/tutorial.ipynb, which `python docs/build_tutorial.py` makes from it."""

# %% [markdown]
# # PPO for a language model, one step with real numbers
#
# A tutorial of 30 minutes for those who know Python and a bit of PyTorch; no GPU is needed.
# Back to the [README](../README.md).
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{repository}/blob/main/docs/tutorial.ipynb)
#
# A small GPT-2 writes movie reviews. A BERT classifier scores them: positive reviews get a high score. PPO changes the
# GPT-2 so that the score rises, and a KL penalty keeps it close to the model that it started from.
#
# You will go through one PPO step token by token, take 20 steps, and then solve three exercises. Every number comes
# from the functions that `python ppo.py` calls, so read them beside the notebook: they are short.

# %% [markdown]
# ## 0. Setup
#
# The next cell finds the repository. If there is none, as in Colab, it clones it and installs the packages that are
# missing.

# %%
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/mini-rlhf/mini-rlhf"
here = Path.cwd()
root = next((folder for folder in (here, *here.parents) if (folder / "ppo.py").is_file()), None)
if root is None:
    root = here / REPOSITORY.rpartition("/")[2]
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, root], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", root / "requirements.txt"], check=True)
os.chdir(root)
sys.path.insert(0, str(root))

# %%
import copy
import warnings
from dataclasses import replace
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch

warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm in Jupyter without ipywidgets

import ppo
from analysis.responses import pieces
from config import PPOConfig, defaults
from data import encode, load_prompts, prompt_batch
from reward import SentimentReward
from runtime.device import pick_device, random_generator
from runtime.distributed import ONE_PROCESS
from runtime.hub import load_policy, open_gpt2
from runtime.monitor import rollout_metrics
from runtime.optimizer import Stepper

# %% [markdown]
# All constants are in `config.py`. We take preset `mini` and make it smaller: 32 responses of at most 16 tokens per
# step and 20 steps, with a higher learning rate, an adaptive KL coefficient, and values without reward shaping.

# %%
cfg = replace(
    defaults(PPOConfig, "mini"),
    device="cpu",
    dtype="fp32",
    batch_size=32,
    minibatch_size=16,
    micro_batch_size=16,
    response_len=16,
    steps=20,
    lr=4e-4,
    lr_end=0.1,
    kl_coef=0.08,
    kl_target=5.0,
    score_clip=0.0,
    shaping_every=0,
)
pick_device(cfg)
print(f"{cfg.policy = }, {cfg.reward = }")
print(f"{cfg.kl_coef = }, {cfg.gamma = }, {cfg.lam = }, {cfg.clip_eps = }, {cfg.lr = }")

# %% [markdown]
# ### The models
#
# - The **policy** is the GPT-2 that is trained. It has a second output, the value head (`model.Policy`).
# - The **reference** is a frozen copy of the policy before training.
# - The **reward** is a BERT classifier of sentiment (`reward.SentimentReward`).

# %%
folder, gpt2_config, tokenizer = open_gpt2(cfg.policy)
policy = load_policy(folder, gpt2_config, tokenizer)
ref_policy = copy.deepcopy(policy).eval().requires_grad_(False)
sentiment = SentimentReward.load(cfg.reward)
for name, model in {"policy": policy, "reward": sentiment.model}.items():
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# The next cell has two functions for display only: a table of a response with one line per token, and a picture of
# several responses.


# %%
def tokens_of(batch, row):
    """Return the text of each token of a response in the batch's mask."""
    prompt, response = batch.sequences[row].tensor_split([batch.prompt_len])
    real = ppo.response_mask(response[None], tokenizer.eos_token_id)[0]
    padding = ["(padding)"] * int(batch.mask[row].sum() - real.sum())  # there is none until exercise 3
    return pieces(tokenizer, prompt.tolist(), response[real].tolist()) + padding


def table(batch, row, **columns):
    """Print one line per token of a response, with the values of each column (B, T)."""
    print(f"{'token':>16}", *(f"{name:>10}" for name in columns))
    for t, token in enumerate(tokens_of(batch, row)):
        print(f"{token!r:>16}", *(f"{values[row, t].item():z10.3f}" for values in columns.values()))


def picture(batch, values, title, rows=4):
    """Draw the responses as rows of tokens, coloured by values (B, T): blue is positive, red is negative."""
    values = values[:rows].where(batch.mask[:rows], 0)
    limit = max(values.abs().max().item(), 1e-6)
    fig, axis = plt.subplots(figsize=(12, 0.3 + 0.42 * rows), layout="constrained")
    image = axis.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for row in range(rows):
        for t, token in enumerate(tokens_of(batch, row)):
            dark = abs(values[row, t].item()) > 0.6 * limit
            label = token.strip().replace("<|endoftext|>", "<end>")
            axis.text(t, row, label, ha="center", va="center", size=8, color="white" if dark else "black")
    axis.set(xticks=[], yticks=range(rows), title=title)
    fig.colorbar(image)
    plt.show()


plt.rcParams.update({"text.parse_math": False, "figure.dpi": 80})  # a response may contain $

# %% [markdown]
# ## 1. A prompt
#
# The model reads and writes tokens, which are pieces of words with a number each (`data.encode`).

# %%
prompt = encode(["I saw this movie and it was"], tokenizer)[0]
print(prompt)
print([tokenizer.decode([i]) for i in prompt])

# %% [markdown]
# GPT-2 gives a probability to each of the 8,192 tokens that may follow: $\pi(a \mid s)$, where $s$ is the text so far
# and $a$ is a token. In the language of reinforcement learning, $s$ is the state and $a$ the action. These are the five
# most probable actions:

# %%
prompts = torch.tensor([prompt] * 4)  # the same prompt four times
with torch.no_grad():
    probabilities = policy.gpt2(prompts[:1])[0, -1].softmax(0)
for probability, token in zip(*(x.tolist() for x in probabilities.topk(5))):
    print(f"{tokenizer.decode([token])!r:>10} {probability:.3f}")

# %% [markdown]
# ## 2. Four responses
#
# `ppo.rollout` samples a response to each prompt, token by token, and computes all that a PPO step needs. A response
# ends at `<|endoftext|>` or after 16 tokens. Tokens are separated by `|`. The model is small, so its English is poor.

# %%
batch = ppo.rollout(
    policy, ref_policy, tokenizer, sentiment, prompts, cfg.kl_coef, cfg, random_generator("cpu", cfg.seed, 4)
)
for row in range(4):
    print(f"score {batch.scores[row]:5.2f}:", "|".join(tokens_of(batch, row)))

# %% [markdown]
# ## 3. Log-probabilities and KL
#
# The log-probability of each token, under the policy and under the reference, is the basis of all that follows
# (`ppo.logprobs_and_values`). Their difference is an estimate of the KL divergence, which measures how much the policy
# differs from the reference. Its unit is the nat, since the logarithms are natural:
#
# $$\mathrm{kl}_t = \log \pi(a_t \mid s_t) - \log \pi_\mathrm{ref}(a_t \mid s_t)$$
#
# It is 0 for every token, because the policy is still a copy of the reference.

# %%
ref_logprobs, _ = ppo.logprobs_and_values(ref_policy, batch.sequences, batch.prompt_len, cfg, ONE_PROCESS)
table(batch, 1, probability=batch.logprobs.exp(), logprob=batch.logprobs, reference=ref_logprobs, kl=batch.kl)
assert (batch.kl == 0).all()

# %% [markdown]
# Note that `<|endoftext|>` is a token like any other: to end the response is an action too.

# %% [markdown]
# ## 4. The score
#
# The classifier reads prompt and response and gives one number per text: the logit of its label POSITIVE. Scores are
# near 0 if it is not sure.

# %%
texts = ["I saw this movie and it was wonderful.", "I saw this movie and it was a waste of time.", *batch.texts]
for text, score in zip(texts, sentiment(texts)):
    print(f"{score:5.2f}  {text}")

# %% [markdown]
# ## 5. Rewards
#
# Each token gets a reward, not only the text. It is the KL penalty, and the last token also gets the score
# (`ppo.token_rewards`):
#
# $$r_t = -\beta \, \mathrm{kl}_t + [t = T] \cdot \mathrm{score}$$
#
# $\beta$ is `kl_coef`, $T$ is the last token of the response, and $[t = T]$ is 1 for this token and 0 for the others.
# The mask says which tokens are real: after `<|endoftext|>` there is only padding (`ppo.response_mask`). The KL is
# still 0, so the score is the only reward.

# %%
mask = ppo.response_mask(batch.sequences[:, batch.prompt_len :], tokenizer.eos_token_id)
rewards = ppo.token_rewards(batch.scores, batch.kl, mask, cfg.kl_coef)
picture(batch, rewards, "rewards: the score is on the last token")
assert torch.allclose(rewards.sum(1), batch.scores)

# %% [markdown]
# ## 6. Values and advantages
#
# The value $V(s_t)$ is what the policy expects as the sum of the rewards from token $t$ on. The value head starts at 0,
# so all values are 0 now.
#
# The advantage says how much better a token was than expected. Generalized advantage estimation goes backwards from the
# last token (`ppo.gae`):
#
# $$\delta_t = r_t + \gamma V(s_{t+1}) - V(s_t), \qquad A_t = \delta_t + \gamma \lambda A_{t+1}$$
#
# With values of 0, the score is passed back and shrinks by $\gamma\lambda = 0.95$ per token. The function also gives
# the return of each token, its advantage plus its value: the values are trained towards the returns.

# %%
advantages, returns = ppo.gae(rewards, batch.values, mask, cfg.gamma, cfg.lam)
table(batch, 1, reward=rewards, value=batch.values, advantage=advantages)
last = mask.sum(1) - 1
assert torch.allclose(advantages[:, 0], batch.scores * (cfg.gamma * cfg.lam) ** last)

# %% [markdown]
# Advantages are **whitened** (`ppo.whiten`): over all real tokens they then have mean 0 and standard deviation 1. The
# responses that are better than the others get positive advantages, even if all scores are positive.

# %%
whitened = ppo.whiten(advantages, mask)
print(f"mean {whitened[mask].mean():z.6f}, standard deviation {whitened[mask].std():.6f}")
assert torch.allclose(whitened, batch.advantages)  # rollout computed the same
assert abs(whitened[mask].mean()) < 1e-5
picture(batch, whitened, "whitened advantages: blue tokens become more probable, red ones less")

# %% [markdown]
# ## 7. Ratio and loss
#
# The ratio compares the policy that is trained with the policy that sampled the responses:
#
# $$\mathrm{ratio}_t = \frac{\pi(a_t \mid s_t)}{\pi_\mathrm{old}(a_t \mid s_t)}, \qquad
# L = -\frac{1}{N} \sum_t
# \min\left(\mathrm{ratio}_t A_t,\ \mathrm{clip}(\mathrm{ratio}_t, 1 - \epsilon, 1 + \epsilon)\, A_t\right)$$
#
# The clip removes the gradient of a token whose ratio has moved by more than $\epsilon = 0.2$ in the direction of its
# advantage. `ppo.ppo_loss` adds the loss of the values: half their squared distance from the returns, times `vf_coef`.


# %%
def ratio_and_loss(policy, batch):
    """Return the ratio (B, T), the loss, and the metrics of ppo.ppo_loss."""
    logprobs, values = policy(batch.sequences, batch.prompt_len)
    old = (x[batch.mask] for x in (batch.logprobs, batch.values, batch.advantages, batch.returns))
    loss, metrics = ppo.ppo_loss(logprobs[batch.mask], values[batch.mask], *old, cfg)
    return (logprobs - batch.logprobs).exp().detach(), loss.item(), {k: round(v.item(), 5) for k, v in metrics.items()}


ratio, loss, metrics = ratio_and_loss(policy, batch)
print(f"ratio: {ratio[mask].min():.6f} to {ratio[mask].max():.6f}")
print(metrics)
assert torch.allclose(ratio[mask], torch.ones(int(mask.sum())), atol=1e-4)

# %% [markdown]
# Before the first update, the policy is the one that sampled. So every ratio is 1, nothing is clipped, and `pg_loss` is
# minus the mean of the advantages, which is 0. A loss of 0 does not mean that there is nothing to learn: the gradient
# is not 0.

# %% [markdown]
# ## 8. The update
#
# `ppo.update` takes one step of Adam per minibatch, here all four responses, and goes over the responses `ppo_epochs` =
# 2 times. Four responses are few, so we take a quarter of the learning rate.

# %%
adam = torch.optim.Adam(policy.parameters(), cfg.lr / 4, eps=cfg.adam_eps)
stepper = Stepper(policy, [adam], cfg.grad_clip)
four = replace(cfg, batch_size=4, minibatch_size=4, micro_batch_size=4)
ppo.update(policy, stepper, batch, four, random_generator("cpu", cfg.seed))
new_ratio, new_loss, metrics = ratio_and_loss(policy, batch)
print(f"ratio: {new_ratio[mask].min():.3f} to {new_ratio[mask].max():.3f}")
print(f"loss: {loss:.4f} before, {new_loss:.4f} after")
print(metrics)
assert new_loss < loss and not torch.allclose(new_ratio[mask], torch.ones(int(mask.sum())), atol=0.01)

# %% [markdown]
# The ratio is no longer 1. Most tokens with a positive advantage became more probable, most with a negative one less.
# In the grey area, nothing is clipped.

# %%
fig, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
axis.axhspan(1 - cfg.clip_eps, 1 + cfg.clip_eps, color="0.92")
axis.axhline(1, color="0.5", linewidth=1)
axis.scatter(batch.advantages[mask], new_ratio[mask], s=18)
axis.set(xlabel="advantage", ylabel="ratio after the update", title="one point per token")
plt.show()
assert (batch.advantages * (new_ratio - 1))[mask].mean() > 0

# %% [markdown]
# ## 9. Twenty steps
#
# Four responses to one prompt teach little. The function below is the loop of `ppo.main` without checkpoints and logs:
# rollout, update, repeat. Each step has 32 prompts, the beginnings of reviews. `ppo.AdaptiveKL` changes `kl_coef` so
# that the KL goes to `kl_target`, 5 nats per response.
#
# Of the metrics below, `score` and `kl` are means per response, and `entropy` is per token: it is low if the policy is
# sure of its next token. `clip_frac` is the share of tokens whose ratio is outside the clip range, and
# `explained_variance` is the share of the variance of the returns that the values explain.


# %%
def train(cfg, reward_fn):
    """Train a new policy with PPO. Return it, and the metrics of each step."""
    policy, history = load_policy(folder, gpt2_config, tokenizer), []
    stepper = Stepper(policy, [torch.optim.Adam(policy.parameters(), cfg.lr, eps=cfg.adam_eps)], cfg.grad_clip)
    controller = ppo.AdaptiveKL(cfg)
    for step in range(cfg.steps):
        stepper.set_lr(1 - (1 - cfg.lr_end) * step / cfg.steps)
        prompts, rng = prompt_batch(pool, step, cfg), random_generator("cpu", cfg.seed, step)
        batch = ppo.rollout(policy, ref_policy, tokenizer, reward_fn, prompts, controller.coef, cfg, rng)
        metrics = rollout_metrics(batch, policy, ref_policy, 0.0, cfg)
        metrics |= ppo.update(policy, stepper, batch, cfg, random_generator("cpu", cfg.seed, step))
        controller.update(metrics["kl"], cfg.batch_size)
        history.append(metrics)
    return policy, history


pool = load_prompts(cfg, "prompts", gpt2_config, tokenizer)
trained, history = train(cfg, sentiment)
for step in (0, 5, 10, 15, 19):
    names = ("score", "kl", "entropy", "clip_frac", "explained_variance")
    print(f"step {step:2}:", ", ".join(f"{name} {history[step][name]:.2f}" for name in names))


# %%
def curves(runs, *names):
    """Plot metrics of runs {label: history}, one panel per metric."""
    fig, axes = plt.subplots(1, len(names), figsize=(12, 2.8), layout="constrained")
    for axis, name in zip(axes, names):
        for label, history in runs.items():
            axis.plot([metrics[name] for metrics in history], label=label)
        axis.set(xlabel="PPO step", title=name)
    axes[0].legend()
    plt.show()


curves({"sentiment": history}, "score", "kl", "entropy")
first, last = (sum(m["score"] for m in part) / 5 for part in (history[:5], history[-5:]))
print(f"mean score of the first five steps {first:.2f}, of the last five {last:.2f}")
assert last > first and history[0]["kl"] == 0 < history[-1]["kl"]

# %% [markdown]
# ## 10. Before and after
#
# The same prompt and the same random numbers, with the policy before and after the 20 steps. The score rises; the text
# is still that of a review, because of the KL penalty.


# %%
def respond(policy, prompts, reward_fn=sentiment):
    """Return a rollout with the same random numbers in each call."""
    rng = random_generator("cpu", cfg.seed, 4)
    return ppo.rollout(policy, ref_policy, tokenizer, reward_fn, prompts, cfg.kl_coef, cfg, rng)


before, after = (respond(model, prompts) for model in (ref_policy, trained))
for name, rollout in {"before": before, "after": after}.items():
    print(name)
    for score, text in zip(rollout.scores, rollout.texts):
        print(f"{score:7.2f}  {text}")

# %% [markdown]
# Four responses are few. Here is the mean over 64 other prompts, which were not used in the 20 steps:

# %%
others = prompt_batch(pool, 15, replace(cfg, batch_size=64))
many_before, many_after = (respond(model, others) for model in (ref_policy, trained))
print(f"mean score: {many_before.scores.mean():.2f} before, {many_after.scores.mean():.2f} after")
assert many_after.scores.mean() > many_before.scores.mean() + 0.1

# %% [markdown]
# With the trained policy, the columns kl and value are no longer 0. A negative KL is no error: the token is less
# probable than under the reference. The mean over many responses is positive.

# %%
rewards = ppo.token_rewards(after.scores, after.kl, after.mask, cfg.kl_coef)
ref_logprobs = after.logprobs - after.kl
columns = {"logprob": after.logprobs, "reference": ref_logprobs, "kl": after.kl, "reward": rewards}
table(after, 0, **columns, value=after.values, advantage=after.advantages)

# %% [markdown]
# Where does the KL come from? From a few words that the policy now prefers. The sum over the tokens, as a mean over the
# responses, is the `kl` that `ppo.py` logs (`runtime.monitor.rollout_metrics`).

# %%
picture(after, after.kl, "KL per token, nats: blue tokens are more probable than under the reference")
logged = rollout_metrics(many_after, trained, ref_policy, 0.0, cfg)
print(f"sum over the tokens, mean over 64 responses: {many_after.kl.sum(1).mean():.4f}; logged: {logged['kl']:.4f}")
assert abs(many_after.kl.sum(1).mean() - logged["kl"]) < 1e-4 and logged["kl"] > 0

# %% [markdown]
# ## Exercise 1: another reward
#
# A reward is any function from a list of texts to a tensor with one score per text. Write one that rewards **short**
# responses, train with it, and look at the responses. (Other ideas: `-sentiment(texts)`, or the number of exclamation
# marks.)


# %%
def my_reward(texts):
    return torch.zeros(len(texts))  # your code here


# my_policy, my_history = train(cfg, my_reward)

# %% [markdown]
# <details><summary>Solution: click, and open the next cell</summary>
#
# The policy learns to end its responses. `<|endoftext|>` is a token like any other, and it becomes more probable
# because it brings a better score.
#
# </details>


# %% [solution]
# @title Solution 1
def short(texts):
    return -torch.tensor([len(text) / 15 for text in texts])


short_policy, short_history = train(cfg, short)
curves({"short": short_history}, "score", "response_length", "eos_frac")
short_many = respond(short_policy, others, short)
print(*short_many.texts[:6], sep="\n")
for name, rollout in {"before": many_before, "after": short_many}.items():
    length, ended = rollout.mask.sum(1).float().mean(), rollout.ended.float().mean()
    print(f"{name}: {length:.1f} tokens per response, {100 * ended:.0f} % end by <|endoftext|>")
assert short_many.ended.float().mean() > many_before.ended.float().mean() + 0.3

# %% [markdown]
# ## Exercise 2: no KL penalty
#
# Train with the sentiment reward and without the penalty: `kl_coef=0.0` and `kl_target=0.0` (with a target, the
# controller would change the coefficient). What happens to the score, to the KL, and to the text?

# %%
no_kl = cfg  # your code here: replace(cfg, ...)

# %% [markdown]
# <details><summary>Solution: click, and open the next cell</summary>
#
# The score is higher than with the penalty, and the KL is several times as large. The text becomes a list of words that
# the classifier likes: this is called reward hacking. The classifier was trained on reviews, and its scores mean little
# for texts that are unlike reviews.
#
# </details>


# %% [solution]
# @title Solution 2
no_kl = replace(cfg, kl_coef=0.0, kl_target=0.0)
no_kl_policy, no_kl_history = train(no_kl, sentiment)
curves({"with KL penalty": history, "without": no_kl_history}, "score", "kl", "entropy")
no_kl_many = respond(no_kl_policy, others)
print(*no_kl_many.texts[:6], sep="\n")
for name, rollout in {"with": many_after, "without": no_kl_many}.items():
    print(f"{name} KL penalty: score {rollout.scores.mean():.2f}, KL {rollout.kl.sum(1).mean():.1f} nats per response")
assert no_kl_many.scores.mean() > many_after.scores.mean()
assert no_kl_many.kl.sum(1).mean() > 2 * many_after.kl.sum(1).mean()

# %% [markdown]
# ## Exercise 3: no mask
#
# A common mistake: the padding after `<|endoftext|>` is counted as if the policy had chosen it. Replace
# `ppo.response_mask` by a function that returns True for every token, and train with the reward for short responses of
# exercise 1. What do you expect?


# %%
def my_mask(responses, eos_id):
    return ppo.response_mask(responses, eos_id)  # your code here


# with patch.object(ppo, "response_mask", my_mask):
#     my_policy, my_history = train(cfg, short)

# %% [markdown]
# <details><summary>Solution: click, and open the next cell</summary>
#
# There is no error message, but the policy hardly ever ends a response, although that would bring the best score. It
# only learns to choose short words.
#
# </details>


# %% [solution]
# @title Solution 3
def no_mask(responses, eos_id):
    return torch.ones_like(responses, dtype=torch.bool)


with patch.object(ppo, "response_mask", no_mask):
    no_mask_policy, no_mask_history = train(cfg, short)
curves({"with mask": short_history, "without": no_mask_history}, "score", "kl", "eos_frac")
no_mask_many = respond(no_mask_policy, others, short)
print(*no_mask_many.texts[:6], sep="\n")
for name, rollout in {"with mask": short_many, "without": no_mask_many}.items():
    print(f"{name}: {100 * rollout.ended.float().mean():.0f} % of the responses end by <|endoftext|>")
assert no_mask_many.ended.float().mean() < short_many.ended.float().mean() - 0.2

# %% [markdown]
# <details><summary>Why? Click, and open the next cell</summary>
#
# After one step without the mask, look at a response that has ended. The score is on the last padding token. The step
# made padding more probable, although the policy never chose it, so each padding token has a KL. The penalty for it
# takes away most of what a short response gains, or all of it, and the policy learns not to end.
#
# </details>


# %% [solution]
# @title Solution 3, continued
with patch.object(ppo, "response_mask", no_mask):
    early_policy, _ = train(replace(cfg, steps=1, lr_end=1.0), short)
    early = respond(early_policy, others, short)
real = ppo.response_mask(early.sequences[:, early.prompt_len :], tokenizer.eos_token_id)
rewards = ppo.token_rewards(early.scores, early.kl, early.mask, cfg.kl_coef)
table(early, int((~real).sum(1).argmax()), real=real, logprob=early.logprobs, kl=early.kl, reward=rewards)
kl_real, kl_padding = (early.kl.where(part, 0).sum(1)[early.ended].mean() for part in (real, ~real))
print(f"KL of responses that end: {kl_real:.1f} nats on real tokens, {kl_padding:.1f} on padding")
for name, values in {"score": early.scores, "score minus KL penalty": early.objective}.items():
    print(
        f"{name}: {values[early.ended].mean():.2f} of responses that end, {values[~early.ended].mean():.2f} of others"
    )
assert kl_padding > kl_real

# %% [markdown]
# ## What next
#
# - `python ppo.py --preset mini` is the full run on a CPU: 40 steps of 128 responses.
# - The [README](../README.md) says how to change the reward, the data and the model.
# - The docstring of `ppo.py` lists the details that matter, in the order of the code.
# - [implementation-details.md](implementation-details.md) explains them, [kl.md](kl.md) the KL.
