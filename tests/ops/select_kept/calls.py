"""Right calls of the selections of units, elements and chains, and their steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sensikernels import select_chain, select_kept
from sensikernels.ops.select_kept import select_elements
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, launcher, operator
from tests.ops.inputs import floats, ints

UNITS = 6


def places() -> dict[str, Tensor]:
    """The segment and the kind of every unit."""
    return {"segments": ints(0, 0, 1, 1, 1, 2), "kinds": ints(0, 0, 1, 1, 1, 0)}


def elements() -> dict[str, Any]:
    """Two tensors that elements are chosen from, as an operator or a launcher takes them."""
    tensors = [floats(3, 4), floats(5)]
    return {"tensors": tensors, "grads": tensors, "offsets": [0, 64], "k": [7], "score": 2}


def operators() -> Iterator[RightCall]:
    yield operator(
        "select_elements", **elements(), bytes=128, backend="native", accepts=["k:longer"]
    )
    columns = {
        "scores": floats(UNITS),
        "costs": torch.ones(UNITS),
        **places(),
        "minimum": [0, 0],
        "multiple": [2, 1],
        "prefix": True,
        "n_segments": 3,
        "indices": ["segments", "kinds"],
        "accepts": ["segments:narrower", "kinds:narrower", "scores:wider", "costs:wider"],
    }
    limits = torch.tensor([4.0], dtype=torch.float64)
    yield operator("select_units", limits=limits, mode=2, **columns)
    limits = torch.ones(3, dtype=torch.float64)
    yield operator("select_units", "select_units/segments", limits=limits, mode=0, **columns)
    yield operator(
        "fill_in_order",
        cost=torch.ones(UNITS, dtype=torch.float64),
        segment=places()["segments"],
        free=torch.ones(UNITS, dtype=torch.bool),
        left=torch.tensor(3.0, dtype=torch.float64),
        prefix=True,
        segments=3,
        indices=["segment"],
        accepts=["left:deeper"],
    )


def functions() -> Iterator[RightCall]:
    for backend in BACKENDS:
        yield _units(backend)
        tensors = [floats(3, 4), floats(5)]
        wide = [f"{name}:{i}-wider" for name in ("tensors", "grads") for i in range(2)]
        yield function(
            f"select_elements/{backend}",
            select_elements,
            accepts=wide if backend == "reference" else [],
            tensors=tensors,
            grads=tensors,
            k=7,
            score="abs_wg",
            scope="global",
            backend=backend,
        )
        chain = {name: torch.rand(UNITS) for name in ("importance", "t_dw", "t_dy")}
        dtypes = [f"{name}:{how}" for name in chain for how in ("kind", "wider", "narrower")]
        loose = [*dtypes, "bins:huge", "importance:meta", "t_dw:meta"]
        run = {**chain, "budget": 2.0, "bins": 100, "backend": backend, "accepts": loose}
        yield function(f"select_chain/{backend}", select_chain, **run)


def _units(backend: str) -> RightCall:
    dtypes = ["segments:narrower", "kinds:narrower", "scores:wider", "costs:wider", "costs:kind"]
    return function(
        f"select_kept/{backend}",
        select_kept,
        accepts=[*dtypes, "multiple:huge"],
        indices=["segments", "kinds"],
        scores=floats(UNITS),
        budget=4.0,
        costs=torch.ones(UNITS),
        **places(),
        n_segments=3,
        minimum=0,
        multiple=1,
        scope="global",
        backend=backend,
    )


def launchers() -> Iterator[RightCall]:
    yield launcher(
        "select_elements",
        **elements(),
        arena=torch.zeros(128, dtype=torch.uint8),
        threshold=floats(1),
        counts=ints(0, 0),
    )
    yield launcher(
        "select_units",
        scores=floats(UNITS).double(),
        costs=torch.ones(UNITS).double(),
        **places(),
        limits=torch.tensor([4.0]).double(),
        mode=2,
        minimum=[0, 0],
        multiple=[2, 1],
        prefix=True,
        bits=torch.zeros(UNITS, dtype=torch.bool),
        indices=torch.zeros(UNITS, dtype=torch.int32),
        counts=torch.zeros(3, dtype=torch.int32),
    )
    own, passed = ints(1, 2, 3, 1, 2, 3), ints(6, 5, 4, 3, 2, 1)
    value = torch.rand(UNITS).double()
    yield launcher("select_chain", value=value, own=own, passed=passed, bins=20)


def units_step(backend: str, device: str) -> list[Tensor]:
    scores = torch.randn(201, device=device).mul(4).round()
    return [select_kept(scores, k=77, backend=backend).bits]


def chain_step(backend: str, device: str) -> list[Tensor]:
    importance, own, passed = (torch.rand(24, device=device).mul(8).ceil() for _ in range(3))
    return [select_chain(importance, own, passed, 60.0, backend=backend)]


STEPS = (Step("select_kept", units_step, triton=()), Step("select_chain", chain_step, triton=()))
CALLS = Calls(operators=operators, functions=functions, launchers=launchers, steps=STEPS)
