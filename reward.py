"""The reward: sentiment of a text by a BERT classifier (Devlin et al. 2018), and the training of such a classifier.

    python reward.py                                      # bert-base-cased on IMDB, twice: the reward and the judge
    python reward.py --preset mini                        # on a CPU: train the two in asset/mini for another minute
    python reward.py --preset mini --init_from scratch    # the first stage of asset/mini/reward, from a teacher

The teacher is an earlier run with a pretrained encoder; asset/mini/reward/README.md has its command and the next stage,
where --teacher reward_checkpoints/teacher,linear adds a linear classifier to it, and --unlabelled and --generator add
texts without labels.

Reward and judge are trained on the labels of disjoint reviews. PPO maximizes the reward. It does not optimize the
judge, so that evaluate.py can tell by it whether responses became positive or only exploit the reward. Each is written
to a folder in reward_checkpoints/<preset>/: a Hugging Face model with the labels NEGATIVE and POSITIVE, log.jsonl and
results.json.
"""

import runtime  # isort: skip  # noqa: F401 - first, since it refuses a Python older than 3.11
import copy
import importlib.util
import json
import math
import os
import traceback
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from config import RewardConfig
from data import CONTROLS, Reviews, decode, encode, language_model_texts, load_splits, train_wordpiece
from runtime.checkpoint import (
    RESULTS,
    Checkpoints,
    check_run,
    delete_checkpoints,
    fingerprint,
    read_json,
    replacing,
    write_text,
)
from runtime.cli import run
from runtime.device import DTYPES, pick_device, random_generator, seed_of, to_device
from runtime.distributed import refuse_processes
from runtime.errors import BadInput, NotFinite, first_line
from runtime.hub import load_gpt2, load_tokenizer, locate, open_gpt2, tokenizer_text
from runtime.linear_classifier import LinearClassifier
from runtime.log import RunLog, classifier_flops, sheet, time_on_cpu
from runtime.optimizer import Stepper, make_optimizers, warm_up_and_decay

PROBES = (  # (positive, negative): any sentiment classifier can tell them apart
    ("I loved this movie, it was wonderful throughout.", "I hated this movie, it was terrible throughout."),
    ("A great film with excellent acting and a beautiful story.", "A bad film with awful acting and a boring story."),
    ("One of the best movies I have ever seen, superb.", "One of the worst movies I have ever seen, dreadful."),
    ("Brilliant and moving, I recommend it to everyone.", "Stupid and dull, a waste of everyone's time and money."),
)
POSITIVE_NAMES = ("positive", "pos")
KNOWN_LABELS = {"lvwerra/bert-imdb": ("LABEL_1",)}  # positive labels of hub models whose labels have no names
LINEAR_EPOCHS = 8  # passes of a linear classifier over crops of the reviews, after one over whole reviews
# most tokens per batch of a classifier, with padding. On a CPU, larger batches do not fit into the cache and took 1.5
# times as long. On a GPU, the texts of a rollout are one batch.
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 32768
LABELS = dict(id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})  # of our models


