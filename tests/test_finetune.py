"""Fine-tuning: order of the data, targets, learning rate, perplexity, and whole runs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import message, reviews_csv

import finetune_gpt2
from config import FinetuneConfig
from data import block_order, encode, language_model_texts, load_splits, pack
from finetune_gpt2 import blocks, learning_rate, load_teacher, soft_targets, train_step, validate, validation_texts
from model import GPT2, GPT2Config
from runtime import checkpoint
from runtime.checkpoint import CARD_MARK, fingerprint, latest_checkpoint, load_checkpoint, save_checkpoint
from runtime.errors import BadInput, Finished
from runtime.hub import load_gpt2, open_gpt2, read_tensors, save_gpt2
from runtime.log import RunLog
from runtime.optimizer import Stepper

LN2 = math.log(2)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tiny(vocab_size=20, n_layer=1, dtype=torch.float64):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size, n_positions=32, n_embd=32, n_layer=n_layer, n_head=2)).init_weights()
    with torch.no_grad():
        model.wte.weight.mul_(10)  # so that tokens are not equally likely
    return model.to(dtype)


# ---- order and targets


def test_the_learning_rate_warms_up_linearly_and_ends_at_min_lr():
    """As in nanoGPT. Detects schedules that start at 0 or do not reach min_lr."""
    cfg = FinetuneConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    lr = [learning_rate(step, 100, cfg) for step in range(100)]
    assert lr[0] == pytest.approx(1 / 11)
    assert lr[9] == pytest.approx(10 / 11)
    assert lr[10] == 1.0
    assert lr[99] == pytest.approx(0.1)
    assert lr[10:] == sorted(lr[10:], reverse=True)
    assert learning_rate(0, 1, FinetuneConfig(warmup_steps=0)) == FinetuneConfig().lr  # a run of a single step


def test_an_epoch_has_every_block_once_in_an_order_that_depends_on_epoch_and_seed():
    """Detects sampling with replacement."""

    def epochs(seed):
        return np.concatenate([block_order(step, 10, 4, 30, seed) for step in range(8)]).reshape(3, 10).tolist()

    first = epochs(seed=0)
    assert all(sorted(epoch) == list(range(10)) for epoch in first)
    assert first[0] != first[1] != first[2] != first[0]
    assert epochs(seed=0) == first
    assert epochs(seed=1) != first


@pytest.mark.parametrize(("blocks", "sizes"), [(10, [4, 4, 2]), (7, [4, 3]), (12, [4, 4, 4]), (5, [4, 1])])
def test_the_last_step_has_the_remaining_blocks(blocks, sizes):
    assert [len(block_order(step, 10, 4, blocks, seed=0)) for step in range(len(sizes))] == sizes


def test_a_target_is_the_next_token_also_if_that_is_the_end_of_text():
    """Shifted by one, also from block to block. Detects an end of text that is masked because it is the padding."""
    stream = np.array([5, 6, 0, 7, 8, 0, 9], dtype=np.int32)  # 0 ends a review
    x, y = blocks(stream, np.array([1, 0]), 3)
    assert x.tolist() == [[7, 8, 0], [5, 6, 0]]
    assert y.tolist() == [[8, 0, 9], [6, 0, 7]]
    assert x.dtype == y.dtype == torch.int64


# ---- a teacher


def test_the_targets_mix_the_probabilities_of_the_teacher_and_the_next_token():
    teacher, (x, y) = tiny(), torch.randint(20, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    targets = soft_targets(teacher, x, y, 0.3)
    probs = teacher(x).softmax(-1).flatten(0, 1)
    for target, p, token in zip(targets, probs, y.flatten()):
        one_hot = torch.eye(20, dtype=torch.float64)[token]
        torch.testing.assert_close(target, 0.3 * p + 0.7 * one_hot)
    assert not targets.requires_grad


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_gradient_is_zero_for_a_model_that_equals_its_teacher(micro_batch_size):
    """If all targets are its probabilities. Otherwise it is a share of the gradient without a teacher."""
    x, y = torch.randint(20, (2, 4, 8), generator=torch.Generator().manual_seed(0))

    def gradient(share, teacher):
        model = tiny()
        cfg = FinetuneConfig(batch_size=4, micro_batch_size=micro_batch_size, teacher_share=share)
        train_step(Stepper(model, [], 1.0), x, y, cfg, teacher)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert gradient(1.0, tiny()).abs().max() < 1e-12
    torch.testing.assert_close(gradient(0.25, tiny()), 0.75 * gradient(0.0, None))


def test_a_teacher_needs_the_tokenizer_of_the_model_and_its_context(gpt2_folder, tokenizer, tmp_path):
    cfg = FinetuneConfig(teacher=str(gpt2_folder), block_size=8)
    opened = open_gpt2(cfg.teacher)
    teacher = load_teacher(cfg, opened, tokenizer, torch.float32, "cpu")
    assert not any(p.requires_grad for p in teacher.parameters())
    assert load_teacher(cfg, None, tokenizer, torch.float32, "cpu") is None
    too_long = replace(cfg, block_size=teacher.config.n_positions + 1)
    assert "block_size" in message(load_teacher, too_long, opened, tokenizer, torch.float32, "cpu")
    other = finetune_gpt2.train_bpe(["a film of another town"] * 9, 300)
    assert "another tokenizer" in message(load_teacher, cfg, opened, other, torch.float32, "cpu")


# ---- dropout


def test_dropout_changes_the_training_loss_and_not_the_validation():
    """validate leaves the model in train mode. Detects a validation with dropout and a training without it."""
    model, (x, y) = tiny(), torch.randint(20, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    cfg = FinetuneConfig(batch_size=4, micro_batch_size=4)

    def loss(p, seed=0):
        model.set_dropout(p)
        torch.manual_seed(seed)
        return train_step(Stepper(model, [], 1.0), x, y, cfg).item()

    def validation(p):
        model.set_dropout(p)
        return validate(model, STREAM, 100, 8, 2, eos_id=3)

    assert loss(0.0) == loss(0.0, seed=1)
    model.set_dropout(0.5)
    assert [module.dropout.p for module in (model, *model.h)] == [0.5, 0.5]
    assert validation(0.0) == validation(0.5)
    assert loss(0.5) == loss(0.5) and loss(0.5) != loss(0.5, seed=1) != loss(0.0)


# ---- perplexity


class Certain(torch.nn.Module):
    """A model that predicts token 0: with probability 1 (an NLL of 0) in blocks of 18, 1/e (an NLL of 1) in others."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        p = torch.tensor([1.0, 0.0] if x.shape[1] == 18 else [1 / math.e, 1 - 1 / math.e])
        return p.log().clamp(min=-1e4).expand(*x.shape, 2)


