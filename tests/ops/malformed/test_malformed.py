"""No damaged call is taken, and none ends the process: operators, functions and launchers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sensikernels
from sensikernels._core import extension
from sensikernels._core.errors import UsageError
from tests.ops.calls import RightCall, public_functions
from tests.ops.malformed import child
from tests.ops.malformed.damage import damages

ROOT = Path(__file__).parents[3]
needs_native = pytest.mark.skipif(
    extension.why_not() is not None, reason=f"native: {extension.why_not()}"
)
pytestmark = needs_native
# What no value has to be read for.
BY_SHAPE = ("kind", "complex", "narrower", "deeper", "flatter", "unknown", "none")


def verdicts(table: str) -> dict[str, str]:
    """The outcome of each call, ``died`` of those that ended a process; the next one goes on."""
    found: dict[str, str] = {}
    first, ended = 0, False
    # The same package as here, wherever it was found: perhaps a build under a sanitizer.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)])}
    while not ended:
        command = [sys.executable, "-m", "tests.ops.malformed.child", table, str(first)]
        with TemporaryDirectory() as elsewhere:  # for `-m` looks where it stands first
            run = subprocess.run(
                command, env=env, cwd=elsewhere, capture_output=True, text=True, check=False
            )
        package, *lines = run.stdout.splitlines() or [run.stderr[-3000:]]
        assert package == sensikernels.__file__
        ended = bool(lines) and lines[-1] == "end"
        pairs = lines[:-1] if ended else lines
        assert pairs or ended, run.stderr[-3000:]
        found |= dict(zip(pairs[::2], pairs[1::2], strict=False))
        if not ended:
            assert len(pairs) % 2, f"ended between calls: {run.stderr[-3000:]}"
            name = signal.Signals(-run.returncode).name if run.returncode < 0 else run.returncode
            found[pairs[-1]] = f"died of {name}: {run.stderr[-300:]}"
            first = int(pairs[-1].split()[0]) + 1
    return found


@pytest.mark.parametrize("table", ["operators", "functions"])
def test_every_damaged_call_is_refused(table: str):
    found = verdicts(table)
    assert len(found) >= 400
    wrong = {call: verdict for call, verdict in found.items() if verdict != "refused"}
    assert not wrong, "\n".join(f"{call}: {verdict}" for call, verdict in list(wrong.items())[:30])


def test_no_damaged_call_of_a_launcher_ends_the_process():
    found = verdicts("launchers")
    assert len(found) >= 400
    wrong = {c: verdict for c, verdict in found.items() if verdict not in ("refused", "accepted")}
    assert not wrong, "\n".join(f"{call}: {verdict}" for call, verdict in list(wrong.items())[:30])


@pytest.mark.parametrize("table", child.TABLES)
def test_what_is_damaged_was_right(table: str):
    for base in child.bases(table):
        base.run()
        assert any(True for _ in damages(base)), base.name


def registered(namespace: str) -> set[str]:
    """Operators of a namespace that run on a CPU."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(namespace + "::")]
    return {name.split("::")[1] for name in names if has(name, "CPU")}


def test_every_operator_has_damaged_calls():
    called = {t: {b.name.split("/")[0] for b in child.bases(t)} for t in child.TABLES}
    assert called["operators"] == registered("sensikernels")
    assert public_functions() <= called["functions"]
    by_address = {name for calls in child.CALLS.values() for name in calls.by_address}
    assert called["launchers"] | by_address == registered("sensikernels_native")


def faked(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, list):
        return [faked(one, mode) for one in value]
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def called(base: RightCall, mode: FakeTensorMode, **damaged: Any) -> None:
    with mode:
        base.call(**{k: faked(v, mode) for k, v in {**base.arguments, **damaged}.items()})


def test_fake_kernels_refuse_what_needs_no_values():
    """A traced graph is told of the same faults."""
    seen, wrong = 0, []
    for base in child.bases("operators"):
        called(base, FakeTensorMode())
        for label, damaged in damages(base):
            if label.split(":")[1].split("-")[-1] not in BY_SHAPE:
                continue
            seen += 1
            try:
                called(base, FakeTensorMode(), **damaged)
            except child.ERRORS:
                continue
            wrong.append(f"{base.name} {label}")
    assert seen > 400
    assert not wrong, "\n".join(wrong[:30])


def test_errors_name_the_argument():
    bases = {base.name: base for base in child.bases("operators")}
    with pytest.raises(UsageError, match=r"labels: expected int64 \[3\] on cpu"):
        bases["cross_entropy/native"].run(labels=torch.zeros(2).long())
    ids = bases["embed_norm/native"].arguments["ids"]
    with pytest.raises(UsageError, match=r"input_ids: expected ids in \[0, 5\), got ids with 9 at"):
        bases["embed_norm/native"].run(ids=[torch.full_like(ids[0], 9), *ids[1:]])
