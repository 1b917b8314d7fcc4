"""Measure GPT-2s and classifiers by numbers that no training optimizes, to compare old and new models.

    python -m analysis.quality --preset mini                  # the models in asset/mini, in minutes on a CPU
    python -m analysis.quality --preset mini --models old=asset/mini/gpt2 new=finetune_checkpoints/scratch
    python -m analysis.quality --preset mini --second_lm MODEL.gguf    # also bits per character by another model

Writes results.json and samples.md to `out`, where the results of models with other names are kept. Needs scikit-learn.

A GPT-2 is measured by its validation loss, by how well a linear classifier tells its responses from what people wrote,
by their distinct-2 and their bits per character under a second language model, and by samples. A classifier is measured
on held-out reviews, beside linear classifiers trained on the same reviews, and by how often it agrees with the others.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from analysis.card import quote
from analysis.metrics import bits_per_character, distinct, open_second_lm, second_nll
from analysis.responses import respond
from analysis.tables import markdown
from config import QualityConfig, RewardConfig, defaults
from data import Reviews, decode, encode, load_splits, pack
from finetune_gpt2 import validate, validation_texts
from ppo import response_mask
from reward import SentimentReward, report, sentiment_baseline
from runtime.checkpoint import RESULTS, read_json, write_text
from runtime.cli import differing, run
from runtime.device import pick_device
from runtime.errors import BadInput
from runtime.hub import load_policy, locate, open_gpt2
from runtime.linear_classifier import LinearClassifier

FOLDS = 5  # of the discriminator's cross-validation
SAMPLE_WORDS = 5  # words of the prompts of samples, which are the same for models with different tokenizers
SAMPLE_TEMPERATURES = (1.0, 0.7)


def estimate(values):
    """Return the mean of values (M,), one per prompt, and its standard error, as {"value", "standard_error"}."""
    return {"value": float(values.mean()), "standard_error": float(values.std(ddof=1) / len(values) ** 0.5)}


# ---- GPT-2


def continuations(policy, tokenizer, texts, cfg, device):
    """Return the continuations of the same prompts by people and by the policy, as two dicts like that of respond.

    Prompts are the first P tokens of the reviews that are longer. People's continuations are the next T tokens, and end
    earlier where the review ends, as the policy's do. Before a prompt, the policy reads <|endoftext|>, as in its
    training: without it, the prompt could be from any place of a review, and one in ten continuations ends early.
    """
    eos_id, length = tokenizer.eos_token_id, cfg.prompt_len + cfg.response_len
    rows = [ids + length * [eos_id] for ids in encode(texts, tokenizer) if len(ids) > cfg.prompt_len][: cfg.prompts]
    if len(rows) < FOLDS:
        raise BadInput(
            f"{len(rows)} prompts are not enough: at least {FOLDS} are needed, from reviews longer than prompt_len "
            f"{cfg.prompt_len}; prompts is {cfg.prompts}"
        )
    sequences = torch.tensor([row[:length] for row in rows])
    prompts, responses = sequences[:, : cfg.prompt_len], sequences[:, cfg.prompt_len :]
    human = {"prompts": decode(prompts, tokenizer), "texts": decode(sequences, tokenizer)}
    human["tokens"] = [row[keep].tolist() for row, keep in zip(responses, response_mask(responses, eos_id))]
    groups = torch.cat([torch.full((len(prompts), 1), eos_id), prompts], 1).split(cfg.batch_size)
    return human, respond(policy, policy, tokenizer, groups, cfg, device, "the model")


def responses_only(out):
    """Return the texts of the responses without their prompts."""
    return [text[len(prompt) :] for prompt, text in zip(out["prompts"], out["texts"])]


def discriminate(human, generated):
    """Return which share of the two texts of each prompt a linear classifier recognizes, (M,): 0, .5 or 1.

    human, generated: the texts of people and of a model, M each, for the same prompts. Each text is classified by a
    classifier that was trained on both texts of other prompts (cross-validation). Chance is .5.
    """
    texts, prompts = np.array([human, generated], dtype=object), np.arange(len(human))
    correct = np.empty(texts.shape)
    for test in np.array_split(prompts, FOLDS):
        train = np.setdiff1d(prompts, test)
        classifier = LinearClassifier().fit([*texts[0, train], *texts[1, train]], np.repeat([0, 1], len(train)))
        for label in (0, 1):
            correct[label, test] = (classifier.log_odds(texts[label, test]) > 0).numpy() == label
    return correct.mean(0)


def sample(policy, tokenizer, prompts, cfg, device):
    """Return samples for display: [{"prompt": text, "1.0": response, "0.7": response}], with these temperatures."""
    longest, eos_id = policy.gpt2.config.n_positions - cfg.response_len, tokenizer.eos_token_id
    groups = [torch.tensor([[eos_id, *ids][:longest]]) for ids in encode(prompts, tokenizer)]
    samples = [{"prompt": prompt} for prompt in prompts]
    for temperature in SAMPLE_TEMPERATURES:
        out = respond(policy, policy, tokenizer, groups, replace(cfg, temperature=temperature), device, "samples")
        for row, text in zip(samples, responses_only(out)):
            row[str(temperature)] = text
    return samples


def measure_gpt2(opened, splits, second, cfg, device, dtype):
    """Return the results of a GPT-2 and the texts, prompts and responses, that it generated.

    opened: from open_gpt2. second: from open_second_lm, or None.
    """
    _, config, tokenizer = opened
    if 1 + cfg.prompt_len + cfg.response_len > config.n_positions:
        raise BadInput(f"1 + prompt_len + response_len is over the model's {config.n_positions} positions")
    policy = load_policy(*opened, dtype).to(device).eval()
    held_out = validation_texts(splits["prompts"].texts, tokenizer, cfg.eval_tokens)
    stream, characters = pack(held_out, tokenizer), sum(map(len, held_out))
    perplexity, bits = validate(policy.gpt2, stream, characters, config.n_positions, 8, tokenizer.eos_token_id)
    texts = splits["evaluation"].texts + splits["prompts"].texts
    human, generated = continuations(policy, tokenizer, texts, cfg, device)
    accuracy = estimate(discriminate(responses_only(human), responses_only(generated)))
    results = {
        "parameters": sum(p.numel() for p in policy.gpt2.parameters()),
        "validation": {"bits_per_character": bits, "perplexity": perplexity},
        "prompts": len(human["texts"]),
        "discriminator": accuracy | {"above_chance": accuracy["value"] - 0.5},
    }
    for name, out in (("human", human), ("generated", generated)):
        row = results[name] = {"distinct_2": estimate(distinct(out["tokens"], 2))}
        row["characters"] = float(np.mean([len(text) for text in responses_only(out)]))
        if second:
            first = {key: out[key][: cfg.lm_prompts] for key in ("prompts", "texts")}
            nll = np.array(second_nll(*second, first, cfg))
            row["bits_per_character"] = estimate(bits_per_character(nll, first["texts"], first["prompts"]))
    if second:
        results["second_lm"] = Path(cfg.second_lm).name
    rng = np.random.default_rng([cfg.seed, 4])
    chosen = rng.permutation(len(splits["evaluation"].texts))[: cfg.samples]
    prompts = [" ".join(splits["evaluation"].texts[i].split()[:SAMPLE_WORDS]) for i in chosen]
    results["samples"] = sample(policy, tokenizer, prompts, cfg, device)
    return results, generated["texts"]


# ---- classifiers


def baselines(splits, preset):
    """Return {name: LinearClassifier}, trained on the reviews of both classifiers, and of each one alone."""
    names = (("reward", "judge"), ("reward",), ("judge",))
    return {
        f"linear, {' + '.join(part)}": sentiment_baseline([splits[n] for n in part], defaults(RewardConfig, preset))
        for part in names
    }


def measure_classifiers(classifiers, reviews, texts, cfg):
    """Return {name: results} of classifiers, which have a method log_odds.

    reviews: held-out Reviews. texts: {kind: texts}; for each kind, "positive" is the share of texts that a classifier
    finds positive, and "agreement" the share on which two classifiers agree.
    """
    results, positive = {}, {}
    for name, classifier in classifiers.items():
        results[name] = report(classifier, reviews, cfg)
        del results[name]["histogram"]
        positive[name] = {kind: (classifier.log_odds(rows) > 0).double() for kind, rows in texts.items()}
        results[name]["positive"] = {kind: row.mean().item() for kind, row in positive[name].items()}
    for name in classifiers:
        results[name]["agreement"] = {
            kind: {
                other: (positive[name][kind] == positive[other][kind]).double().mean().item()
                for other in classifiers
                if other != name
            }
            for kind in texts
        }
    return results


# ---- tables and files


def gpt2_table(gpt2s):
    """Return a Markdown table of the results of GPT-2s, {name: results}. Numbers of people's texts are in brackets."""

    def pair(row, name, digits):
        if name not in row["generated"]:
            return "-"
        values = (row[side][name] for side in ("generated", "human"))
        generated, human = (x["value"] if isinstance(x, dict) else x for x in values)
        return f"{generated:.{digits}f} ({human:.{digits}f})"

    rows = [["GPT-2", "parameters", "bits per character", "perplexity", "discriminator, %", "distinct-2"]]
    rows[0] += ["bits per character, second model", "characters"]
    for name, row in gpt2s.items():
        bits, perplexity = row["validation"].values()
        value, error = (100 * row["discriminator"][key] for key in ("value", "standard_error"))
        cells = [
            quote(name),
            f"{row['parameters']:,}",
            f"{bits:.3f}",
            f"{perplexity:.1f}",
            f"{value:.1f} ± {error:.1f}",
        ]
        rows.append(
            [*cells, *(pair(row, *x) for x in (("distinct_2", 3), ("bits_per_character", 2), ("characters", 0)))]
        )
    return markdown(rows)