class SentimentReward:
    """Score texts by any Hugging Face sequence classifier, in eval mode and without gradients.

    kind: "logit", z_pos, of the positive label, as in the published runs; "log_odds", z_pos - logsumexp of the others;
    "probability", the softmax, which saturates: .99 and .999 are almost the same reward. For two classes the log-odds
    are about twice the logit, so that the same kl_coef weighs half as much against them. dtype: of autocast.
    """

    def __init__(self, model, tokenizer, positive, kind="logit", device="cpu", dtype=torch.float32):
        self.model, self.tokenizer, self.positive, self.kind = model.eval().to(device), tokenizer, positive, kind
        self.device, self.dtype = torch.device(device), dtype
        self.batch_tokens = CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS
        self.max_length = token_limit(model.config, tokenizer)
        self.truncated_frac = 0.0  # share of texts in the last call that were too long
        self.fingerprint = None  # of the weights as they were read, set if they were converted
        if tokenizer.pad_token is None:  # GPT-2 has none
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id

    @classmethod
    def load(cls, name, positive_label="", kind="logit", device="cpu", dtype=torch.float32, flag="positive_label"):
        """Open a folder or hub name. Raises BadInput if its labels do not say which one is positive.

        flag: name of the flag that sets positive_label, for the error message.
        """
        model, tokenizer = open_classifier(name)
        positive = positive_index(model.config.id2label, positive_label, name, flag)
        classifier = cls(model, tokenizer, positive, kind, device, dtype)
        if dtype != torch.float32:
            classifier.fingerprint = reward_fingerprint(classifier)
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.to(dtype)  # once, instead of in each call by autocast
        return classifier

    def autocast(self):
        """Return the context in which the model runs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def logits(self, texts):
        """Return the logits, (len(texts), labels) float32 on the CPU, computed in batches of similar length.

        A batch has at most batch_tokens tokens. Texts shorter than 0.9 times its longest are added only up to a quarter
        of that, so that little is padding. The host waits for a GPU once, after the last batch.
        """
        tokenizer = self.tokenizer
        ids = tokenize(tokenizer, texts, self.max_length)
        lengths = np.array([len(row) for row in ids["input_ids"]])
        self.truncated_frac = sum(bool(encoding.overflowing) for encoding in ids.encodings or []) / len(texts)
        order = rest = np.argsort(-lengths, kind="stable")
        parts = []
        while len(rest):
            longest = lengths[rest[0]]
            similar = max((lengths[rest] >= 0.9 * longest).sum(), self.batch_tokens // 4 // longest)
            rows, rest = np.split(rest, [max(1, min(similar, self.batch_tokens // longest))])
            batch = tokenizer.pad({key: [values[i] for i in rows] for key, values in ids.items()}, return_tensors="pt")
            batch = {name: to_device(tensor, self.device) for name, tensor in batch.items()}
            with self.autocast():
                parts.append(self.model(**batch).logits.float())
        return torch.cat(parts).cpu()[torch.from_numpy(order.argsort())]

    def log_odds(self, texts):
        """Return log(p / (1 - p)) of the positive label, (len(texts),)."""
        return log_odds(self.logits(texts), self.positive)

    def __call__(self, texts):
        """Return the scores of texts, (len(texts),) float32 on the CPU."""
        return self.score(self.logits(texts))

    def score(self, logits):
        """Return the scores (B,) of logits (B, labels), by self.kind."""
        if self.kind == "logit":
            return logits[:, self.positive]
        odds = log_odds(logits, self.positive)
        return odds if self.kind == "log_odds" else odds.sigmoid()


class ControlledReward(SentimentReward):
    """Score how well texts agree with their control: after [negative], the two labels are swapped.

    The classifier does not read the control. Texts without one are scored like those with [positive]. Raises BadInput
    unless the classifier has two labels.
    """

    def __init__(self, model, tokenizer, positive, kind="logit", device="cpu", dtype=torch.float32):
        super().__init__(model, tokenizer, positive, kind, device, dtype)
        if model.config.num_labels != 2:
            raise BadInput(f"task is controlled: it needs a classifier with 2 labels, not {model.config.num_labels}")

    def logits(self, texts):
        controls = [next((c for c in CONTROLS if text.startswith(c)), "") for text in texts]
        logits = super().logits([text[len(control) :] for text, control in zip(texts, controls)])
        negative = torch.tensor([control == CONTROLS[0] for control in controls])
        return torch.where(negative[:, None], logits.flip(1), logits)


class Teachers:
    """Several classifiers as one teacher: the mean of their log-odds."""

    def __init__(self, classifiers):
        self.classifiers = classifiers

    def log_odds(self, texts):
        """Return log(p / (1 - p)) of the positive label, (len(texts),) float32."""
        return torch.stack([classifier.log_odds(texts).float() for classifier in self.classifiers]).mean(0)


CLASSIFIERS = {"positive": SentimentReward, "controlled": ControlledReward}  # by task


def open_classifier(name, dropout=None):
    """Return (classifier, tokenizer) of a folder or hub name.

    dropout: set for training; the model then has the labels NEGATIVE and POSITIVE, and a new head if it lacks one.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, logging

    logging.disable_progress_bar()
    changes = {}
    if dropout is not None:
        logging.set_verbosity_error()  # no warning that the head is new
        changes = LABELS | dropouts(dropout)
    folder = locate(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **changes)
        model = AutoModelForSequenceClassification.from_pretrained(folder, config=config, dtype=torch.float32)
    except Exception as error:  # transformers raises whatever its readers do
        raise BadInput(f"classifier {name} cannot be read: {first_line(error)}") from None
    if dropout is not None:  # copied, since its weights are mapped to a file, which Windows would not replace
        model = copy.deepcopy(model)
    return model, load_tokenizer(folder)