def test_perplexity_is_over_all_tokens_and_not_a_mean_over_batches():
    """18 tokens with NLL 0 and 2 with NLL 1: e^(2/20); a mean over batches would give e^.5. Bits likewise."""
    perplexity, bits = validate(Certain(), np.zeros(20), 10, 18, 4, eos_id=0)
    assert perplexity == pytest.approx(math.exp(0.1), abs=1e-6)
    assert bits == pytest.approx(2 / LN2 / 10, abs=1e-6)


STREAM = np.random.default_rng(0).integers(0, 20, 45)  # five blocks of 8, and 5 tokens


def test_validation_equals_the_perplexity_computed_token_by_token():
    """The context of a token is its block; <|endoftext|> precedes the first one; the incomplete block counts."""
    model, context, nll = tiny(), [3, *STREAM[:-1].tolist()], 0.0
    for i, target in enumerate(STREAM.tolist()):
        block = torch.tensor([context[i // 8 * 8 : i + 1]])
        nll -= model(block)[0, -1].log_softmax(-1)[target].item()
    perplexity, bits = validate(model, STREAM, 100, 8, 2, eos_id=3)
    assert perplexity == pytest.approx(math.exp(nll / 45), rel=1e-9)
    assert bits == pytest.approx(nll / LN2 / 100, rel=1e-9)


@pytest.mark.parametrize("block_size", [8, 9, 32])
def test_the_perplexity_does_not_depend_on_the_batch_size(block_size):
    model = tiny(dtype=torch.float32)
    perplexities = [validate(model, STREAM, 100, block_size, batch_size, 0)[0] for batch_size in (1, 2, 3, 100)]
    assert perplexities == pytest.approx([perplexities[0]] * 4, rel=1e-6)


def test_validation_does_not_change_the_model():
    model = tiny()
    before = [parameter.clone() for parameter in model.parameters()]
    assert validate(model, STREAM, 100, 8, 2, 0) == validate(model, STREAM, 100, 8, 2, 0)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters()))


def test_the_validation_stream_has_as_many_whole_reviews_as_needed(tokenizer):
    texts = ["A good film.", "A bad film.", "A great film.", "x"]
    lengths = [len(ids) + 1 for ids in encode(texts, tokenizer)]
    assert validation_texts(texts, tokenizer, 1) == texts[:1]
    assert validation_texts(texts, tokenizer, lengths[0]) == texts[:1]
    assert validation_texts(texts, tokenizer, lengths[0] + 1) == texts[:2]
    assert validation_texts(texts, tokenizer, 10_000) == texts


# ---- training steps


def gradients(micro_batch_size, rows):
    model = tiny(n_layer=2)
    x = torch.from_numpy(np.random.default_rng(1).integers(0, 20, (rows, 9)))
    cfg = FinetuneConfig(batch_size=4, micro_batch_size=micro_batch_size)
    loss = train_step(Stepper(model, [], 1.0), x[:, :-1], x[:, 1:], cfg)
    return [loss, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("rows", [4, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_gradient_does_not_depend_on_the_micro_batch_size(micro_batch_size, rows):
    """Also if the batch has a row less, as in the last step of a run: detects a mean of means of unequal parts."""
    for gradient, expected in zip(gradients(micro_batch_size, rows), gradients(4, rows)):
        torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)


def learn(model, x, y, steps):
    """Train on the whole batch with Adam and train_step; return the last loss."""
    stepper = Stepper(model, [torch.optim.Adam(model.parameters(), 1e-2)], math.inf)
    for _ in range(steps):
        loss = train_step(stepper, x, y, FinetuneConfig(batch_size=len(x), micro_batch_size=len(x)))
        stepper.step()
    return loss.item()


def test_a_model_can_memorize_eight_blocks():
    stream = np.random.default_rng(0).integers(0, 20, 8 * 16 + 1)
    assert learn(tiny(n_layer=2, dtype=torch.float32), *blocks(stream, np.arange(8), 16), 120) < 0.1


def test_a_model_trained_on_reviews_of_three_tokens_stops_after_three(tokenizer):
    """Detects an end of text that is not a target: such a model never stops."""
    words = [f"{a}{b}{c}" for a in "abc" for b in "def" for c in "ghi"]
    docs = [word for word, ids in zip(words, encode(words, tokenizer)) if len(ids) == 3]
    stream = pack(docs * 10, tokenizer)
    assert len(docs) > 10
    assert len(stream) == len(docs) * 10 * 4
    model = tiny(len(tokenizer), dtype=torch.float32)
    n_blocks = (len(stream) - 1) // 15  # so that the end is not always at the same place in a block
    learn(model, *blocks(stream, np.arange(n_blocks), 15), 100)
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end, *encode([word], tokenizer)[0]] for word in docs])
    probabilities = model(ids).softmax(-1)[..., end]  # of the end, after <|endoftext|> and after each token
    assert (probabilities[:, 3] > 0.9).all()
    assert (probabilities[:, :3] < 0.1).all()