def classifiers_table(classifiers):
    """Return a Markdown table of the results of classifiers, {name: results}."""
    rows = [
        ["classifier", "parameters", "MB", "accuracy, reviews, %", "first words, %", "calibration error", "first words"]
    ]
    for name, row in classifiers.items():
        size = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "-"
        parts = row["reviews"], row["short_texts"]
        cells = [f"{100 * part['accuracy']:.1f}" for part in parts] + [
            f"{part['calibration_error']:.3f}" for part in parts
        ]
        rows.append([quote(name), f"{row['parameters']:,}", size, *cells])
    return markdown(rows)


def agreement_table(classifiers):
    """Return a Markdown table of the share of texts, in percent, on which each pair of classifiers agrees."""
    names = list(classifiers)
    kinds = list(dict.fromkeys(kind for row in classifiers.values() for kind in row["agreement"]))
    rows = [["agreement, %", *map(quote, kinds)]]
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            shares = [classifiers[name]["agreement"].get(kind, {}).get(other) for kind in kinds]
            if any(share is not None for share in shares):
                cells = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
                rows.append([quote(f"{name} and {other}"), *cells])
    return markdown(rows)


def samples_table(gpt2s, temperature):
    """Return a Markdown table of the samples of GPT-2s at a temperature: a row per prompt, a column per model."""
    responses = {}
    for name, row in gpt2s.items():
        for entry in row["samples"]:
            responses.setdefault(entry["prompt"], {})[name] = entry[str(temperature)]
    rows = [["prompt", *map(quote, gpt2s)]]
    rows += [[quote(prompt), *(quote(row.get(name, "")) for name in gpt2s)] for prompt, row in responses.items()]
    return markdown(rows)


