"""Errors of the user's input, shown as one line without a traceback."""

import os
import sys


class BadInput(Exception):
    """Something the user gave cannot work: shown as one line, exit status 2. Other exceptions are bugs."""


class NotFinite(BadInput):
    """A number in a rollout is not finite. PPO skips the step; three in a row stop the run."""


class Stopped(Exception):
    """A signal ended the run after a checkpoint. Its number is the argument; the exit status is 128 more."""


def first_line(error):
    """Return the first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def print_error(error):
    """Print an error as one line on stderr; return the exit status, 2."""
    rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""  # set by torchrun
    print(f"error{rank}: {printable(str(error))}", file=sys.stderr)
    return 2


def printable(text):
    """Return text as one line without control characters, which file names and generated texts may contain."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
