"""Damaged tables of step costs and of dispatch are refused by name."""

from __future__ import annotations

import json

import pytest

from sensikernels._core.files import sealed
from sensikernels.masks import StepCosts
from sensikernels.ops.common import dispatch
from sensikernels.ops.common.dispatch import BreakEven
from tests.artefacts.damage import cuts, doubled, flips, text_of, values

POINTS = {"heads": {4: 0.0, 2: 1.5, 1: 2.25}, "neurons": {64: 0.0, 32: 3.5, 16: 4.25}}


def save_costs(path):
    StepCosts(
        device="cpu",
        dtype="float32",
        threads=1,
        tokens=64,
        layers=2,
        dense_ms=20.0,
        units={"heads": 4, "neurons": 64},
        saved={"inner": POINTS, "last": POINTS},
    ).save(path)


def save_dispatch(path):
    entries = [
        BreakEven(kind=kind, dtype="float32", block=32, tokens=tokens, density=0.5)
        for kind in dispatch.KINDS
        for tokens in (1, 64)
    ]
    dispatch.write_table(path, entries, {"device": "cpu", "threads": 1})


@pytest.fixture(params=["costs", "dispatch"])
def table(request, tmp_path):
    """The file, how it is read, and what of it is only told."""
    path = tmp_path / f"{request.param}.json"
    if request.param == "costs":
        save_costs(path)
        return path, StepCosts.load, ("device", "dtype")
    save_dispatch(path)
    return path, dispatch.read_table, ("device", "threads", "more")


def test_bytes(table, refused):
    path, load, _ = table
    whole, made = path.read_bytes(), load(path)
    for what, spoiled in [*cuts(whole), *flips(whole, 60)]:
        path.write_bytes(spoiled)
        got = refused(lambda: load(path), path, what)
        assert got is None or got == made, what


def test_every_field_edited_by_hand(table, refused):
    path, load, _ = table
    body = json.loads(path.read_text())
    for what, spoiled in values(body, 4):
        path.write_bytes(text_of(spoiled))
        got = refused(lambda: load(path), path, what)
        assert got is None or text_of(spoiled) == text_of(body), what
    for what, text in doubled(json.dumps(body)):
        path.write_text(text)
        assert refused(lambda: load(path), path, what) is None, what


def test_every_field_forged(table, refused):
    """With a digest that fits, a value of the wrong kind is still none of a table."""
    path, load, told = table
    made, body = load(path), json.loads(path.read_text())
    for what, spoiled in values(body, 10, seed=1):
        try:
            path.write_text(json.dumps(sealed({k: v for k, v in spoiled.items() if k != "digest"})))
        except ValueError:  # NaN: no JSON, so no seal either
            path.write_bytes(text_of(spoiled))
        got = refused(lambda: load(path), path, what)
        free = any(f"'{name}'" in what for name in told) or what == "a field more"
        amount = any(
            f"'{n}'" in what
            for n in ("density", "block", "dense_ms", "saved", "threads", "staircase")
        )
        assert got is None or got == made or free or amount or "removed" in what, what
        if got is not None and isinstance(got, StepCosts):
            assert got.to_json() == StepCosts(**got.to_json()).to_json()
