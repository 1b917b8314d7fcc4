"""The reward: sentiment of a text by a BERT classifier (Devlin et al. 2018), and the training of such a classifier.

    python reward.py                                      # bert-base-cased on IMDB, twice: the reward and the judge
    python reward.py --preset mini                        # on a CPU: the two in asset/mini go on for a minute
    python reward.py --preset mini --init_from scratch    # how they were made: they learn from a teacher

The teacher of the last line is an earlier run, of a pretrained encoder, on one line:

    python reward.py --preset mini --init_from sentence-transformers/all-MiniLM-L6-v2 --out reward_checkpoints/teacher
    --epochs 2 --batch_size 32 --lr 1e-4 --crop_share 0.85

The two learn from disjoint reviews. PPO is rewarded by the first; evaluate.py --judge asks the second, which PPO never
saw, whether the policy became positive or only found what the first one likes. Each is written as a Hugging Face folder
with the labels NEGATIVE and POSITIVE, log.jsonl and results.json to reward_checkpoints/<preset>/reward and judge.
"""

import importlib.util
import json
import math
import os
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import (
    RESULTS,
    Checkpoints,
    check_run,
    delete_checkpoints,
    fingerprint,
    first_line,
    read_json,
    replacing,
    write_text,
)
from config import BadInput, RewardConfig, run, sources
from data import CONTROLS, Reviews, digest, load_splits, train_wordpiece
from device import pick_device, seed_of, to_device
from hub import SAVE_DTYPES, load_tokenizer, locate
from log import RunLog, classifier_flops, sheet, time_on_cpu
from optimizer import Stepper, make_optimizers, warm_up_and_decay

PROBES = (  # (positive, negative): what any sentiment classifier tells apart
    ("I loved this movie, it was wonderful throughout.", "I hated this movie, it was terrible throughout."),
    ("A great film with excellent acting and a beautiful story.", "A bad film with awful acting and a boring story."),
    ("One of the best movies I have ever seen, superb.", "One of the worst movies I have ever seen, dreadful."),
    ("Brilliant and moving, I recommend it to everyone.", "Stupid and dull, a waste of everyone's time and money."),
)
POSITIVE_NAMES = ("positive", "pos")
KNOWN_LABELS = {"lvwerra/bert-imdb": "LABEL_1"}  # positive labels of hub models whose labels have no names
LABELS = dict(id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})  # of what we train


