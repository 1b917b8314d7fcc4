"""What evaluate.py measures of a model's answers, each number with its interval, and the tables that show them.

Every number is the mean of M values, one a response. So one bootstrap (Efron 1979) serves all of them, and two models
are compared prompt by prompt: the same rows are drawn on both sides.

Shapes: M responses, B of a batch, T tokens of a response, V vocabulary.
"""

import math
from collections import Counter

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from analysis.plot import CAPTIONS, DIGITS
from data import CONTROLS
from model import token_logprobs
from reward import check_finite, scored
from runtime.device import rows_that_fit
from runtime.errors import BadInput, first_line
from runtime.hub import load_tokenizer, locate

KLS = ("kl", "kl_k3", "kl_exact")
KL_NOTE = (
    "All three estimate one KL. kl, which PPO is charged, takes the log-ratio of the sampled tokens (k1): right on "
    "average, and below 0 for each response that the fine-tuned model finds likelier than the policy does, so that the "
    "mean of a few can be negative too. kl_k3 adds a term whose mean is 0 and is never below 0, but a rare token can "
    "make it large. kl_exact sums over the whole vocabulary at each sampled place."
)

# ---- of one response


def kl_three_ways(logits, ref_logits, ids, mask):
    """KL of each response, {"kl", "kl_k3", "kl_exact"}: (B,) nats each, sums over its tokens.

    With d, a token's log-probability less the reference's: kl is k1, d; kl_k3 is k3, exp(-d) - 1 + d (Schulman,
    joschu.net/blog/kl-approx.html); kl_exact has no sampled token in it. logits, ref_logits: (B, T, V), divided by the
    temperature. ids, mask: (B, T). Takes two more tensors of the logits' size.
    """
    logp = logits.log_softmax(-1)
    diff = ref_logits.log_softmax(-1).neg_().add_(logp)  # (B, T, V)
    d = diff.gather(-1, ids[..., None]).squeeze(-1).cpu().double()  # (B, T); in float32 a small k3 dips below 0
    tokens = {"kl": d, "kl_k3": (-d).expm1() + d, "kl_exact": logp.exp_().mul_(diff).sum(-1).cpu().double()}
    return {name: values.where(mask.cpu(), 0).sum(1) for name, values in tokens.items()}


def ngrams(ids, n):
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def repetition(responses, n=4):
    """The share of a response's n-grams that it has said before, (M,): seq-rep-n of Welleck et al. 2020.

    1 - distinct n-grams / n-grams, of lists of ids; 0 for a response without any.
    """
    grams = [ngrams(ids, n) for ids in responses]
    return np.array([1 - len(set(some)) / len(some) if some else 0.0 for some in grams])


# ---- of all responses together, as values by response


def jackknife(whole, without):
    """A statistic of all responses as (M,) values whose mean it is: by how much each response moves it.

    whole: the statistic. without: (M,), the same with one response left out. These are Tukey's pseudo-values, shifted
    so that their mean is `whole` (Efron and Tibshirani 1993, chapter 11).
    """
    return whole + (len(without) - 1) * (without.mean() - without)


def leave_one_out(total, lost, sizes):
    """(total / sum of sizes, the same without each response): total falls by lost (M,), the sum by sizes (M,)."""
    return total / max(1, sizes.sum()), (total - lost) / np.maximum(1, sizes.sum() - sizes)


def perplexity(nll, lengths):
    """e^(nats of all responses / tokens of all), as (M,): a mean over responses would weigh short ones more."""
    return jackknife(*map(np.exp, leave_one_out(nll.sum(), nll, lengths)))


def distinct(responses, n):
    """Distinct n-grams over all n-grams of the responses (Li et al. 2016), as (M,): 1 says nothing twice.

    responses: lists of ids. By leaving responses out, since the bootstrap cannot draw this one as it is: a response
    that is drawn twice repeats itself, and the share falls far below the true one.
    """
    grams = [ngrams(ids, n) for ids in responses]
    owners = Counter(gram for some in grams for gram in set(some))
    own = np.array([sum(owners[gram] == 1 for gram in set(some)) for some in grams])  # that no other response has
    return jackknife(*leave_one_out(len(owners), own, np.array([len(some) for some in grams])))


def bits_per_character(nll, texts, prompts):
    """Bits a character of all responses, as (M,), from their nats: comparable whatever the tokenizer."""
    characters = np.array([len(text) - len(prompt) for text, prompt in zip(texts, prompts)])
    return jackknife(*leave_one_out(nll.sum(), nll, characters)) / math.log(2)


# ---- numbers with their intervals


def interval(values, cfg, statistic=None):
    """(low, high): the 95 % bootstrap interval of the mean of values (M,), or of statistic(resampled rows).

    The rows depend on cfg.seed and M alone: two models that answered the same prompts are resampled together.
    """
    rng = np.random.default_rng([cfg.seed, 3])
    statistic = statistic or (lambda rows: values[rows].mean())
    draws = [statistic(rng.integers(0, len(values), len(values))) for _ in range(cfg.resamples)]
    return tuple(float(x) for x in np.quantile(draws, (0.025, 0.975)))


def row(value, bounds):
    """A number of the table as it stands in results.json."""
    return {"value": float(value), "low": bounds[0], "high": bounds[1]}


