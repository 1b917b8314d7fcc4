"""Reward and judge against KL: PPO, RLOO, GRPO and two baselines, and ablations of implementation details.

    python -m analysis.frontier --preset mini     # hours on a CPU; a sweep that was stopped is resumed

Each point of a frontier is a run of ppo.py with a fixed KL coefficient (Gao et al. 2022, arXiv:2210.10760, draw such
curves), or best-of-n, or a GPT-2 fine-tuned on positive reviews only. All respond to the same held-out prompts. The
ablations repeat the run of the preset with one detail changed, by a flag or by a patch in asset/ablations/. Writes
frontier.csv, ablation.csv, frontier.png and frontier.md; keeps the log and a line of JSON of each run, not its weights.
"""

import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from analysis.metrics import measure
from analysis.plot import frontier as draw
from analysis.plot import half_width, save
from analysis.responses import prompt_groups, respond
from config import EvaluateConfig, FrontierConfig
from data import load_prompts
from reward import as_scores, load_judge, load_reward
from runtime import cli
from runtime.checkpoint import RUN_CONFIG, read_json, write_text
from runtime.cli import differing, parse
from runtime.device import pick_device
from runtime.errors import BadInput
from runtime.hub import load_policy, open_gpt2

ROOT = Path(__file__).parent.parent
METHODS = {"PPO": "gae", "RLOO": "rloo", "GRPO": "grpo"}
BEST_OF_N, POSITIVE_ONLY, START = "best-of-n", "positive-only fine-tuning", "fine-tuned model"
PRESET = "as the preset"
ABLATIONS = {  # a detail of the algorithm: the flags, or the patch in asset/ablations/, that change it
    PRESET: "",
    "advantages not whitened": "no_whitening.patch",
    "token rewards whitened too": "--whiten_rewards True",
    "values do not train the trunk": "detached_values.patch",
    "value loss not clipped": "--value_clip 1e9",
    "ratio not clipped": "--clip_eps 1e9",
    "KL coefficient fixed": "--kl_target 0",
    "scores not cut": "--score_clip 0",
    "Adam's epsilon 1e-8": "--adam_eps 1e-8",
    "learning rate constant": "--lr_end 1",
}
# Of a KL: how far from it the nearest run may lie for a value at that KL. At a quarter GRPO's value at 8 nats would be
# interpolated from 6.5 to 38 nats and be .1 too low, since the curve bends in between.
NEAR = 1 / 8
MEASURES = (
    "score", "positive_by_reward", "positive_by_judge", "kl", "kl_exact", "perplexity", "distinct_2", "response_length",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One row of a CSV: how a model is made, and what it is called."""

    method: str
    setting: str  # what differs between the runs of a method: KL coefficient, n, epochs, detail
    seed: int
    script: str
    flags: tuple
    patch: str = ""

    @property
    def name(self):
        kept = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{self.method}-{self.setting}")
        return f"{kept}-{self.seed}"


def runs_of(cfg):
    """Every Run of the sweep, seed by seed, so that what is there of a sweep that was stopped can be compared."""
    sizes = ("--steps", cfg.steps, "--response_len", cfg.response_len)
    made = []
    for seed in range(cfg.seeds):
        for method, advantage in METHODS.items():
            for coef in cfg.kl_coefs:
                flags = (*sizes, "--advantage", advantage, "--kl_coef", coef, "--kl_target", 0)
                made.append(Run(method, f"{coef:g}", seed, "ppo.py", flags))
        for epochs in cfg.positive_epochs:
            flags = ("--reviews", "positive", "--epochs", epochs, "--weights", "last")
            made.append(Run(POSITIVE_ONLY, f"{epochs:g}", seed, "finetune_gpt2.py", flags))
        for detail, change in ABLATIONS.items() if cfg.ablation else ():
            patch, flags = (change, ()) if change.endswith(".patch") else ("", tuple(change.split()))
            made.append(Run("ablation", detail, seed, "ppo.py", (*sizes, *flags), patch))
    return made


def source_of(patch, parent):
    """The folder whose scripts a run uses: the repository's, or a copy under parent with the patch applied."""
    if not patch:
        return ROOT
    copy = Path(parent, "source")
    for file in [*ROOT.glob("*.py"), *ROOT.glob("runtime/*.py"), *ROOT.glob("analysis/*.py")]:
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    # GIT_CEILING_DIRECTORIES: else git takes the copy for a part of the repository around it, and skips the patch
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(parent).resolve())}
    patch = (ROOT / "asset" / "ablations" / patch).resolve()
    subprocess.run(["git", "apply", str(patch)], cwd=copy, env=environment, check=True)
    return copy


