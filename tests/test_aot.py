"""The ahead-of-time gate fails on broken limits, on regressions, on a kernel nobody would run."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from bench import ROOT
from bench.aot import gate
from bench.aot.case import case
from bench.aot.compiler import TARGETS, Report, compile_case

GOOD = Report(
    case="k", registers=100, shared=1000, stack=0, spills=0, matrix=4, copies=8, instructions=500
)
CASE = case(None, {}, {"num_warps": 4, "num_stages": 3}, name="k", gemm=True)


def test_a_good_kernel_passes():
    assert list(gate.broken_limits(CASE, GOOD, TARGETS["sm_90"])) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"stack": 8}, "stack of 8 bytes"),
        ({"spills": 2}, "2 spill instructions"),
        ({"shared": 233 << 10}, "of shared memory"),
        ({"matrix": 0}, "no HGMMA"),
        ({"copies": 0}, "no asynchronous copy"),
    ],
)
def test_each_limit_is_held(change: dict[str, int], problem: str):
    found = list(gate.broken_limits(CASE, dataclasses.replace(GOOD, **change), TARGETS["sm_90"]))
    assert len(found) == 1
    assert problem in found[0]


def test_a_copying_kernel_needs_no_tensor_core():
    plain = dataclasses.replace(GOOD, matrix=0, copies=0)
    assert (
        list(gate.broken_limits(dataclasses.replace(CASE, gemm=False), plain, TARGETS["sm_90"]))
        == []
    )


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({"registers": 108}, []),
        ({"registers": 109}, ["registers: 100 -> 109"]),
        ({"shared": 1001}, ["shared: 1000 -> 1001"]),
        ({"instructions": 550}, []),
        ({"instructions": 551}, ["instructions: 500 -> 551"]),
        ({"copies": 3}, ["copies: 8 -> 3"]),
    ],
)
def test_regressions_show(change: dict[str, int], worse: list[str]):
    old = dataclasses.asdict(GOOD)
    assert list(gate.regressions(old, dataclasses.replace(GOOD, **change))) == worse


def test_every_operator_with_kernels_has_its_cases():
    folders = {p.parent.name for p in (ROOT / "sensikernels" / "ops").glob("*/triton*.py")}
    assert folders == set(gate.OPS)


def test_every_case_has_a_row_in_every_committed_table():
    cases = gate.collect()
    assert len({case.name for case in cases}) == len(cases)
    for target in TARGETS:
        table = json.loads((gate.RESULTS / f"{target}.json").read_text())
        wanted = {c.name for c in cases if target in (c.targets or TARGETS)}
        assert {row["case"] for row in table["rows"]} == wanted


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets")
def test_a_kernel_compiled_without_its_launch_attributes_is_refused():
    kind = "block_linear/bf16/64x64/forward/"
    case = next(c for c in gate.collect() if c.name.startswith(kind))
    target = TARGETS["sm_90"]
    assert list(gate.broken_limits(case, compile_case(case, target), target)) == []
    bare = dataclasses.replace(case, divisible=())
    problems = list(gate.broken_limits(case, compile_case(bare, target), target))
    assert "no asynchronous copy" in problems