def dropouts(p):
    """Return the entries of config.json for a dropout of p, by the names of BERT and of GPT-2.

    Attention weights have none: with it, a CPU would keep all of them (B x heads x L x L) for the backward pass.
    """
    hidden = "hidden_dropout_prob", "embd_pdrop", "resid_pdrop"
    attention = "attention_probs_dropout_prob", "attn_pdrop"
    return dict.fromkeys(hidden, p) | dict.fromkeys(attention, 0.0)


def log_odds(logits, positive):
    """Return z_pos - logsumexp of the other labels: (B, labels) -> (B,)."""
    others = torch.cat([logits[:, :positive], logits[:, positive + 1 :]], dim=1)
    return logits[:, positive] - others.logsumexp(1)


def positive_index(id2label, positive_label, name, flag="positive_label"):
    """Return the index of the positive label, which is found by its name.

    The name is positive_label; if that is empty, POSITIVE or POS, or the entry of KNOWN_LABELS for the model `name`.
    Raises BadInput, with the flag that sets positive_label, unless exactly one label has such a name.
    """
    names = (positive_label,) if positive_label else POSITIVE_NAMES + KNOWN_LABELS.get(name.partition("@")[0], ())
    lower = [n.lower() for n in names]
    matches = [int(index) for index, label in id2label.items() if str(label).lower() in lower]
    if len(matches) == 1 and len(id2label) > 1 and 0 <= matches[0] < len(id2label):
        return matches[0]
    hint = "it needs at least two labels" if len(id2label) < 2 else f"name the positive one by --{flag}"
    raise BadInput(
        f"classifier {name} has labels {dict(id2label)}: exactly one must be {' or '.join(map(repr, names))}; {hint}"
    )


def token_limit(config, tokenizer):
    """Return the longest input in tokens: the smaller of the limits of tokenizer and model, which may have none."""
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1  # their positions start after the padding's
    return int(min(tokenizer.model_max_length, positions, 1_000_000))


def tokenize(tokenizer, texts, max_length):
    """Return the ids of texts with [CLS] and [SEP]. Long texts lose their beginning: the response is at the end."""
    tokenizer.truncation_side = "left"
    return tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False, verbose=False)


def load_judge(cfg, device, dtype=torch.float32):
    """Return the classifier cfg.judge, or None if it is empty."""
    if not cfg.judge:
        return None
    cls = CLASSIFIERS[cfg.task]
    return cls.load(cfg.judge, cfg.judge_positive_label, device=device, dtype=dtype, flag="judge_positive_label")


def load_reward(cfg, device, dtype=torch.float32):
    """Return cfg.reward as a function from B texts to (B,) scores: a classifier, or the user's file.py:function."""
    file, _, function = cfg.reward.rpartition(":")
    if cfg.reward.endswith(".py"):
        raise BadInput(f"reward {cfg.reward}: add the name of the function, {cfg.reward}:function")
    if not file.endswith(".py"):
        return CLASSIFIERS[cfg.task].load(cfg.reward, cfg.positive_label, cfg.reward_kind, device, dtype)
    return FunctionReward(file, function)


def load_rewards(cfg, device, dtype=torch.float32):
    """Return the reward and the judge (None if cfg.judge is empty), both checked."""
    reward_fn, judge = load_reward(cfg, device, dtype), load_judge(cfg, device, dtype)
    if cfg.self_check:
        print("self-check: reward:", check_reward(reward_fn))
        print("self-check: judge:", check_reward(judge, "judge") if judge else "none", flush=True)
    return reward_fn, judge


class FunctionReward:
    """A function of a user as the reward: list of B texts -> B scores. Its exceptions become BadInput."""

    truncated_frac = 0.0  # see SentimentReward

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
        """Turn exceptions of the user's code into BadInput with their type, message and line in the user's file."""
        try:
            yield
        except BadInput as error:  # raised by as_scores
            raise BadInput(f"reward {self.name}: {error}") from None
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.file]
            where = f", line {lines[-1]}" if lines else ""
            raise BadInput(
                f"reward {self.name} raised {type(error).__name__} while {doing}{where}: {first_line(error)}"
            ) from error