class SentimentReward:
    """Texts to scores by any Hugging Face sequence classifier, in eval mode and without gradient.

    kind: "logit", z_pos, as in the published runs; "log_odds", z_pos - logsumexp of the others, the log of the odds;
    "probability", softmax, which saturates: .99 and .999 look alike to PPO. For two classes the log-odds are about
    twice the logit, so one kl_coef weighs half as much against them.
    """

    def __init__(self, model, tokenizer, positive, kind="logit", device="cpu"):
        self.model, self.tokenizer, self.positive, self.kind = model.eval().to(device), tokenizer, positive, kind
        self.device = torch.device(device)
        # with padding; more leaves a CPU's cache: 256-token reviews took half as long again in batches of 64
        self.batch_tokens = 2048 if self.device.type == "cpu" else 16384
        self.max_length = token_limit(model.config, tokenizer)
        self.truncated_frac = 0.0  # share of the last call's texts that lost their beginning
        if tokenizer.pad_token is None:  # as GPT-2's
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id

    @classmethod
    def load(cls, name, positive_label="", kind="logit", device="cpu", flag="positive_label"):
        """From a folder or hub name. BadInput when its labels do not say which is positive, before weights are read.

        flag: the one that can give positive_label, for the error.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification, logging

        logging.disable_progress_bar()
        folder = locate(name)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            labels = positive_index(config.id2label, positive_label, name, flag)
            model = AutoModelForSequenceClassification.from_pretrained(folder, config=config, dtype=torch.float32)
            tokenizer = load_tokenizer(folder)
        except BadInput:
            raise
        except Exception as error:  # transformers raises whatever its readers do
            raise BadInput(f"classifier {name} cannot be read: {first_line(error)}") from None
        return cls(model, tokenizer, labels, kind, device=device)

    @torch.no_grad()
    def logits(self, texts):
        """(len(texts), labels) float32 on the CPU, computed in batches of like length."""
        tokenizer = self.tokenizer
        ids = tokenize(tokenizer, texts, self.max_length)
        lengths = np.array([len(row) for row in ids["input_ids"]])
        self.truncated_frac = sum(bool(encoding.overflowing) for encoding in ids.encodings or []) / len(texts)
        scores = torch.empty(len(texts), self.model.config.num_labels)
        order = np.argsort(-lengths, kind="stable")
        while len(order):
            rows, order = np.split(order, [max(1, self.batch_tokens // lengths[order[0]])])
            batch = tokenizer.pad({key: [values[i] for i in rows] for key, values in ids.items()}, return_tensors="pt")
            batch = {name: to_device(tensor, self.device) for name, tensor in batch.items()}
            scores[torch.from_numpy(rows)] = self.model(**batch).logits.float().cpu()
        return scores

    def log_odds(self, texts):
        """log(p / (1 - p)) of the positive label: (len(texts),)."""
        return log_odds(self.logits(texts), self.positive)

    def __call__(self, texts):
        """Scores (len(texts),) float32 on the CPU."""
        return self.score(self.logits(texts))

    def scored(self, texts):
        """(scores, 1 where the text is positive and else 0), (len(texts),) each, from one forward pass."""
        logits = self.logits(texts)
        return self.score(logits), (log_odds(logits, self.positive) > 0).float()

    def score(self, logits):
        """The scores (B,) of logits (B, labels), by self.kind."""
        if self.kind == "logit":
            return logits[:, self.positive]
        odds = log_odds(logits, self.positive)
        return odds if self.kind == "log_odds" else odds.sigmoid()


class ControlledReward(SentimentReward):
    """Agreement with the control that a text begins with: behind [negative] the two labels change places.

    So the score, of whatever kind, is that of the wanted label. The control itself is not scored, and a text without
    one is taken for [positive]. BadInput unless the classifier has two labels.
    """

    def __init__(self, model, tokenizer, positive, kind="logit", device="cpu"):
        super().__init__(model, tokenizer, positive, kind, device)
        if model.config.num_labels != 2:
            raise BadInput(f"task is controlled: it needs a classifier with 2 labels, not {model.config.num_labels}")

    def logits(self, texts):
        found = [next((c for c in CONTROLS if text.startswith(c)), "") for text in texts]
        logits = super().logits([text[len(control) :] for text, control in zip(texts, found)])
        negative = torch.tensor([control == CONTROLS[0] for control in found])
        return torch.where(negative[:, None], logits.flip(1), logits)


CLASSIFIERS = {"positive": SentimentReward, "controlled": ControlledReward}  # by task


def log_odds(logits, positive):
    """z_pos - logsumexp of the other labels: (B, labels) -> (B,)."""
    others = torch.cat([logits[:, :positive], logits[:, positive + 1 :]], dim=1)
    return logits[:, positive] - others.logsumexp(1)


def positive_index(id2label, positive_label, name, flag="positive_label"):
    """The index of the positive label, found by its name and never by its place.

    Its name is positive_label; where that is empty POSITIVE or POS, or else the one of KNOWN_LABELS for the model
    `name`. BadInput, which names the flag that gives positive_label, unless exactly one label has it.
    """
    known = KNOWN_LABELS.get(name.partition("@")[0])
    for wanted in ((positive_label,),) if positive_label else (POSITIVE_NAMES, (known,)):
        names = [label.lower() for label in wanted if label]
        found = [int(index) for index, label in id2label.items() if str(label).lower() in names]
        if len(found) == 1 and len(id2label) > 1 and 0 <= found[0] < len(id2label):
            return found[0]
    wanted = (positive_label,) if positive_label else POSITIVE_NAMES
    hint = "it needs at least two labels" if len(id2label) < 2 else f"name the positive one by --{flag}"
    raise BadInput(
        f"classifier {name} has the labels {dict(id2label)}: not exactly one is {' or '.join(map(repr, wanted))}: "
        f"{hint}"
    )


def token_limit(config, tokenizer):
    """The longest input in tokens: the tokenizer's limit or the model's, whichever is less; some name none."""
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1  # their positions start behind the padding's
    return int(min(tokenizer.model_max_length, positions, 1_000_000))


def tokenize(tokenizer, texts, max_length):
    """Ids of texts with [CLS] and [SEP]. Too long a text loses its beginning: the response is at the end."""
    tokenizer.truncation_side = "left"
    return tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False, verbose=False)


def load_judge(cfg, device):
    """cfg.judge, a classifier of the texts that only watches; None where it is empty."""
    if not cfg.judge:
        return None
    classifier = CLASSIFIERS[cfg.task]
    return classifier.load(cfg.judge, cfg.judge_positive_label, device=device, flag="judge_positive_label")


def load_reward(cfg, device):
    """cfg.reward as reward_fn(list of B texts) -> (B,) scores: a classifier, or the user's file.py:function."""
    file, _, function = cfg.reward.rpartition(":")
    if cfg.reward.endswith(".py"):
        raise BadInput(f"reward {cfg.reward}: name the function too, {cfg.reward}:function")
    if not file.endswith(".py"):
        return CLASSIFIERS[cfg.task].load(cfg.reward, cfg.positive_label, cfg.reward_kind, device)
    return FunctionReward(file, function)


