"""Run the commands of the README on this machine, from a clean clone of HEAD, and keep their results: `make results`.

    python -m docs.record

Writes asset/recorded.json, with the output and the duration of each command, and copies the demo's results, log and
config to asset/. It takes about eleven minutes on two CPU cores. `make docs` then fills README.md and docs/.
"""

import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from runtime.checkpoint import write_text

ROOT = Path(__file__).parent.parent
COMMANDS = {  # name in the blocks of README.md: command
    "finetune": "finetune_gpt2.py --preset mini",
    "reward": "reward.py --preset mini",
    "ppo": "ppo.py --preset mini",
    "evaluate": "evaluate.py --preset mini",
    "generate": "generate.py --preset mini --prompt 'This movie was'",
}
RESULTS = ("results.json", "log.jsonl", "run_config.json", "samples.md")


def git(*arguments):
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
    ).stdout.strip()


def machine():
    """Return the machine in words."""
    model = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        lines = cpu.read_text(encoding="utf-8").splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{os.cpu_count()} CPU cores ({model})"


def main():
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", str(ROOT), folder], check=True)
        for name, text in tqdm(COMMANDS.items(), "record"):
            words = shlex.split(text)
            environment, start = os.environ | {"COLUMNS": "110"}, time.monotonic()
            done = subprocess.run(
                [sys.executable, *words], cwd=folder, env=environment, stdout=subprocess.PIPE, encoding="utf-8"
            )
            if done.returncode:
                sys.exit(f"{text} failed with exit status {done.returncode}")
            runs[name] = {"command": text, "seconds": round(time.monotonic() - start, 1), "output": done.stdout}
        for name in RESULTS:
            shutil.copy(Path(folder, "ppo_checkpoints", "mini", name), ROOT / "asset" / name)
    today = datetime.date.today().strftime("%d %B %Y").lstrip("0")
    recorded = {"date": today, "commit": git("rev-parse", "--short", "HEAD"), "machine": machine(), "runs": runs}
    write_text(ROOT / "asset" / "recorded.json", json.dumps(recorded, indent=1))


if __name__ == "__main__":
    main()