def scored(reward_fn, texts):
    """Return (scores, positive) of texts, (B,) float32 on the CPU each, from one forward pass.

    positive is 1 if the classifier finds a text positive, else 0; it is None if the reward is a user's function.
    """
    if isinstance(reward_fn, SentimentReward):
        logits = reward_fn.logits(texts)
        return reward_fn.score(logits), (log_odds(logits, reward_fn.positive) > 0).float()
    return as_scores(reward_fn(texts), texts), None


def scores_so_far(score, ids, prompt_len, tokenizer, cfg):
    """Return the score of the text before each token of a response: ids (B, P + T) -> (B, T).

    score: function of B texts, returns (B,). Texts are scored every cfg.shaping_every tokens; those between have the
    score before them.
    """
    length, every = ids.shape[1] - prompt_len, cfg.shaping_every
    texts = (decode(ids[:, : prompt_len + t], tokenizer) for t in range(0, length, every))
    return torch.stack([score(part) for part in texts], 1).repeat_interleave(every, 1)[:, :length]


def reward_fingerprint(reward_fn):
    """Return the fingerprint of a classifier and its tokenizer, or of a user's function and its file; "" for None."""
    if isinstance(reward_fn, Teachers):
        return fingerprint(*map(reward_fingerprint, reward_fn.classifiers))
    if isinstance(reward_fn, SentimentReward):
        if reward_fn.fingerprint:
            return reward_fn.fingerprint
        config = {name: value for name, value in reward_fn.model.config.to_dict().items() if "version" not in name}
        return fingerprint(reward_fn.model, str(config), str(reward_fn.positive), tokenizer_text(reward_fn.tokenizer))
    if isinstance(reward_fn, FunctionReward):
        return fingerprint(Path(reward_fn.file).read_text(encoding="latin-1"), reward_fn.name.rpartition(":")[2])
    return ""


def as_scores(scores, texts):
    """Return the output of a reward as (len(texts),) float32; raise BadInput unless it is one number per text."""
    scores = torch.as_tensor(scores, dtype=torch.float32).detach()
    if scores.shape != (len(texts),):
        raise BadInput(f"score: {len(texts)} texts need shape ({len(texts)},), not {tuple(scores.shape)}")
    return scores


def check_finite(what, values, texts):
    """Raise NotFinite, with the first such text, if any of the values (B,) is not finite."""
    if not values.isfinite().all():
        row = int((~values.isfinite()).nonzero()[0])
        raise NotFinite(f"{what} of text {row} is {values[row].item()}: {texts[row]!r}")


def check_reward(reward_fn, name="reward"):
    """Score the probe sentences and return a summary; raise BadInput if a classifier ranks them wrongly.

    Its log-odds must be higher by 1 on positive sentences, on average. A user's function may reward anything: it only
    has to return one finite number per text.
    """
    texts = [text for pair in PROBES for text in pair]
    if isinstance(reward_fn, SentimentReward):
        odds = reward_fn.log_odds(texts)
        gap = (odds[0::2] - odds[1::2]).mean().item()
        if not gap > 1:
            label = reward_fn.model.config.id2label[reward_fn.positive]
            raise BadInput(
                f"the {name} ranks probe sentences wrongly: the log-odds of {label!r} must be higher by 1 on positive "
                f"than on negative sentences, not by {gap:.2f}: is this the positive label, and is the model trained?"
            )
        return f"probe sentences {gap:.1f} log-odds apart"
    scores = as_scores(reward_fn(texts), texts)
    check_finite("score", scores, texts)
    return f"probe sentences scored {scores.min():.2f} to {scores.max():.2f}"


# ---- training


def training_texts(texts, epoch, cfg):
    """Return the texts of an epoch: a crop_share of them cropped to a run of words, half of these at the beginning.

    Reviews are long, but PPO scores short texts, a prompt and its response: classifiers must be trained on short ones.
    """
    rng = np.random.default_rng([cfg.seed, 2, epoch])
    out = []
    for text in texts:
        words = text.split(" ")
        if rng.random() < cfg.crop_share and len(words) > cfg.min_crop_words:
            spread = min(cfg.max_crop_words, len(words)) / cfg.min_crop_words
            length = int(cfg.min_crop_words * spread ** rng.random())  # log-uniform
            start = rng.integers(len(words) - length + 1) if rng.random() < 0.5 else 0  # prompts are beginnings
            text = " ".join(words[start : start + length])
        out.append(text)
    return out