# ---- whole runs


@pytest.fixture(scope="module")
def steppers():
    """The Stepper of scratch_run, in a list."""
    return []


@pytest.fixture(scope="module")
def scratch_run(tmp_path_factory, steppers):
    """(config, lines of log.jsonl) of a run from random weights on toy reviews."""
    folder = tmp_path_factory.mktemp("run")
    cfg = FinetuneConfig(
        dataset=str(reviews_csv(folder / "toy.csv")), init_from="scratch", out=str(folder / "out"), vocab_size=400,
        n_layer=1, n_head=2, n_embd=32, n_positions=32, block_size=32, batch_size=8, micro_batch_size=4, epochs=1.5,
        lr=1e-2, min_lr=1e-3, warmup_steps=5, eval_every=20, eval_tokens=500, report_to="none",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(finetune_gpt2, "Stepper", lambda *args: steppers.append(Stepper(*args)) or steppers[-1])
        finetune_gpt2.main(cfg)
    return cfg, [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]


def perplexity_of(name, cfg, load):
    """Return (perplexity, bits per character) of a folder's model on the validation stream of a run with cfg.

    load: a function like load_gpt2.
    """
    folder, config, tokenizer = open_gpt2(str(name))
    texts = validation_texts(load_splits(cfg.dataset)["prompts"].texts, tokenizer, cfg.eval_tokens)
    stream, end = pack(texts, tokenizer), tokenizer.eos_token_id
    return validate(load(folder, config, len(tokenizer)), stream, sum(map(len, texts)), cfg.block_size, 4, end)


def test_a_run_in_float16_equals_one_in_float32_up_to_rounding(scratch_run, tmp_path, monkeypatch):
    """Its gradients are scaled: the norms that are logged are those without the scale."""
    made, stepper = [], Stepper
    monkeypatch.setattr(finetune_gpt2, "Stepper", lambda *args: made.append(stepper(*args)) or made[0])
    finetune_gpt2.main(replace(scratch_run[0], out=str(tmp_path), dtype="fp16"))
    low = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert made[0].scaler.is_enabled() and made[0].model.dtype == torch.float16
    for ours, theirs in zip(low[:10], scratch_run[1]):
        assert [ours[name] for name in ("loss", "grad_norm")] == pytest.approx(
            [theirs[name] for name in ("loss", "grad_norm")], rel=0.01
        )
    assert low[-1]["val_perplexity"] == pytest.approx(scratch_run[1][-1]["val_perplexity"], rel=0.02)


def test_a_run_from_scratch_logs_every_step_and_the_validation_perplexity_falls(scratch_run):
    cfg, lines = scratch_run
    steps = lines[-1]["step"]
    perplexities = {line["step"]: line["val_perplexity"] for line in lines if "val_perplexity" in line}
    assert [line["step"] for line in lines] == list(range(steps + 1))
    assert list(perplexities) == sorted({*range(0, steps, 20), steps})
    assert {"seconds", "tokens", "loss", "lr", "grad_norm", "skipped_steps"} <= set(lines[1])
    assert {"val_perplexity", "val_bits_per_character"} <= set(lines[0]) & set(lines[-1])
    assert perplexities[0] == pytest.approx(400, rel=0.1)  # of random weights: about the size of the vocabulary
    assert perplexities[steps] < 0.2 * perplexities[0]
    results = json.loads(Path(cfg.out, "results.json").read_text())
    assert lines[3]["tokens"] == 3 * 8 * 32
    assert lines[-1]["tokens"] == results["tokens"] < steps * 8 * 32  # the last batch is smaller
    assert lines[0]["lr"] == pytest.approx(cfg.lr / 6)
    assert lines[steps - 1]["lr"] == pytest.approx(cfg.min_lr)


def test_a_run_with_a_teacher_follows_it(scratch_run, tmp_path, capsys):
    """The student starts from other weights, and its distribution becomes the teacher's; without a teacher, less so."""
    cfg, lines = scratch_run
    x = torch.tensor(open_gpt2(cfg.out)[2].encode("A good film. A bad film. I liked it."))[None]

    def logprobs(out):
        folder, config, tokenizer = open_gpt2(out)
        return load_gpt2(folder, config, len(tokenizer))(x).log_softmax(-1)

    taught, distances = logprobs(cfg.out), {}
    for teacher in (cfg.out, ""):
        out = str(tmp_path / f"student{len(teacher)}")
        finetune_gpt2.main(replace(cfg, out=out, teacher=teacher, teacher_share=1.0, seed=1, epochs=3))
        assert f"  teacher          {teacher or 'none'}\n" in capsys.readouterr().out
        distances[teacher] = (taught.exp() * (taught - logprobs(out))).sum(-1).mean().item()
    assert distances[cfg.out] < 0.1 and distances[cfg.out] < 0.5 * distances[""], distances


def test_the_folder_has_the_best_weights_and_the_config_of_the_run(scratch_run):
    cfg, lines = scratch_run
    best = min(line["val_perplexity"] for line in lines if "val_perplexity" in line)
    saved = json.loads(open(f"{cfg.out}/run_config.json").read())
    assert perplexity_of(cfg.out, cfg, load_gpt2)[0] == pytest.approx(best, rel=1e-5)
    assert {name: saved[name] for name in vars(cfg)} == json.loads(json.dumps(vars(cfg)))


def test_the_optimizer_has_the_constants_of_the_config(scratch_run, steppers):
    """AdamW's defaults are betas (.9, .999) and weight decay .01, also of biases. lr must change, not only its log."""
    cfg, _ = scratch_run
    (stepper,) = steppers
    decayed, others = stepper.optimizers[0].param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (cfg.weight_decay, 0)
    assert decayed["betas"] == others["betas"] == (cfg.beta1, cfg.beta2)
    assert decayed["lr"] == others["lr"] == pytest.approx(cfg.min_lr)  # after the last step
    assert stepper.grad_clip == cfg.grad_clip


def test_a_run_is_trained_only_on_the_reviews_of_the_two_classifiers(scratch_run):
    """According to the hash in its results: not on reviews that give prompts or are held out."""
    cfg, _ = scratch_run
    results = json.loads((Path(cfg.out) / "results.json").read_text())
    assert results["data"] == fingerprint(*language_model_texts(load_splits(cfg.dataset)))


def test_transformers_opens_the_folder_and_computes_the_same_perplexity(scratch_run):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    def load(folder, *_):
        model = GPT2LMHeadModel.from_pretrained(folder).eval()
        model.forward = lambda x, forward=model.forward: forward(x).logits
        return model

    cfg, _ = scratch_run
    ours, theirs = (perplexity_of(cfg.out, cfg, loader) for loader in (load_gpt2, load))
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert AutoTokenizer.from_pretrained(cfg.out).eos_token == "<|endoftext|>"


def test_a_run_from_a_folder_starts_at_the_perplexity_of_that_model(gpt2_folder, tmp_path):
    """Detects weights that are read wrongly, or not at all."""
    cfg = FinetuneConfig(
        dataset=str(reviews_csv(tmp_path / "toy.csv")), init_from=str(gpt2_folder), out="out", block_size=40,
        batch_size=4, micro_batch_size=4, epochs=0.05, eval_tokens=500, report_to="none",
    )  # fmt: skip
    finetune_gpt2.main(cfg)
    first = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    perplexity, bits = perplexity_of(gpt2_folder, cfg, load_gpt2)
    assert first["val_perplexity"] == pytest.approx(perplexity, rel=1e-6)
    assert first["val_bits_per_character"] == pytest.approx(bits, rel=1e-6)


# ---- resuming


class Killed(Exception):
    """Raised by a test to end a run as kill -9 would."""


def lines_of(out):
    """Return the lines of log.jsonl without the times."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


@pytest.fixture(scope="module", params=["adamw", "muon"])
def uninterrupted(tmp_path_factory, request):
    """(config, folder) of a run of 10 steps, more than an epoch, with checkpoints."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    cfg = FinetuneConfig(
        dataset=str(reviews_csv(folder / "toy.csv", rows=120)), init_from="scratch", out=str(folder / "out"),
        vocab_size=400, n_layer=1, n_head=2, n_embd=32, n_positions=32, block_size=32, batch_size=8,
        micro_batch_size=4, epochs=1.3, lr=1e-2, warmup_steps=2, eval_every=4, eval_tokens=200, save_every=3,
        save_share=1.0, optimizer=request.param, save_dtype="fp16", report_to="none",
        dropout=0.1 if request.param == "muon" else 0.0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finetune_gpt2.main(cfg)
    return cfg, folder


@pytest.mark.parametrize("killed_in", [4, 7])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    uninterrupted, killed_in, monkeypatch, tmp_path
):
    """Detects a moment of the optimizer, a counter, the best perplexity or a place in the data that is not restored."""
    cfg, folder = uninterrupted
    monkeypatch.chdir(folder)
    resumed, step = replace(cfg, out=str(tmp_path / "out")), finetune_gpt2.train_step

    def die(*args, calls=[]):  # noqa: B006, counts the calls
        calls.append(1)
        if len(calls) > killed_in:
            raise Killed
        return step(*args)

    monkeypatch.setattr(finetune_gpt2, "train_step", die)
    with pytest.raises(Killed):
        finetune_gpt2.main(resumed)
    monkeypatch.setattr(finetune_gpt2, "train_step", step)
    assert latest_checkpoint(resumed.out).name == f"{killed_in // 3 * 3:08d}"
    with pytest.raises(BadInput, match="unfinished run: --resume resumes it"):
        finetune_gpt2.main(resumed)
    finetune_gpt2.main(replace(resumed, resume=True))
    assert lines_of(resumed.out) == lines_of(cfg.out) and len(lines_of(cfg.out)) > 8
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "out/model.safetensors").read_bytes()
    assert latest_checkpoint(resumed.out) is None  # the run is finished