class FunctionReward:
    """A user's function as a reward: list of B texts -> B scores. BadInput, with its name, when it raises."""

    def __init__(self, file, function):
        self.file, self.name = os.path.abspath(file), f"{file}:{function}"
        if not Path(file).is_file():
            raise BadInput(f"reward {self.name}: no file {file}")
        spec = importlib.util.spec_from_file_location("user_reward", file)
        module = importlib.util.module_from_spec(spec)
        with self.errors("importing it"):
            spec.loader.exec_module(module)
        self.function = getattr(module, function, None)
        if not callable(self.function):
            raise BadInput(f"reward {self.name}: {file} has no function {function!r}")

    def __call__(self, texts):
        with self.errors(f"scoring {len(texts)} texts"):
            return as_scores(self.function(texts), texts)

    @contextmanager
    def errors(self, doing):
        """Turn what the user's code raises into BadInput with its kind, its message and its line in the user's file."""
        try:
            yield
        except BadInput as error:  # not one number a text
            raise BadInput(f"reward {self.name}: {error}") from None
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.file]
            where = f", line {lines[-1]}" if lines else ""
            raise BadInput(
                f"reward {self.name} raised {type(error).__name__} while {doing}{where}: {first_line(error)}"
            ) from error


def scored(reward_fn, texts):
    """(scores, positive) of texts, (B,) float32 on the CPU each; positive, 1 or 0, is what a classifier finds.

    It is None where the reward is a user's function, which has no opinion on it.
    """
    if hasattr(reward_fn, "scored"):  # a classifier, or several processes' shares of one
        return reward_fn.scored(texts)
    return as_scores(reward_fn(texts), texts), None


def reward_fingerprint(reward_fn):
    """The fingerprint of a classifier with its tokenizer, or of the file of a user's function; "" for none."""
    if isinstance(reward_fn, SentimentReward):
        return fingerprint(reward_fn.model, tokenizer_text(reward_fn.tokenizer))
    return fingerprint(Path(reward_fn.file).read_text(encoding="latin-1")) if hasattr(reward_fn, "file") else ""


def tokenizer_text(tokenizer):
    """What a tokenizer does, as text; of one that is written in Python its vocabulary."""
    if tokenizer.is_fast:
        return tokenizer.backend_tokenizer.to_str()
    return json.dumps(sorted(tokenizer.get_vocab().items()))


class NotFinite(BadInput):
    """A rollout with a number that is not finite: PPO skips it, and stops after three in a row."""


def as_scores(scores, texts):
    """What a reward gave as (len(texts),) float32; BadInput unless it is one number a text."""
    scores = torch.as_tensor(scores, dtype=torch.float32).detach()
    if scores.shape != (len(texts),):
        raise BadInput(f"score: {len(texts)} texts need shape ({len(texts)},), found {tuple(scores.shape)}")
    return scores


