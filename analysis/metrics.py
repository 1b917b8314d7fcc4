"""Metrics of the responses to held-out prompts, each with its 95 % interval.

Every metric is the mean of M values, one per response. So one bootstrap (Efron 1979) serves for all of them, and two
models are compared prompt by prompt: the same rows are resampled for both.

Shapes: M responses, B responses of a batch, T tokens of a response, V vocabulary.
"""

import importlib.util
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from analysis.tables import KLS
from data import CONTROLS
from model import token_logprobs
from reward import check_finite, scored
from runtime.device import rows_that_fit
from runtime.errors import BadInput, first_line
from runtime.hub import load_tokenizer, locate

# ---- metrics of single responses


def kl_three_ways(logits, ref_logits, ids, mask):
    """Return the KL of each response by three estimators, {"kl", "kl_k3", "kl_exact"}: (B,) nats, summed over tokens.

    With d, the log-probability of a token minus that of the reference: kl is k1, d; kl_k3 is k3, exp(-d) - 1 + d
    (Schulman, joschu.net/blog/kl-approx.html); kl_exact is the expectation of d over the vocabulary. logits,
    ref_logits: (B, T, V), divided by the temperature. ids, mask: (B, T). Needs two more tensors of the logits' size.
    """
    logp = logits.log_softmax(-1)
    diff = ref_logits.log_softmax(-1).neg_().add_(logp)  # (B, T, V)
    d = diff.gather(-1, ids[..., None]).squeeze(-1).cpu().double()  # (B, T); in float32 a small k3 can be negative
    tokens = {"kl": d, "kl_k3": (-d).expm1() + d, "kl_exact": logp.exp_().mul_(diff).sum(-1).cpu().double()}
    return {name: values.where(mask.cpu(), 0).sum(1) for name, values in tokens.items()}


def ngrams(ids, n):
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def repetition(responses, n=4):
    """Return the share of repeated n-grams in each response, (M,): seq-rep-n of Welleck et al. 2020.

    It is 1 - distinct n-grams / n-grams, and 0 for a response without n-grams. responses: lists of ids.
    """
    grams = [ngrams(ids, n) for ids in responses]
    return np.array([1 - len(set(row)) / len(row) if row else 0.0 for row in grams])


# ---- metrics of all responses together, as one value per response


def jackknife(whole, without):
    """Return (M,) values, one per response, whose mean is a statistic of all responses.

    whole: the statistic. without: (M,), the statistic without each response. The values are Tukey's pseudo-values,
    shifted so that their mean is `whole` (Efron and Tibshirani 1993, chapter 11).
    """
    return whole + (len(without) - 1) * (without.mean() - without)


def leave_one_out(total, parts, sizes):
    """Return total / sum of sizes, and the same without each response, (M,), where total decreases by its part."""
    return total / max(1, sizes.sum()), (total - parts) / np.maximum(1, sizes.sum() - sizes)


def perplexity(nll, lengths):
    """Return e^(nats / tokens) of all responses together, (M,). A mean over responses would weigh short ones more."""
    return jackknife(*map(np.exp, leave_one_out(nll.sum(), nll, lengths)))


def distinct(responses, n):
    """Return the distinct n-grams of all responses over their n-grams (Li et al. 2016), as (M,).

    Computed by leaving responses out, because the bootstrap is biased for this statistic: a response that is drawn
    twice repeats all its n-grams, so the share would be far too low. responses: lists of ids.
    """
    grams = [ngrams(ids, n) for ids in responses]
    owners = Counter(gram for row in grams for gram in set(row))  # number of responses with an n-gram
    unique = np.array([sum(owners[gram] == 1 for gram in set(row)) for row in grams])  # n-grams of no other response
    return jackknife(*leave_one_out(len(owners), unique, np.array([len(row) for row in grams])))


def bits_per_character(nll, texts, prompts):
    """Return the bits per character of all responses, as (M,): comparable between models with different tokenizers."""
    characters = np.array([len(text) - len(prompt) for text, prompt in zip(texts, prompts)])
    return jackknife(*leave_one_out(nll.sum(), nll, characters)) / math.log(2)


# ---- intervals


def interval(values, cfg, statistic=None):
    """Return (low, high), the 95 % bootstrap interval of the mean of values (M,), or of statistic(resampled rows).

    The rows depend only on cfg.seed and M, so that two models with the same prompts are resampled together.
    """
    rng = np.random.default_rng([cfg.seed, 3])
    statistic = statistic or (lambda rows: values[rows].mean())
    draws = [statistic(rng.integers(0, len(values), len(values))) for _ in range(cfg.resamples)]
    return tuple(float(x) for x in np.quantile(draws, (0.025, 0.975)))


def row(value, bounds):
    """Return an entry of results.json."""
    return {"value": float(value), "low": bounds[0], "high": bounds[1]}


