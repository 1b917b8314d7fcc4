"""Reward and judge against KL: PPO, RLOO, GRPO and their baselines beside the limit, and ablations of details.

    python -m analysis.frontier --preset mini     # hours on a CPU; a sweep that was stopped is resumed
    python -m analysis.frontier --preset mini --second_lm MODEL.gguf   # also bits per character by another model

Each point of a frontier is a run of ppo.py with a fixed KL coefficient (as in Gao et al. 2022, arXiv:2210.10760), a run
of dpo.py, best-of-n, or a GPT-2 fine-tuned only on positive reviews. All respond to the same held-out prompts, and are
compared with the best possible policy (limit.py). Each ablation changes one detail of the run of the preset, by a flag
or by a patch in asset/ablations/. Writes limit.csv, frontier.csv, frontier.png and frontier.md, and ablation.csv if
there are ablations; of each run, the log and a line of JSON are kept, but not the weights. The tables are written again
after each run.

A policy that has exploited the reward often misleads the judge as well, which is a neural network trained in a similar
way. Two measures share nothing with the reward: the share positive by a linear classifier of words and word pairs, and
the bits per character under a second language model. Neither shows that a text is a list of positive words, but the
perplexity under the fine-tuned model does: see docs/troubleshooting.md. Needs scikit-learn.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from analysis.frontier_tables import MEASURES, PRESET, START, add_efficiency, summary
from analysis.limit import best_of_n_weights, limit_rows, reference_scores
from analysis.metrics import measure, open_second_lm, second_nll
from analysis.plot import frontier as draw
from analysis.plot import save
from analysis.responses import prompt_groups, respond
from analysis.tables import csv_text
from config import EvaluateConfig, FrontierConfig, PPOConfig, RewardConfig, defaults
from data import load_prompts, load_splits
from reward import load_judge, load_reward, sentiment_baseline
from runtime import cli
from runtime.checkpoint import RUN_CONFIG, is_finished, read_json, write_text
from runtime.cli import differing, parse
from runtime.device import pick_device
from runtime.errors import BadInput
from runtime.hub import load_policy, open_gpt2
from runtime.linear_classifier import LinearClassifier

ROOT = Path(__file__).parent.parent
FIRST_CONSTANTS = "PPO, first constants"  # those of preset mini before reward shaping
METHODS = {  # {method: (script, its flags)}; scores are not clipped, as in the limit
    "PPO": ("ppo.py", "--score_clip 0 --kl_target 0"),
    FIRST_CONSTANTS: ("ppo.py", "--score_clip 0 --kl_target 0 --shaping_every 0 --lr 4e-4 --lr_end 0.1"),
    "RLOO": ("ppo.py", "--score_clip 0 --kl_target 0 --advantage rloo"),
    "GRPO": ("ppo.py", "--score_clip 0 --kl_target 0 --advantage grpo"),
    "DPO": ("dpo.py", "--method dpo"),
    # with k responses per prompt, a weighted policy ends below log k nats
    "reward-weighted": ("dpo.py", "--method weighted --samples_per_prompt 16"),
}
COEFFICIENT = {"ppo.py": "--kl_coef", "dpo.py": "--beta"}  # the flag that differs between the runs of a method
BEST_OF_N, POSITIVE_ONLY, ABLATION = "best-of-n", "positive-only fine-tuning", "ablation"
ABLATIONS = {  # detail: the flags, or the patch in asset/ablations/, that change it
    PRESET: "",
    "advantages not whitened": "no_whitening.patch",
    "token rewards whitened too": "--whiten_rewards True",
    "values do not train the trunk": "detached_values.patch",
    "value loss not clipped": "--value_clip 1e9",
    "ratio not clipped": "--clip_eps 1e9",
    "gradient not clipped": "--grad_clip 1e9",
    "no reward shaping": "--shaping_every 0",
    "lambda 1": "--lam 1",
    "no KL penalty": "--kl_coef 0",
    "KL coefficient adaptive": "--kl_target 2.5",
    "scores not clipped": "--score_clip 0",
    "Adam's epsilon 1e-8": "--adam_eps 1e-8",
    "learning rate 4e-4": "--lr 4e-4",
    "learning rate constant": "--lr_end 1",
}


@dataclass(frozen=True)
class Run:
    """A training run of the sweep, a row of a CSV."""

    method: str
    setting: str  # what differs between the runs of a method: KL coefficient, n, epochs, or detail
    seed: int
    script: str
    flags: tuple
    patch: str = ""

    @property
    def name(self):
        safe = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{self.method}-{self.setting}")
        return f"{safe}-{self.seed}"


def coefficients_of(cfg):
    """Return the coefficients of each method, in the order of METHODS."""
    online = cfg.kl_coefs, cfg.first_kl_coefs, cfg.rloo_kl_coefs, cfg.grpo_kl_coefs
    return *online, cfg.dpo_betas, cfg.weighted_betas


def runs_of(cfg):
    """Return the runs of the sweep, seed by seed: the methods can be compared before all seeds are done."""
    sizes = ("--steps", cfg.steps, "--response_len", cfg.response_len)
    start = ("--init_from", defaults(PPOConfig, "medium").policy) if cfg.preset == "medium" else ()  # not "scratch"
    runs = []
    for seed in range(cfg.seeds):
        for (method, (script, constants)), coefficients in zip(METHODS.items(), coefficients_of(cfg), strict=True):
            for coefficient in coefficients:
                flags = (*sizes, *constants.split(), COEFFICIENT[script], coefficient)
                runs.append(Run(method, f"{coefficient:g}", seed, script, flags))
        for epochs in cfg.positive_epochs:
            flags = (*start, "--reviews", "positive", "--epochs", epochs, "--weights", "last")
            runs.append(Run(POSITIVE_ONLY, f"{epochs:g}", seed, "finetune_gpt2.py", flags))
        for detail, change in ABLATIONS.items() if cfg.ablation else ():
            patch, flags = (change, ()) if change.endswith(".patch") else ("", tuple(change.split()))
            runs.append(Run(ABLATION, detail, seed, "ppo.py", (*sizes, *flags), patch))
    return runs


def source_of(patch, parent):
    """Return the folder with the scripts of a run: the repository, or a copy in parent with the patch applied."""
    if not patch:
        return ROOT
    copy = Path(parent, "source")
    for file in [*ROOT.glob("*.py"), *ROOT.glob("runtime/*.py"), *ROOT.glob("analysis/*.py")]:
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    # without GIT_CEILING_DIRECTORIES, git treats the copy as a part of an enclosing repository and skips the patch
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(parent).resolve())}
    patch = (ROOT / "asset" / "ablations" / patch).resolve()
    subprocess.run(["git", "apply", str(patch)], cwd=copy, env=environment, check=True)
    return copy


def train(run, cfg):
    """Train the policy of a Run, or resume it after a stopped sweep; return its folder."""
    out = Path(cfg.out, run.name)
    if is_finished(out, "model.safetensors"):
        return out
    flags = ("--preset", cfg.preset, *run.flags, "--seed", run.seed, "--out", out, "--resume", True)
    flags += ("--device", cfg.device, "--dtype", cfg.dtype, "--report_to", "none")
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // cfg.workers))}
    log = Path(cfg.out, f"{run.name}.log")
    with open(log, "w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as parent:
        command = [sys.executable, source_of(run.patch, parent) / run.script, *map(str, flags)]
        status = subprocess.run(command, env=os.environ | threads, stdout=file, stderr=file).returncode
    if status:
        raise BadInput(f"{run.script} failed with exit status {status}: see {log}; the same command resumes the sweep")
    return out


class Evaluator:
    """The held-out prompts, the reference and all that measures responses, which are the same for every run.

    words: a LinearClassifier. Its labels and texts are those of the split prompts: the reward and the judge of preset
    mini read the texts of each other's split, and a linear classifier of the judge's labels was a teacher of the judge.
    """

    def __init__(self, cfg):
        LinearClassifier()  # raises BadInput without scikit-learn, before anything expensive
        sizes = ["--prompts", cfg.prompts, "--response_len", cfg.response_len]
        sizes += ["--limit_prompts", cfg.prompts, "--limit_samples", cfg.limit_samples]
        device = ("--device", cfg.device, "--dtype", cfg.dtype)
        self.cfg = parse(EvaluateConfig, ["--preset", cfg.preset, *map(str, sizes), *device])
        self.device, self.dtype = pick_device(self.cfg)
        self.second = open_second_lm(cfg.second_lm, self.device) if cfg.second_lm else None
        opened = open_gpt2(self.cfg.before)
        self.tokenizer = opened[2]
        self.reward_fn = load_reward(self.cfg, self.device, self.dtype)
        self.judge = load_judge(self.cfg, self.device, self.dtype)
        self.pool = load_prompts(self.cfg, "evaluation", opened[1], self.tokenizer, cfg.prompts)
        self.groups = list(prompt_groups(self.pool, self.cfg))
        self.reference = load_policy(*opened, self.dtype).to(self.device).eval()
        splits = load_splits(self.cfg.dataset, self.cfg.text_column, self.cfg.label_column)
        self.words = sentiment_baseline([splits["prompts"]], defaults(RewardConfig, cfg.preset))
        self.lock = threading.Lock()

    def respond(self, policy, name, seed=0):
        cfg = replace(self.cfg, seed=seed)
        return respond(policy, self.reference, self.tokenizer, self.groups, cfg, self.device, name)

    def measure(self, responses):
        """Return {metric: mean over the prompts}. Intervals of a sweep are over seeds, not over prompts."""
        if self.second:
            responses = responses | {"second_nll": second_nll(*self.second, responses, self.cfg)}
        table = measure(responses, self.reward_fn, self.judge, replace(self.cfg, resamples=1))[0]
        metrics = {name: entry["value"] for name, entry in table.items()}
        metrics["positive_by_words"] = (self.words.log_odds(responses["texts"]) > 0).double().mean().item()
        return {name: metrics[name] for name in MEASURES if name in metrics}

    def evaluate(self, folder, name):
        """Return the metrics of the policy in a folder. Only one thread at a time computes."""
        with self.lock:
            policy = load_policy(*open_gpt2(folder), self.dtype).to(self.device).eval()
            return self.measure(self.respond(policy, name))

    def limit(self):
        """Return (scores, shares) of many responses of the reference, (M, N) each; see limit.reference_scores."""
        models = self.reference, self.tokenizer, self.reward_fn, self.judge
        return reference_scores(*models, self.pool, self.cfg, self.device)


def stored(file, compute):
    """Return the object in a JSON file. If there is none, compute the object and write the file."""
    if not file.is_file():
        write_text(file, json.dumps(compute()))
    return read_json(file)


def run_row(run, cfg, evaluator):
    """Train and evaluate a Run, unless an earlier sweep did; return its row. Its weights are deleted."""

    def compute():
        row = {"method": run.method, "setting": run.setting, "seed": run.seed}
        return row | evaluator.evaluate(train(run, cfg), run.name)

    row = stored(Path(cfg.out, f"{run.name}.json"), compute)
    for weights in Path(cfg.out, run.name).glob("**/*.safetensors"):
        weights.unlink()
    return row


def best_of_n_rows(scores, shares, ns):
    """Return the rows of best-of-n, the response with the highest score of n of the reference's, by an exact formula.

    scores, shares: (M, N). kl is an upper bound, log n - (n - 1) / n (Beirami et al. 2024, arXiv:2401.01879).
    """
    order, rows = scores.argsort(1), []
    ranked = [np.take_along_axis(x, order, 1).mean(0) for x in (scores, shares)]  # (N,) each, in rising order of scores
    for n in ns:
        score, share = (best_of_n_weights(n, scores.shape[1]) @ x for x in ranked)
        bound = math.log(n) - (n - 1) / n
        values = {"score": score, "positive_by_judge": share, "kl": bound}
        rows.append({"method": BEST_OF_N, "setting": f"{n}", "seed": 0} | values | {"kl_exact": bound})
    return rows


def start_row(evaluator, scores, shares):
    """Return the row of the reference. Its score and the judge's share are means over all responses of the limit."""
    row = evaluator.measure(evaluator.respond(evaluator.reference, START))
    means = {"score": float(scores.mean()), "positive_by_judge": float(shares.mean())}
    return {"method": START, "setting": "0", "seed": 0} | row | means