def test_resume_without_a_checkpoint_starts_the_run(uninterrupted, monkeypatch, tmp_path):
    cfg, folder = uninterrupted
    monkeypatch.chdir(folder)
    finetune_gpt2.main(replace(cfg, out=str(tmp_path / "out"), resume=True))
    assert lines_of(tmp_path / "out") == lines_of(cfg.out)


def test_a_finished_run_is_not_resumed_and_does_not_change(uninterrupted, monkeypatch):
    """Otherwise a script that restarts runs would train it again and replace its weights."""
    cfg, folder = uninterrupted
    monkeypatch.chdir(folder)
    weights = (folder / "out/model.safetensors").read_bytes()
    with pytest.raises(Finished, match="a finished run"):
        finetune_gpt2.main(replace(cfg, resume=True))
    assert (folder / "out/model.safetensors").read_bytes() == weights


def test_a_run_is_not_resumed_on_other_reviews(uninterrupted, monkeypatch, tmp_path):
    """Otherwise the meaning of token ids would change without a warning. The vocabularies have the same size."""
    monkeypatch.chdir(tmp_path)
    dataset, calls = str(reviews_csv(tmp_path / "toy.csv", rows=120)), []
    cfg = replace(uninterrupted[0], dataset=dataset, out="out", vocab_size=300)
    save = checkpoint.save_checkpoint

    def save_and_die(*args):
        save(*args)
        calls.append(args)
        raise Killed

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_and_die)
    with pytest.raises(Killed):
        finetune_gpt2.main(cfg)
    reviews_csv(tmp_path / "toy.csv", rows=124)
    with pytest.raises(BadInput, match="00000003 was made with different inputs: texts"):
        finetune_gpt2.main(replace(cfg, resume=True))
    assert len(calls) == 1


