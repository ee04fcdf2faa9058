"""Rows of a table that wait for a gradient while what they wait through changes its course."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sensikernels.optim import state
from sensikernels.optim.line import Line

States = Mapping[Tensor, dict[str, Any]]


def straighten(group: dict[str, Any], tables: Sequence[Tensor], states: States) -> None:
    """Before a step: note its learning rate, and bring rows up to date where it leaves the line."""
    here = {id(p) for p in tables} & {id(p) for p in group["params"]}
    if not here:
        return
    own = [states[p] for p in tables if id(p) in here and "clock" in states.get(p, ())]
    line = Line.of(group)
    if not line.goes_on(group):
        catch_up(group, states)
        line = Line.begin(group, bent=True)
        for table in own:
            state.restart(table, line.rate)
    line = line.next(group)
    if line.steps == 2 and line.bent and line.slope:
        for table in own:
            state.lean(table, line.slope)
    group["line"] = line.to_list()


def catch_up(group: dict[str, Any], states: States) -> None:
    """Bring the rows of a group's tables to where a dense step would have them by now."""
    line = Line.of(group)
    for param in group["params"]:
        state.catch_up(param, states.get(param, {}), line)