def check_sweep(cfg):
    """Raise BadInput if the folder holds a sweep of other sizes, whose points would not be comparable."""
    file = Path(cfg.out) / RUN_CONFIG
    coefficients = [name for name in vars(cfg) if name.endswith(("_coefs", "_betas"))]
    # these may change when a sweep is resumed
    free = ("seeds", *coefficients, "best_of", "limit_samples", "positive_epochs", "ablation", "workers")
    saved = read_json(file) if file.is_file() else asdict(cfg)
    if changed := differing(cfg, saved | {name: getattr(cfg, name) for name in free}):
        raise BadInput(f"{cfg.out} holds a sweep of another config ({', '.join(changed)}): use another --out")


def write_config(cfg):
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    write_text(Path(cfg.out) / RUN_CONFIG, json.dumps(asdict(cfg), indent=1))


def write_results(rows, first, limit, cfg):
    """Write the tables of the runs that are finished; return the text of frontier.md.

    first: the row of the reference and those of best-of-n.
    """
    out, ablation = Path(cfg.out), [row for row in rows if row["method"] == ABLATION]
    frontier = [first[0], *(row for row in rows if row["method"] != ABLATION), *first[1:]]
    add_efficiency([*frontier, *ablation], first[0], limit)
    tables = {"limit": limit, "frontier": frontier, "ablation": ablation}
    for name, table in tables.items():
        file = out / f"{name}.csv"
        write_text(file, csv_text(table)) if table else file.unlink(missing_ok=True)
    text = summary(frontier, ablation, limit, cfg)
    write_text(out / "frontier.md", text)
    return text