def train(run, cfg):
    """Make the policy of a Run, going on where an earlier sweep was stopped; returns its folder."""
    out = Path(cfg.out, run.name)
    if (out / "model.safetensors").is_file() and not (out / "checkpoints").is_dir():
        return out
    flags = ("--preset", cfg.preset, *run.flags, "--seed", run.seed, "--out", out, "--resume", True)
    flags += ("--device", cfg.device, "--dtype", cfg.dtype, "--report_to", "none")
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // cfg.workers))}
    log = Path(cfg.out, f"{run.name}.log")
    with open(log, "w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as parent:
        command = [sys.executable, source_of(run.patch, parent) / run.script, *map(str, flags)]
        status = subprocess.run(command, env=os.environ | threads, stdout=file, stderr=file).returncode
    if status:
        raise BadInput(f"{run.script} ended with status {status}: see {log}; a second call goes on from there")
    return out


class Examiner:
    """The held-out prompts, the reference and the classifiers: the same for every run of the sweep."""

    def __init__(self, cfg):
        sizes = ["--prompts", cfg.prompts, "--response_len", cfg.response_len, "--device", cfg.device]
        self.cfg = parse(EvaluateConfig, ["--preset", cfg.preset, *map(str, sizes), "--dtype", cfg.dtype])
        self.device, self.bf16 = pick_device(self.cfg)
        opened = open_gpt2(self.cfg.before)
        self.tokenizer = opened[2]
        self.reward_fn = load_reward(self.cfg, self.device)
        self.judge = load_judge(self.cfg, self.device)
        pool = load_prompts(self.cfg, "evaluation", opened[1], self.tokenizer, cfg.prompts)
        self.groups = list(prompt_groups(pool, self.cfg))
        self.reference = load_policy(*opened, self.bf16).to(self.device).eval()
        self.lock = threading.Lock()

    def answers(self, policy, name, seed=0):
        return respond(
            policy, self.reference, self.tokenizer, self.groups, replace(self.cfg, seed=seed), self.device, name
        )

    def measures(self, answers):
        """{name: mean over the prompts}: the intervals of a sweep are over seeds, not over prompts."""
        table = measure(answers, self.reward_fn, self.judge, replace(self.cfg, resamples=1))[0]
        return {name: table[name]["value"] for name in MEASURES if name in table}

    def folder(self, folder, name):
        with self.lock:  # of the threads that wait for runs one at a time computes itself
            policy = load_policy(*open_gpt2(folder), self.bf16).to(self.device).eval()
            return self.measures(self.answers(policy, name))

    def best_of_n(self, ns, seed):
        """{n: measures of the best of n answers of the reference, by the reward}, for one draw of max(ns) answers each.

        kl is log n - (n - 1) / n, of which the true one falls short at most (Beirami et al. 2024, arXiv:2401.01879).
        """
        draws = [self.answers(self.reference, f"{BEST_OF_N} {i}", seed_of_draw(seed, i)) for i in range(max(ns))]
        scores = np.stack([as_scores(self.reward_fn(d["texts"]), d["texts"]).numpy() for d in draws])  # (n, prompts)
        found = {}
        for n in ns:
            best = scores[:n].argmax(0)
            chosen = {name: [draws[i][name][row] for row, i in enumerate(best)] for name in draws[0]}
            bound = math.log(n) - (n - 1) / n
            found[n] = self.measures(chosen) | {"kl": bound, "kl_exact": bound}
        return found


def seed_of_draw(seed, i):
    """Each of the answers that best-of-n chooses from has random numbers of its own."""
    return 1 + 1000 * seed + i


def finish(run, cfg, examiner):
    """Train and measure a Run once: its row, from the sweep's folder where it is there."""
    file = Path(cfg.out, f"{run.name}.json")
    if file.is_file():
        return read_json(file)
    folder = train(run, cfg)
    row = {"method": run.method, "setting": run.setting, "seed": run.seed} | examiner.folder(folder, run.name)
    write_text(file, json.dumps(row))
    for weights in (*folder.glob("*.safetensors"), *folder.glob("best/*.safetensors")):
        weights.unlink()
    return row


def best_of_n_rows(cfg, examiner):
    rows = []
    for seed in range(cfg.seeds):
        file = Path(cfg.out, f"{BEST_OF_N}-{seed}.json")
        if not file.is_file():
            found = examiner.best_of_n(cfg.best_of, seed)
            told = [{"method": BEST_OF_N, "setting": str(n), "seed": seed} | row for n, row in found.items()]
            write_text(file, json.dumps({"rows": told}))
        rows += read_json(file)["rows"]
    return rows


# ---- what the rows say


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ["method", "setting", "seed", *MEASURES], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def curve(rows, method, seed, measure):
    """(KLs, a measure) of the runs of a method and seed, by rising KL; all begin at the fine-tuned model."""
    points = [row for row in rows if row["method"] == START or (row["method"], row["seed"]) == (method, seed)]
    points.sort(key=lambda row: row["kl_exact"])
    return [row["kl_exact"] for row in points], [row[measure] for row in points]


def value_at(rows, method, seed, measure, nats):
    """A measure at a KL, interpolated linearly between the runs of a method and seed: a float or None.

    None unless one of these runs lies within NEAR of that KL, and beyond the last run.
    """
    kl, values = curve(rows, method, seed, measure)
    runs = [row["kl_exact"] for row in rows if (row["method"], row["seed"]) == (method, seed)]
    near = any(abs(run - nats) <= NEAR * nats for run in runs)
    return float(np.interp(nats, kl, values)) if near and nats <= kl[-1] else None


def at_equal_kl(rows, measure, nats):
    """A measure of each method at a KL: {method: [one value a seed]}, empty where a seed has none (see value_at)."""
    found = {}
    for method, seed in dict.fromkeys((row["method"], row["seed"]) for row in rows if row["method"] != START):
        found.setdefault(method, []).append(value_at(rows, method, seed, measure, nats))
    return {method: [] if None in values else values for method, values in found.items()}


def cell(values):
    """Mean and 95 % interval of the values of some seeds; "-" without values."""
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values) or "-"
    return f"{statistics.mean(values):.3f} ± {half_width(values):.3f}"