def check_finite(what, values, texts):
    """NotFinite unless all values (B,) are finite numbers; names the first text that has none."""
    if not values.isfinite().all():
        row = int((~values.isfinite()).nonzero()[0])
        raise NotFinite(f"{what} of text {row} is {values[row].item()}: {texts[row]!r}")


def check_reward(reward_fn, name="reward"):
    """What the reward makes of the probe sentences, as text; BadInput when it ranks them wrongly or not at all.

    A classifier must put the positive ones a log-odd above the negative ones on average. A user's function may reward
    anything, so it only has to give one finite number a text.
    """
    texts = [text for pair in PROBES for text in pair]
    if isinstance(reward_fn, SentimentReward):
        odds = reward_fn.log_odds(texts)
        gap = (odds[0::2] - odds[1::2]).mean().item()
        if not gap > 1:
            label = reward_fn.model.config.id2label[reward_fn.positive]
            raise BadInput(
                f"the {name} ranks probe sentences wrongly: the log-odds of {label!r} are {gap:.2f} higher on positive "
                f"sentences than on negative ones, and must be 1 higher: is it the positive label, the model trained?"
            )
        return f"probe sentences {gap:.1f} log-odds apart"
    scores = as_scores(reward_fn(texts), texts)
    check_finite("score", scores, texts)
    return f"probe sentences scored {scores.min():.2f} to {scores.max():.2f}"


# ---- training


def training_texts(texts, epoch, cfg):
    """The texts of an epoch: some whole, a crop_share of them cut to a run of words, half of those from the beginning.

    PPO scores a prompt and a short response, reviews are long: a classifier that never met short texts is poor at them.
    """
    rng = np.random.default_rng([cfg.seed, 2, epoch])
    out = []
    for text in texts:
        words = text.split(" ")
        if rng.random() < cfg.crop_share and len(words) > cfg.min_crop_words:
            spread = min(cfg.max_crop_words, len(words)) / cfg.min_crop_words
            length = int(cfg.min_crop_words * spread ** rng.random())  # log-uniform: short ones as often as long ones
            start = rng.integers(len(words) - length + 1) if rng.random() < 0.5 else 0  # prompts are beginnings
            text = " ".join(words[start : start + length])
        out.append(text)
    return out


def open_classifier(name, dropout):
    """(classifier, tokenizer) of a folder or hub name, labels NEGATIVE and POSITIVE; an encoder gets a new head."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()  # that the head of an encoder is new is what is wanted here
    folder = locate(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **LABELS)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        model = AutoModelForSequenceClassification.from_pretrained(folder, config=config, dtype=torch.float32)
        return model, load_tokenizer(folder)
    except BadInput:
        raise
    except Exception as error:  # transformers raises whatever its readers do
        raise BadInput(f"encoder {name} cannot be read: {first_line(error)}") from None


def small_classifier(texts, cfg):
    """(classifier, tokenizer) from scratch: a WordPiece of the texts, and a BERT of cfg's sizes with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    print(f"training a tokenizer of {cfg.vocab_size:,} tokens", flush=True)
    tokenizer = train_wordpiece(texts, cfg.vocab_size)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        intermediate_size=4 * cfg.hidden_size,
        max_position_embeddings=cfg.max_length,
        hidden_dropout_prob=cfg.dropout,
        attention_probs_dropout_prob=cfg.dropout,
        pad_token_id=tokenizer.pad_token_id,
        **LABELS,
    )
    return BertForSequenceClassification(config), tokenizer