def test_a_new_run_deletes_the_figures_of_earlier_weights(tmp_path):
    cfg = FinetuneConfig(out=str(tmp_path), report_to="none")
    results = ("results.json", "viewer.json", "samples.md", "example_results.png", "learning_curves.png", "report.html")
    for name in (*results, "config.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "README.md").write_text(f"---\n---\n\n{CARD_MARK}\n")
    RunLog(cfg).close()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoints", "config.json", "run_config.json"]


@pytest.mark.parametrize("lost", ["", "the last line", "everything", "the file"])
def test_after_a_crash_the_log_is_continued_without_repeated_steps(tmp_path, lost):
    """A checkpoint is flushed to the disk, but the end of the log may be missing or incomplete."""
    cfg, file = FinetuneConfig(out=str(tmp_path), report_to="none"), tmp_path / "log.jsonl"
    log = RunLog(cfg)
    for step in range(5):
        log.write(step, loss=1.0)
    log.close()
    save_checkpoint(tmp_path, tiny(), [], {"step": 3})
    text = file.read_text()
    kept = {"": text, "the last line": text[:-10], "everything": "", "the file": None}[lost]
    file.unlink() if kept is None else file.write_text(kept)
    log = RunLog(cfg, first_step=3)
    for step in range(3, 6):
        log.write(step, loss=1.0)
    log.close()
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(0 if kept else 3, 6))
    assert latest_checkpoint(tmp_path).name == "00000003"