def measure(responses, reward_fn, judge, cfg):
    """Return the metrics of one model, {name: {"value", "low", "high"}}, and their values per response, {name: (M,)}.

    responses: the dict of respond, with second_nll if there is a second language model. The KLs also have "std" and
    "below_0": the standard deviation over responses, and the share of them below 0.
    """
    texts, tokens, nll = responses["texts"], responses["tokens"], np.array(responses["ref_nll"])
    scores, positive = scored(reward_fn, texts)
    check_finite("score", scores, texts)
    values = {"score": scores.double().numpy()}
    if positive is not None:
        values["positive_by_reward"] = positive.double().numpy()
    odds = judge.log_odds(texts).double()
    values |= {"positive_by_judge": (odds > 0).double().numpy(), "judge": odds.sigmoid().numpy()}
    if cfg.task == "controlled":  # for each control, the share of its responses that the judge finds to agree with it
        for control, name in zip(CONTROLS, ("agrees_negative", "agrees_positive")):
            has_control = np.array([prompt.startswith(control) for prompt in responses["prompts"]])
            values[name] = values["positive_by_judge"][has_control]
    values |= {name: np.array(responses[name]) for name in KLS}
    values["response_length"] = np.array([float(len(ids)) for ids in tokens])
    values["perplexity"] = perplexity(nll, values["response_length"])
    if "second_nll" in responses:
        second = np.array(responses["second_nll"])
        values["bits_per_character"] = bits_per_character(second, texts, responses["prompts"])
    values |= {"distinct_1": distinct(tokens, 1), "distinct_2": distinct(tokens, 2), "repetition": repetition(tokens)}
    table = {name: row(column.mean(), interval(column, cfg)) for name, column in values.items()}
    for name in KLS:
        table[name] |= {"std": float(values[name].std()), "below_0": float((values[name] < 0).mean())}
    return table, values


def difference(before, after, cfg):
    """Return {name: entry} of after minus before, from the values per response of measure, and perplexity_ratio.

    perplexity_ratio is after / before.
    """
    table = {}
    for name in before:
        paired = after[name] - before[name]
        table[name] = row(paired.mean(), interval(paired, cfg))

    def ratio(rows):
        return after["perplexity"][rows].mean() / before["perplexity"][rows].mean()

    table["perplexity_ratio"] = row(ratio(slice(None)), interval(after["perplexity"], cfg, ratio))
    return table


# ---- a second language model


def open_second_lm(name, device):
    """Return (model, tokenizer) of a causal language model in Hugging Face's format; weights only from safetensors.

    name: a folder, a name on the hub, or a .gguf file, which has the weights, the config and the tokenizer.
    """
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    gguf = check_gguf(name) if name.endswith(".gguf") else {}
    folder, weights = (Path(name).parent, gguf) if gguf else (locate(name), dict(use_safetensors=True))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **weights)
    except Exception as error:  # transformers raises exceptions of many types
        raise BadInput(f"second_lm {name} cannot be read: {first_line(error)}") from None
    tokenizer = load_tokenizer(folder, **gguf)
    if not tokenizer.is_fast or (tokenizer.bos_token_id is None and tokenizer.eos_token_id is None):
        raise BadInput(f"second_lm {name}: its tokenizer must be a fast one, with offsets, and have a bos or eos token")
    return model.eval().to(device), tokenizer


def check_gguf(name):
    """Return the argument of transformers for a .gguf file. Raise BadInput if it, or a package to read it, is missing.

    transformers reads the file into float32, whatever its quantization.
    """
    if missing := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
        raise BadInput(f"second_lm {name} needs more packages: pip install {' '.join(missing)}")
    if not Path(name).is_file():
        raise BadInput(f"second_lm {name}: no such file")
    return {"gguf_file": Path(name).name}


@torch.no_grad()
def second_nll(model, tokenizer, responses, cfg):
    """Return the nats of each response under a second language model, given its prompt: a list of M numbers.

    Prompt and response are tokenized as one text, after a bos token; a token counts if its end is in the response.
    <|endoftext|> is not part of the text and does not count.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = tokenizer(responses["texts"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = [torch.tensor([start, *row]) for row in encoded["input_ids"]]
    counts = [
        torch.tensor([end > len(prompt) for _, end in offsets], dtype=torch.bool)
        for prompt, offsets in zip(responses["prompts"], encoded["offset_mapping"])
    ]
    longest, limit = max(map(len, ids)), getattr(model.config, "max_position_embeddings", None) or math.inf
    if longest > limit:
        raise BadInput(f"second_lm has a context of {limit} tokens, and a response has {longest} of its tokens")
    config = model.config.get_text_config()
    fit = rows_that_fit(longest, config.hidden_size, config.num_hidden_layers, config.vocab_size, model.device)
    nll, size = [], max(1, min(cfg.batch_size, fit))
    for i in range(0, len(ids), size):
        sequences = pad_sequence(ids[i : i + size], True, start).to(model.device)  # padded on the right
        mask = pad_sequence(counts[i : i + size], True, False).to(model.device)
        logprobs = token_logprobs(model(sequences).logits[:, :-1].float(), sequences[:, 1:])
        nll += (-logprobs).where(mask, 0).sum(1).tolist()
    return nll
