"""What a run leaves to read: its config, metrics.jsonl, TensorBoard or W&B beside it; and tables for the terminal."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from checkpoint import RUN_CONFIG, need_disk, write_text
from config import BadInput


class RunLog:
    """The log of a run in cfg.out: one JSON line a step, and the same numbers to cfg.report_to.

    Making one starts the run's folder: the config is written, the log of an earlier run there begins anew. BadInput
    when the folder cannot be written or the disk has no room for the model.
    """

    def __init__(self, cfg, model):
        self.out, self.start, self.tensorboard, self.wandb = Path(cfg.out), time.time(), None, None
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            need_disk(self.out, model)
            write_text(self.out / RUN_CONFIG, json.dumps(asdict(cfg), indent=1))
            self.file = open(self.out / "metrics.jsonl", "w", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"cannot write to {self.out}: {error}") from None
        if cfg.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(self.out / "tensorboard", ignore_errors=True)
            self.tensorboard = SummaryWriter(self.out / "tensorboard")
        elif cfg.report_to == "wandb":
            try:
                import wandb
            except ImportError:
                raise BadInput("report_to is wandb, which is not installed: pip install wandb, or --report_to tensorboard") from None
            self.wandb = wandb.init(project="mini-rlhf", name=self.out.as_posix(), config=asdict(cfg))

    def write(self, step, **metrics):
        """Record the metrics of a step: floats and ints by name."""
        line = dict(step=step, seconds=round(time.time() - self.start, 2), **metrics)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def close(self):
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def one_line(text, width):
    """Text for a table: control characters and newlines as spaces, cut to width with an ellipsis."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def sheet(title, rows):
    """Names and values in two aligned columns under a title, as text."""
    width = max(len(name) for name in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])