def test_a_weight_too_large_for_16_bits_is_refused_and_the_old_file_is_kept(tokenizer, tmp_path):
    model = tiny()
    save_gpt2(model, tokenizer, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.ln_f.weight[0] = 7e4
    with pytest.raises(BadInput, match=r"ln_f\.weight .* not finite in torch\.float16"):
        save_gpt2(model, tokenizer, tmp_path, dtype=torch.float16)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_latest_two_checkpoints_are_kept_and_an_incomplete_one_is_ignored(tmp_path):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (3, 6, 9):
        save_checkpoint(tmp_path, model, [optimizer], {"step": step, "inputs": {"texts": "a"}})
    (tmp_path / "checkpoints/.saving-x/checkpoint").mkdir(parents=True)
    assert [f.name for f in sorted((tmp_path / "checkpoints").glob("[0-9]*"))] == ["00000006", "00000009"]
    state = load_checkpoint(latest_checkpoint(tmp_path), tiny(), [optimizer])
    assert state == {"step": 9, "inputs": {"texts": "a"}}


def test_weights_saved_in_16_bits_are_the_rounded_weights_of_the_run(uninterrupted):
    """config.json has this dtype, the tensors have it, and the perplexity is that of the run."""
    cfg, _ = uninterrupted
    best = min(line["val_perplexity"] for line in lines_of(cfg.out) if "val_perplexity" in line)
    assert json.loads((Path(cfg.out) / "config.json").read_text())["dtype"] == "float16"
    assert {tensor.dtype for _, tensor in read_tensors(cfg.out)} == {torch.float16}
    assert perplexity_of(cfg.out, cfg, load_gpt2)[0] == pytest.approx(best, rel=1e-3)


def test_muon_optimizes_the_matrices_of_the_blocks_and_adamw_the_other_parameters(uninterrupted, monkeypatch):
    cfg, folder = uninterrupted
    monkeypatch.chdir(folder)
    parameters = {}

    def stop(model, optimizers, *args):
        names = {id(p): name for name, p in model.named_parameters()}
        parameters["all"] = list(names.values())
        for optimizer in optimizers:
            ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
            parameters[type(optimizer).__name__] = [names[i] for i in ids]
        raise Killed

    monkeypatch.setattr(finetune_gpt2, "Stepper", stop)
    with pytest.raises(Killed):
        finetune_gpt2.main(replace(cfg, out="elsewhere"))
    matrices = [f"h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert parameters.get("Muon", []) == (matrices if cfg.optimizer == "muon" else [])
    assert sorted(parameters["AdamW"] + parameters.get("Muon", [])) == sorted(parameters["all"])