def measure(answers, reward_fn, judge, cfg):
    """What the table tells of one model, {name: {"value", "low", "high"}}, and the values by response, {name: (M,)}.

    answers: what respond returns, with second_nll where a second model read them. The KLs have "std" and "below_0"
    too: the standard deviation over responses, and the share of them below 0. judge: its probability of POSITIVE.
    """
    texts, tokens, nll = answers["texts"], answers["tokens"], np.array(answers["ref_nll"])
    scores, positive = scored(reward_fn, texts)
    check_finite("score", scores, texts)
    values = {"score": scores.double().numpy()}
    if positive is not None:
        values["positive_by_reward"] = positive.double().numpy()
    odds = judge.log_odds(texts).double()
    values |= {"positive_by_judge": (odds > 0).double().numpy(), "judge": odds.sigmoid().numpy()}
    if cfg.task == "controlled":  # of the answers to each control, the share that the judge finds to agree
        for control, name in zip(CONTROLS, ("agrees_negative", "agrees_positive")):
            asked = np.array([prompt.startswith(control) for prompt in answers["prompts"]])
            values[name] = values["positive_by_judge"][asked]
    values |= {name: np.array(answers[name]) for name in KLS}
    values["response_length"] = np.array([float(len(ids)) for ids in tokens])
    values["perplexity"] = perplexity(nll, values["response_length"])
    if "second_nll" in answers:
        values["bits_per_character"] = bits_per_character(np.array(answers["second_nll"]), texts, answers["prompts"])
    values |= {"distinct_1": distinct(tokens, 1), "distinct_2": distinct(tokens, 2), "repetition": repetition(tokens)}
    table = {name: row(some.mean(), interval(some, cfg)) for name, some in values.items()}
    for name in KLS:
        table[name] |= {"std": float(values[name].std()), "below_0": float((values[name] < 0).mean())}
    return table, values


def difference(before, after, cfg):
    """{name: row} of after less before, values by response that measure gave of the same prompts.

    perplexity_ratio is after / before.
    """
    table = {}
    for name in before:
        paired = after[name] - before[name]
        table[name] = row(paired.mean(), interval(paired, cfg))
    ours, theirs = after["perplexity"], before["perplexity"]

    def ratio(rows):
        return ours[rows].mean() / theirs[rows].mean()

    table["perplexity_ratio"] = row(ours.mean() / theirs.mean(), interval(ours, cfg, ratio))
    return table


# ---- tables


def table_text(results):
    """The before/after table as Markdown, with the difference where every number has one. Reads well in a terminal."""
    names = [name for name in CAPTIONS if name in results["before"]]
    columns = {"before": "before PPO", "after": "after PPO", "difference": "difference"}
    if not set(names) <= set(results.get("difference", {})):
        del columns["difference"]
    controlled = results.get("config", {}).get("task") == "controlled"
    captions = {n: text.replace("positive,", "as asked,") if controlled else text for n, text in CAPTIONS.items()}
    cells = [
        [captions[name], *(cell(results[column][name], DIGITS.get(name, 2)) for column in columns)] for name in names
    ]
    return markdown([["", *columns.values()], *cells])


def kl_text(results):
    """The KL of the policy after PPO by its three estimators, with their spread over responses, as Markdown."""
    found = {name: results["after"][name] for name in KLS}
    cells = [[name, cell(one), f"{one['std']:.2f}", f"{one['below_0']:.2f}"] for name, one in found.items()]
    return markdown([["nats a response", "mean", "standard deviation", "share below 0"], *cells])


def cell(entry, digits=2):
    value, *bounds = (f"{entry[name]:z.{digits}f}" for name in ("value", "low", "high") if name in entry)
    return f"{value} [{', '.join(bounds)}]" if bounds else value


def markdown(cells):
    """Rows of texts as an aligned Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


# ---- a second language model


def open_second_lm(name, device):
    """(model, tokenizer) of any causal language model in Hugging Face's format; its weights from safetensors alone."""
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    folder, safe = locate(name), dict(use_safetensors=True, trust_remote_code=False)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **safe).eval().to(device)
        tokenizer = load_tokenizer(folder)
    except BadInput:
        raise
    except Exception as error:  # transformers raises whatever its readers do
        raise BadInput(f"second_lm {name} cannot be read: {first_line(error)}") from None
    if not tokenizer.is_fast or (tokenizer.bos_token_id is None and tokenizer.eos_token_id is None):
        raise BadInput(f"second_lm {name}: its tokenizer must tell offsets (a fast one) and have a bos or eos token")
    return model, tokenizer


@torch.no_grad()
def second_nll(model, tokenizer, answers, cfg):
    """Nats of the text of each response under a second language model that has read its prompt: a list of M.

    A tokenizer of its own cuts prompt and response as one text, behind a bos token; a token counts where it ends in the
    response. <|endoftext|> is no text and does not count.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    read = tokenizer(answers["texts"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = [torch.tensor([start, *row]) for row in read["input_ids"]]
    counts = [
        torch.tensor([end > len(prompt) for _, end in offsets], dtype=torch.bool)
        for prompt, offsets in zip(answers["prompts"], read["offset_mapping"])
    ]
    longest, most = max(map(len, ids)), getattr(model.config, "max_position_embeddings", None) or math.inf
    if longest > most:
        raise BadInput(f"second_lm reads {most} tokens at most, and an answer has {longest} of its tokens")
    config = model.config.get_text_config()
    fit = rows_that_fit(longest, config.hidden_size, config.num_hidden_layers, config.vocab_size, model.device)
    nll, size = [], max(1, min(cfg.batch_size, fit))
    for i in range(0, len(ids), size):
        sequences = pad_sequence(ids[i : i + size], True, start).to(model.device)  # padded on the right
        mask = pad_sequence(counts[i : i + size], True, False).to(model.device)
        logprobs = token_logprobs(model(sequences).logits[:, :-1].float(), sequences[:, 1:])
        nll += (-logprobs).where(mask, 0).sum(1).tolist()
    return nll