@torch.no_grad()
def generated_texts(generator, texts, epoch, cfg):
    """Return cfg.generated texts of an epoch: beginnings of the texts, continued by a GPT-2 at temperature 1.

    generator: (GPT2, tokenizer). A beginning has 2 to 8 tokens, as PPO's prompts have, and at most max_crop_words
    tokens follow. A teacher has not seen these texts, so that it cannot repeat the labels that it was trained on.
    """
    gpt2, tokenizer = generator
    device, rng, out = gpt2.wte.weight.device, np.random.default_rng([cfg.seed, 8, epoch]), []
    beginnings = [text[:200] for text in texts]
    while len(out) < cfg.generated:
        length, new = rng.integers(2, 9), rng.integers(cfg.min_crop_words, cfg.max_crop_words + 1)
        ids = encode([beginnings[i] for i in rng.integers(len(texts), size=128)], tokenizer)
        rows = [row[:length] for row in ids if len(row) >= length]
        if not rows:
            raise BadInput(f"no review begins with {length} tokens, for texts by the generator")
        prompts = torch.tensor(rows).to(device)
        key = cfg.seed, 8, epoch, len(out)
        sequences = gpt2.generate(prompts, int(new), 1.0, tokenizer.eos_token_id, random_generator(device, *key))
        out += decode(sequences, tokenizer)
    return out[: cfg.generated]


def small_classifier(texts, cfg):
    """Return a BERT of cfg's sizes with random weights, and a WordPiece tokenizer trained on the texts."""
    from transformers import BertConfig, BertForSequenceClassification

    print(f"training a tokenizer of {cfg.vocab_size:,} tokens", flush=True)
    tokenizer = train_wordpiece(texts, cfg.vocab_size)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=cfg.hidden_size, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, intermediate_size=4 * cfg.hidden_size,
        max_position_embeddings=cfg.max_length, hidden_dropout_prob=cfg.dropout, attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id, **LABELS,
    )  # fmt: skip
    return BertForSequenceClassification(config), tokenizer


def train(name, classifier, reviews, cfg, teacher=None, generator=None):
    """Train a SentimentReward on reviews and write it to <out>/<name>; return the seconds of the run.

    With a teacher, which has a method log_odds, the targets are its probabilities instead of the labels (Hinton et al.
    2015): many crops of a positive review are neutral. With a generator, see generated_texts, each epoch also has texts
    without labels. Batches contain texts of similar length.
    """
    seed, out = cfg.seed + (name == "judge"), Path(cfg.out, name)
    model, tokenizer, device = classifier.model.train(), classifier.tokenizer, classifier.device
    optimizers = make_optimizers(model, [], cfg.lr, cfg.weight_decay)
    stepper = Stepper(model, optimizers, cfg.grad_clip, dtype=classifier.dtype)
    inputs = {"texts": fingerprint(*reviews.texts), "tokenizer": fingerprint(tokenizer_text(tokenizer))}
    inputs["teacher"] = reward_fingerprint(teacher)
    inputs["generator"] = fingerprint(generator[0], tokenizer_text(generator[1])) if generator else ""
    checkpoints = Checkpoints(cfg, out, model, optimizers, inputs, {"stepper": stepper})
    log = RunLog(cfg, part=name, first_step=checkpoints.first_step)
    per_epoch = math.ceil((len(reviews.texts) + (cfg.generated if generator else 0)) / cfg.batch_size)
    steps, epoch = math.ceil(cfg.epochs * per_epoch), None
    measure = "agreement" if teacher else "accuracy"  # with the teacher, with the labels
    for step in log.progress(checkpoints, steps, f"train the {name}", "step"):
        if epoch != step // per_epoch:
            epoch = step // per_epoch
            texts = training_texts(reviews.texts, epoch, cfg)
            texts += generated_texts(generator, reviews.texts, epoch, cfg) if generator else []
            ids = tokenize(tokenizer, texts, classifier.max_length)
            batches = length_batches([len(row) for row in ids["input_ids"]], cfg.batch_size, [seed, 3, epoch])
        rows = batches[step % per_epoch]
        batch = tokenizer.pad({key: [values[i] for i in rows] for key, values in ids.items()}, return_tensors="pt")
        torch.manual_seed(seed_of(seed, step))  # of dropout
        with classifier.autocast():
            logits = model(**batch.to(device)).logits
        if teacher:
            positive = teacher.log_odds([texts[i] for i in rows]).sigmoid()
        else:
            positive = torch.from_numpy(reviews.labels[rows]).float()
        loss = F.cross_entropy(logits.float(), torch.stack([1 - positive, positive], dim=1).to(device))
        stepper.backward(loss)
        share = warm_up_and_decay(step, steps)
        stepper.set_lr(share)
        loss, agreeing = loss.item(), (logits.argmax(1).cpu() == (positive > 0.5)).float().mean().item()
        metrics = {"loss": loss, measure: agreeing, "lr": cfg.lr * share, "grad_norm": stepper.step()}
        log.write(step, **metrics, skipped_steps=stepper.skipped)
        log.bar.set_postfix({"loss": f"{loss:.3f}", measure: f"{agreeing:.2f}"}, refresh=False)
    model.eval().to(DTYPES[cfg.save_dtype])
    with replacing(out, model.state_dict()) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model.float()  # so that report measures the saved precision
    return log.close()