def table(head, lines):
    """Markdown: head, a list of texts; lines, {first text: [values of each column by seed]}."""
    body = ["| " + " | ".join([name, *map(cell, columns)]) + " |" for name, columns in lines.items()]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *body])


def runs_table(frontier):
    """What was measured: a line for each method and setting."""
    names, lines = ("kl_exact", "score", "positive_by_judge", "perplexity", "distinct_2"), {}
    for row in frontier:
        name = START if row["method"] == START else f"{row['method']}, {row['setting']}"
        columns = lines.setdefault(name, [[] for _ in names])
        for column, name in zip(columns, names):
            column.append(row[name])
    return table(["method, setting", *names], lines)


def methods_table(frontier, measure, nats=(1, 2, 4, 8, 16)):
    """A measure of all methods at equal KL."""
    columns = [at_equal_kl(frontier, measure, n) for n in nats]
    lines = {method: [column[method] for column in columns] for method in columns[0]}
    return table([f"{measure} at a KL of", *(f"{n} nats" for n in nats)], lines)


def ablation_table(frontier, ablation):
    """The preset's runs, and what each change adds to them: differences within a seed.

    The last column holds the score less that of PPO's frontier at the run's own KL, since most changes move the KL too;
    it is empty unless every run, with or without the change, has a value of the frontier (see value_at).
    """
    names = ("score", "positive_by_judge", "kl_exact", "perplexity", "distinct_2", "above")
    for row in ablation:
        level = value_at(frontier, "PPO", row["seed"], "score", row["kl_exact"])
        row["above"] = None if level is None else row["score"] - level
    base, lines = {row["seed"]: row for row in ablation if row["setting"] == PRESET}, {}
    for detail in dict.fromkeys(row["setting"] for row in ablation):
        rows = [row for row in ablation if row["setting"] == detail]
        less = {seed: dict.fromkeys(names, 0.0) for seed in base} if detail == PRESET else base
        pairs = [[(row[name], less[row["seed"]][name]) for row in rows] for name in names]
        lines[detail] = [[] if None in sum(column, ()) else [x - y for x, y in column] for column in pairs]
    return table(["changed", *names[:-1], "score above PPO's frontier"], lines)


