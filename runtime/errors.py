"""Errors of the user's input, shown as one line without a traceback."""

import os
import sys


class BadInput(Exception):
    """Invalid input of the user: shown as one line, with exit status 2. Other exceptions are bugs."""


class NotFinite(BadInput):
    """A value in a rollout is not finite. The step is skipped; three skipped steps in a row stop the run."""


class Stopped(Exception):
    """A signal ended the run after a checkpoint. The argument is the signal's number; the exit status is 128 more."""


class Finished(Exception):
    """--resume was given and nothing is left to do. The message is shown as it is; the exit status is 0."""


def first_line(error):
    """Return the first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def print_error(error):
    """Print an error as one line on stderr; return the exit status, 2."""
    rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""  # set by torchrun
    print(f"error{rank}: {printable(str(error))}", file=sys.stderr)
    return 2


def printable(text):
    """Return text as one line without control characters, which file names and responses may contain."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