def earlier_results(cfg):
    """Return the results in cfg.out, or empty ones. Raise BadInput if they are of another config."""
    free = ("models", "out", "device", "dtype", "second_lm", "positive_label")
    settings = {name: value for name, value in vars(cfg).items() if name not in free}
    file = Path(cfg.out, RESULTS)
    results = read_json(file) if file.is_file() else {"config": settings, "gpt2": {}, "classifiers": {}}
    if changed := differing(cfg, results.get("config", {}) | {name: getattr(cfg, name) for name in free}):
        raise BadInput(f"{file} has results of another config ({', '.join(changed)}): use another --out")
    return results


def main(cfg):
    device, dtype = pick_device(cfg)
    results = earlier_results(cfg)
    LinearClassifier()  # raises BadInput without scikit-learn, before anything expensive
    folders = {name or folder: folder for name, _, folder in (model.rpartition("=") for model in cfg.models)}
    if len(folders) < len(cfg.models):
        raise BadInput(f"models has a name twice: {' '.join(cfg.models)}")
    gpt2s, classifiers, sizes = {}, {}, {}
    for name, folder in folders.items():
        path = locate(folder)
        sizes[name] = sum(file.stat().st_size for file in path.iterdir())
        kinds = read_json(path / "config.json").get("architectures") or []
        if any(kind.endswith("ForSequenceClassification") for kind in kinds):
            classifiers[name] = SentimentReward.load(folder, cfg.positive_label, device=device, dtype=dtype)
        else:
            gpt2s[name] = open_gpt2(folder)
    second = open_second_lm(cfg.second_lm, device) if cfg.second_lm and gpt2s else None
    splits = load_splits(cfg.dataset, cfg.text_column, cfg.label_column)

    texts = {}
    for name, opened in gpt2s.items():
        print(f"measuring {name}", flush=True)
        results["gpt2"][name], texts[name] = measure_gpt2(opened, splits, second, cfg, device, dtype)
    if classifiers:
        print("training the linear classifiers", flush=True)
        linear = baselines(splits, cfg.preset)
        held_out = Reviews(*(rows[: cfg.eval_reviews] for rows in splits["evaluation"]))
        human = [" ".join(text.split(" ")[: cfg.short_words]) for text in held_out.texts]
        measured = measure_classifiers(classifiers | linear, held_out, {"human": human} | texts, cfg)
        for name, classifier in classifiers.items():
            parameters = sum(p.numel() for p in classifier.model.parameters())
            measured[name] |= {"parameters": parameters, "bytes": sizes[name]}
        for name, classifier in linear.items():
            measured[name]["parameters"] = classifier.parameters
        results["classifiers"] |= measured

    tables = [gpt2_table(results["gpt2"])] if results["gpt2"] else []
    if results["classifiers"]:
        tables += [classifiers_table(results["classifiers"]), agreement_table(results["classifiers"])]
    parts = [f"Temperature {t}:\n\n{samples_table(results['gpt2'], t)}" for t in SAMPLE_TEMPERATURES]
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RESULTS, json.dumps(results, indent=1))
    write_text(out / "samples.md", "\n\n".join(parts) + "\n")
    print("", *tables, "written:", sep="\n\n")
    print(out / RESULTS, out / "samples.md", sep="\n")


if __name__ == "__main__":
    run(main, QualityConfig)