def length_batches(lengths, batch_size, key):
    """Return batches of similar length (little padding) in random order: a list of index arrays, each text once."""
    rng = np.random.default_rng(key)
    order = rng.permutation(len(lengths))
    pool = 50 * batch_size  # sort within pools only, so that batches differ between epochs
    pools, lengths = np.split(order, range(pool, len(order), pool)), np.array(lengths)
    order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in pools])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def calibration_error(probabilities, labels, bins=10):
    """Return the expected calibration error (Guo et al. 2017, Eq. 3) of probabilities of POSITIVE."""
    number = np.minimum((probabilities * bins).astype(int), bins - 1)
    members = [number == b for b in np.unique(number)]
    return float(sum(abs((probabilities - labels)[rows].mean()) * rows.mean() for rows in members))


def report(classifier, reviews, cfg):
    """Return accuracy and calibration error on whole reviews and on texts as short as PPO's.

    Also return a histogram of the log-odds of short texts, for negative and for positive ones.
    """
    results = {}
    short_texts = [" ".join(text.split(" ")[: cfg.short_words]) for text in reviews.texts]
    for name, texts in (("reviews", reviews.texts), ("short_texts", short_texts)):
        odds = classifier.log_odds(texts)
        probabilities = odds.sigmoid().numpy().astype(float)
        results[name] = {
            "accuracy": float(((probabilities > 0.5) == reviews.labels).mean()),
            "calibration_error": calibration_error(probabilities, reviews.labels),
        }
    # those of the short texts, the last of the loop; in float32, odds that are almost equal do not make 24 bins
    odds = odds.double().numpy()
    edges = np.histogram_bin_edges(odds, bins=24)
    negative, positive = (np.histogram(odds[reviews.labels == label], edges)[0].tolist() for label in (0, 1))
    return results | {"histogram": {"edges": edges.tolist(), "negative": negative, "positive": positive}}


def sentiment_baseline(parts, cfg):
    """Return a LinearClassifier of sentiment, trained on parts, a list of Reviews: whole, and on training_texts."""
    texts, labels = [], []
    for reviews in parts:
        texts += reviews.texts + [text for i in range(LINEAR_EPOCHS) for text in training_texts(reviews.texts, i, cfg)]
        labels += reviews.labels.tolist() * (1 + LINEAR_EPOCHS)
    return LinearClassifier().fit(texts, labels)


def load_teacher(names, reviews, cfg, device, dtype):
    """Return the classifiers with these names as one teacher, or None if there are none.

    "linear" is a linear classifier of words and word pairs, trained here on the labels of the reviews.
    """
    teachers = []
    for name in names:
        if name == "linear":
            print("training the linear teacher", flush=True)
            teachers.append(sentiment_baseline([reviews], replace(cfg, seed=cfg.seed + 2)))  # not the student's crops
        else:
            teachers.append(SentimentReward.load(name, device=device, dtype=dtype))
    return Teachers(teachers) if teachers else None


def load_generator(cfg, device, dtype):
    """Return (GPT2, tokenizer) of cfg.generator."""
    folder, config, tokenizer = open_gpt2(cfg.generator)
    if 8 + cfg.max_crop_words > config.n_positions:
        raise BadInput(
            f"max_crop_words {cfg.max_crop_words} + 8 is over the {config.n_positions} positions of generator"
        )
    return load_gpt2(folder, config, len(tokenizer), dtype).to(device), tokenizer


def tokens_of(texts, cfg):
    """Return about how many tokens of these texts a classifier reads: one per 4 characters."""
    return sum(min(cfg.max_length, len(text) / 4) for text in texts)


