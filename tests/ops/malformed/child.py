"""Runs damaged calls and says what became of each, before and after: one of them may end it.

``python -m tests.ops.malformed.child TABLE FIRST``: the calls of a table from the FIRST-th on.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import iter_modules

import torch

import sensikernels
from sensikernels import ops
from sensikernels._core.errors import SensiError
from tests.ops.calls import RightCall, gather
from tests.ops.malformed.damage import damages

for _module in iter_modules(ops.__path__):  # an op without calls is registered too, and missed
    import_module(f"sensikernels.ops.{_module.name}")
CALLS = gather()
TABLES = ("operators", "functions", "launchers")
ERRORS = (SensiError, RuntimeError, ValueError, TypeError)


def bases(table: str) -> list[RightCall]:
    """The right calls of a table, of all ops."""
    return [base for calls in CALLS.values() for base in getattr(calls, table)()]


def say(line: str) -> None:
    """A line that is out before what follows it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(table: str, first: int) -> None:
    """Run the calls; each takes two lines, the second is missing where the process died."""
    say(sensikernels.__file__)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    calls = [(base, *damage) for base in bases(table) for damage in damages(base)]
    for i, (base, label, damaged) in enumerate(calls[first:], first):
        say(f"{i} {base.name} {label}")
        try:
            base.run(**damaged)
        except ERRORS:
            say("refused")
        except BaseException as error:
            say(f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            say("accepted")
    say("end")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