def train(name, classifier, reviews, cfg, bf16, teacher=None):
    """Train a SentimentReward on reviews and write it to <out>/<name>; returns the seconds that took.

    With a teacher, another SentimentReward, the targets are its probabilities instead of the labels (Hinton et al.
    2015): it knows which crops of a positive review say nothing about it. Batches hold texts of like length.
    """
    seed, out = cfg.seed if name == "reward" else cfg.seed + 1, Path(cfg.out, name)
    model, tokenizer, device = classifier.model.train(), classifier.tokenizer, classifier.device
    optimizers = make_optimizers(model, [], cfg.lr, cfg.weight_decay)
    stepper = Stepper(model, optimizers, cfg.grad_clip)
    inputs = {
        "texts": digest(reviews.texts),
        "tokenizer": fingerprint(tokenizer_text(tokenizer)),
        "teacher": reward_fingerprint(teacher),
    }
    checkpoints = Checkpoints(cfg, out, model, optimizers, {"inputs": inputs, "skips": stepper.skips})
    stepper.skips = checkpoints.state["skips"]
    log = RunLog(cfg, model, part=name, first_step=checkpoints.first_step)
    per_epoch = math.ceil(len(reviews.texts) / cfg.batch_size)
    steps, epoch = math.ceil(cfg.epochs * per_epoch), None
    progress = log.progress(checkpoints, steps, f"train the {name}", "step")
    for step in progress:
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            texts = training_texts(reviews.texts, epoch, cfg)
            ids = tokenize(tokenizer, texts, classifier.max_length)
            batches = length_batches([len(row) for row in ids["input_ids"]], cfg.batch_size, [seed, 3, epoch])
        rows = batches[step % per_epoch]
        batch = tokenizer.pad({key: [values[i] for i in rows] for key, values in ids.items()}, return_tensors="pt")
        torch.manual_seed(seed_of(seed, step))  # of dropout
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(**batch.to(device)).logits
        positive = torch.from_numpy(reviews.labels[rows]).float()
        if teacher:
            positive = teacher.log_odds([texts[i] for i in rows]).sigmoid()
        loss = F.cross_entropy(logits.float(), torch.stack([1 - positive, positive], dim=1).to(device))
        loss.backward()
        share = warm_up_and_decay(step, steps)
        stepper.set_lr(share)
        accuracy = float((logits.argmax(1).cpu().numpy() == reviews.labels[rows]).mean())
        metrics = dict(
            loss=loss.item(), accuracy=accuracy, lr=optimizers[0].param_groups[0]["lr"], grad_norm=stepper.step()
        )
        log.write(step, **metrics, skipped_steps=stepper.skipped)
        progress.set_postfix(loss=f"{metrics['loss']:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
    model.eval().to(SAVE_DTYPES[cfg.save_dtype])
    with replacing(out, model.state_dict()) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model.float()  # what is reported of it is true of what was stored
    return log.close()


def length_batches(lengths, batch_size, key):
    """Every text once, in batches of like length (little padding) that come in random order: a list of index arrays."""
    rng = np.random.default_rng(key)
    order = rng.permutation(len(lengths))
    pool = 50 * batch_size  # sorted within pools only, so that batches still differ between epochs
    order = np.concatenate(
        [
            rows[np.argsort(np.array(lengths)[rows], kind="stable")]
            for rows in np.split(order, range(pool, len(order), pool))
        ]
    )
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def calibration_error(probabilities, labels, bins=10):
    """Expected calibration error (Guo et al. 2017, Eq. 3) of the probability of POSITIVE, by bins of equal width."""
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = [
        abs((probabilities - labels)[which == b].mean()) * (which == b).mean()
        for b in range(bins)
        if (which == b).any()
    ]
    return float(sum(gaps))


def report(classifier, reviews, cfg):
    """Held-out accuracy and calibration on whole reviews and on texts as short as PPO's; of those a histogram too.

    The histogram counts truly positive and truly negative texts by the log-odds that the classifier gives them.
    """
    results = {}
    for name, texts in (
        ("reviews", reviews.texts),
        ("short_texts", [" ".join(t.split(" ")[: cfg.short_words]) for t in reviews.texts]),
    ):
        odds = classifier.log_odds(texts)
        probabilities = odds.sigmoid().numpy().astype(float)
        results[name] = {
            "accuracy": float(((probabilities > 0.5) == reviews.labels).mean()),
            "calibration_error": calibration_error(probabilities, reviews.labels),
        }
    edges = np.histogram_bin_edges(odds, bins=24)
    counts = {
        label: np.histogram(odds[reviews.labels == i], edges)[0] for i, label in enumerate(("negative", "positive"))
    }
    results["histogram"] = {name: values.tolist() for name, values in (("edges", edges), *counts.items())}
    return results


def tokens_of(texts, held_out, cfg):
    """About how many tokens a classifier reads to be trained on texts and evaluated twice; trained ones count thrice.

    A teacher of the same size reads what is trained on too. A token is taken for 4 characters, or 3 quarters of a word.
    """

    def tokens(texts):
        return sum(min(cfg.max_length, len(text) / 4) for text in texts)

    trained, short = cfg.epochs * tokens(training_texts(texts, 0, cfg)), len(held_out) * cfg.short_words * 4 / 3
    return (3 + bool(cfg.teacher)) * trained + 2 * (tokens(held_out) + short)


def each(folder):
    """{"reward": ..., "judge": ...}: the folders reward/ and judge/ in a folder, or twice the name itself."""
    inside = {name: f"{folder}/{name}" for name in ("reward", "judge")}
    return inside if folder and any(Path(path).is_dir() for path in inside.values()) else dict.fromkeys(inside, folder)


def main(cfg):
    check_run(cfg, f"reward/{RESULTS}", f"judge/{RESULTS}")
    device, bf16 = pick_device(cfg)
    starts, teachers = each(cfg.init_from), each(cfg.teacher)
    for name in (*starts.values(), *teachers.values()):
        if name not in ("scratch", ""):
            locate(name)
    splits = load_splits(cfg.dataset, cfg.text_column, cfg.label_column)
    held_out = Reviews(*(rows[: cfg.eval_reviews] for rows in splits["evaluation"]))
    if not cfg.resume:  # so that a judge of an earlier run is not taken for one of this run
        for name in starts:
            Path(cfg.out, name, RESULTS).unlink(missing_ok=True)
    for name, start in starts.items():
        reviews, file = splits[name], Path(cfg.out, name, RESULTS)
        if cfg.resume and file.is_file():
            if read_json(file).get("data") != digest(reviews.texts):
                raise BadInput(f"{file.parent} was trained on other texts: --force without --resume replaces the run")
            delete_checkpoints(file.parent)  # of a run that was killed before it could
            print(f"the {name} is trained already")
            continue
        rows = {
            "from": start,
            "teacher": teachers[name] or "none: the labels",
            "reviews": f"{len(reviews.texts):,} of its own",
            "device": device,
            "config": sources(cfg),
        }
        torch.manual_seed(cfg.seed + (name == "judge"))  # of new weights: not twice the same
        made = small_classifier(reviews.texts, cfg) if start == "scratch" else open_classifier(start, cfg.dropout)
        model, tokenizer = made
        rows |= time_on_cpu(classifier_flops(model, tokens_of(reviews.texts, held_out.texts, cfg)), cfg, device)
        print(sheet(f"training the {name}", rows), flush=True)
        tokenizer.model_max_length = min(tokenizer.model_max_length, cfg.max_length)  # longer ones it never learned
        classifier = SentimentReward(model, tokenizer, positive=1, device=device)
        teacher = SentimentReward.load(teachers[name], device=device) if cfg.teacher else None
        before = report(classifier, held_out, cfg)
        seconds = train(name, classifier, reviews, cfg, bf16, teacher)
        results = {
            "data": digest(reviews.texts),
            "parameters": sum(p.numel() for p in classifier.model.parameters()),
            "seconds": seconds,
            "held_out": len(held_out.texts),
            "before": {what: before[what] for what in ("reviews", "short_texts")},
            "after": report(classifier, held_out, cfg),
        }
        write_text(Path(cfg.out, name, RESULTS), json.dumps(results, indent=1))
        delete_checkpoints(Path(cfg.out, name))
        for what, texts in (("reviews", "reviews"), ("short_texts", f"first {cfg.short_words} words")):
            accuracy, error = results["after"][what].values()
            print(
                f"{name}, {results['held_out']:,} held-out {texts}: {before[what]['accuracy']:.1%} right before, "
                f"{accuracy:.1%} after; calibration error {error:.3f}"
            )


if __name__ == "__main__":
    run(main, RewardConfig)