def summary(frontier, ablation, cfg):
    """The text of frontier.md."""
    parts = [
        f"Means and 95 % intervals over {cfg.seeds} seeds, {cfg.prompts} held-out prompts. The setting of PPO, RLOO "
        "and GRPO is the KL coefficient, that of best-of-n is n, that of fine-tuning the epochs.",
        runs_table(frontier),
        "At equal KL, linear between the runs of a seed. A value is given only where every seed has a run within "
        f"{100 * NEAR:g} % of that KL; elsewhere the cell is -.",
        *(methods_table(frontier, name) for name in ("score", "positive_by_judge", "perplexity")),
    ]
    if ablation:
        parts += [
            "One detail changed: differences to the preset's run of the same seed. The last column is the score less "
            "that of PPO's frontier at the run's own KL, by the same rule.",
            ablation_table(frontier, ablation),
        ]
    return "\n\n".join(parts) + "\n"


def check_sweep(cfg):
    """BadInput where the folder holds a sweep of other sizes: its points would not be comparable with ours."""
    file = Path(cfg.out) / RUN_CONFIG
    free = ("seeds", "kl_coefs", "best_of", "positive_epochs", "ablation", "workers")  # more of the same kind
    if file.is_file():
        told = read_json(file) | {name: getattr(cfg, name) for name in free}
        if changed := differing(cfg, told):
            raise BadInput(
                f"{cfg.out} holds a sweep of another config ({', '.join(changed)}): --out names another folder"
            )
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(asdict(cfg), indent=1))


def main(cfg):
    check_sweep(cfg)
    examiner = Examiner(cfg)
    start = {"method": START, "setting": "0", "seed": 0} | examiner.measures(
        examiner.answers(examiner.reference, START)
    )
    with ThreadPoolExecutor(cfg.workers) as pool:
        jobs = [pool.submit(finish, run, cfg, examiner) for run in runs_of(cfg)]
        try:
            rows = [job.result() for job in tqdm(jobs, "frontier", unit="run")]
        except BaseException:  # Ctrl-C or a run that failed: those under way end by themselves, the others not begun
            pool.shutdown(cancel_futures=True)
            raise
    ablation = [row for row in rows if row["method"] == "ablation"]
    frontier = [start, *(row for row in rows if row["method"] != "ablation"), *best_of_n_rows(cfg, examiner)]

    out = Path(cfg.out)
    write_csv(out / "frontier.csv", frontier)
    write_csv(out / "ablation.csv", ablation)
    text = summary(frontier, ablation, cfg)
    write_text(out / "frontier.md", text)
    print(f"\n{text}\nwritten:", *(out / name for name in ("frontier.csv", "ablation.csv", "frontier.md")), sep="\n  ")
    print(" ", save(draw(out), out / "frontier.png"))


if __name__ == "__main__":
    cli.run(main, FrontierConfig)