def main(cfg):
    check_sweep(cfg)
    evaluator = Evaluator(cfg)
    write_config(cfg)  # after Evaluator, which raises BadInput for wrong files: a folder keeps its first config
    scores, shares = evaluator.limit()
    limit, rows = limit_rows(scores, shares, evaluator.cfg), []
    first = [start_row(evaluator, scores, shares), *best_of_n_rows(scores, shares, cfg.best_of)]
    with ThreadPoolExecutor(cfg.workers) as pool:
        jobs = [pool.submit(run_row, run, cfg, evaluator) for run in runs_of(cfg)]
        try:
            for job in tqdm(jobs, "frontier", unit="run"):
                rows.append(job.result())
                text = write_results(rows, first, limit, cfg)  # after each run, so that a sweep can be read as it runs
        except BaseException:  # Ctrl-C or a failed run: wait for the runs that are in progress, start no others
            pool.shutdown(cancel_futures=True)
            raise
    save(draw(cfg.out), Path(cfg.out) / "frontier.png")
    files = sorted(file for kind in ("csv", "md", "png") for file in Path(cfg.out).glob(f"*.{kind}"))
    print(f"\n{text}\nwritten:", *files, sep="\n  ")


if __name__ == "__main__":
    cli.run(main, FrontierConfig)