def each(folder):
    """Return {"reward": ..., "judge": ...}: the subfolders reward/ and judge/ of a folder, else the same name twice."""
    inside = {name: f"{folder}/{name}" for name in ("reward", "judge")}
    return inside if folder and any(Path(path).is_dir() for path in inside.values()) else dict.fromkeys(inside, folder)


def main(cfg):
    refuse_processes("reward.py")
    names = [cfg.only] if cfg.only else ["reward", "judge"]
    check_run(cfg, *(f"{name}/{RESULTS}" for name in names))
    device, dtype = pick_device(cfg)
    starts = {name: each(cfg.init_from)[name] for name in names}
    folders = [folder.strip() for folder in cfg.teacher.split(",") if folder.strip()]
    teachers = {name: [each(folder)[name] for folder in folders] for name in names}
    for name in (*starts.values(), *chain(*teachers.values())):
        if name not in ("scratch", "linear"):
            locate(name)
    if "linear" in folders:
        LinearClassifier()  # raises BadInput without scikit-learn
    generator = load_generator(cfg, device, dtype) if cfg.generator else None
    splits = load_splits(cfg.dataset, cfg.text_column, cfg.label_column)
    held_out = Reviews(*(rows[: cfg.eval_reviews] for rows in splits["evaluation"]))
    if not cfg.resume:  # a judge of an earlier run must not count as finished when this run is resumed
        for name in starts:
            Path(cfg.out, name, RESULTS).unlink(missing_ok=True)
    for name, start in starts.items():
        labelled, out, seed = splits[name], Path(cfg.out, name), cfg.seed + (name == "judge")
        reviews = Reviews(language_model_texts(splits), None) if cfg.unlabelled else labelled
        data = fingerprint(*reviews.texts)
        if cfg.resume and (out / RESULTS).is_file():
            if read_json(out / RESULTS).get("data") != data:
                raise BadInput(f"{out} was trained on other texts: --force without --resume replaces the run")
            delete_checkpoints(out)  # left by a run that was killed before it deleted them
            print(f"the {name} is already trained")
            continue
        torch.manual_seed(seed)  # of new weights
        opened = small_classifier(reviews.texts, cfg) if start == "scratch" else open_classifier(start, cfg.dropout)
        model, tokenizer = opened
        trained, evaluated = tokens_of(training_texts(reviews.texts, 0, cfg), cfg), tokens_of(held_out.texts, cfg)
        passes = 4 if cfg.teacher else 3  # a backward pass takes twice as long as a forward pass
        written = cfg.generated * (cfg.min_crop_words + cfg.max_crop_words) / 2 if generator else 0  # tokens per epoch
        trained += written
        flops = classifier_flops(model, passes * cfg.epochs * trained + 2 * evaluated)
        flops += generator[0].flops(cfg.epochs * written, cfg.epochs * written) if generator else 0
        rows = {
            "from": start,
            "teacher": " and ".join(teachers[name]) or "none: the labels",
            "reviews": f"{len(reviews.texts):,} for training, {len(held_out.texts):,} held out",
            "device": device,
            **time_on_cpu(flops, cfg, device),
        }
        print(sheet(f"training the {name}", rows), flush=True)
        tokenizer.model_max_length = min(tokenizer.model_max_length, cfg.max_length)  # longer texts are truncated
        classifier = SentimentReward(model, tokenizer, positive=1, device=device, dtype=dtype)
        teacher = load_teacher(teachers[name], labelled, cfg, device, dtype)
        before = report(classifier, held_out, cfg)
        del before["histogram"]
        seconds = train(name, classifier, reviews, cfg, teacher, generator)
        after = report(classifier, held_out, cfg)
        results = {"data": data, "parameters": sum(p.numel() for p in model.parameters()), "seconds": seconds}
        results |= {"held_out": len(held_out.texts), "before": before, "after": after}
        write_text(out / RESULTS, json.dumps(results, indent=1))
        delete_checkpoints(out)
        for part, texts in (("reviews", "reviews"), ("short_texts", f"first {cfg.short_words} words")):
            accuracy, error = after[part].values()
            print(
                f"{name}, {len(held_out.texts):,} held-out {texts}: accuracy {before[part]['accuracy']:.1%} before, "
                f"{accuracy:.1%} after; calibration error {error:.3f}"
            )


if __name__ == "__main__":
    run(main, RewardConfig)
