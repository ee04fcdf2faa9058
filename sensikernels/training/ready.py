"""Checks of model, data and budget before the first step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from sensikernels._core.checks import require
from sensikernels._core.errors import DataError, UsageError
from sensikernels.data.packing import round_up
from sensikernels.hf import apply, compact, restore, structure_of
from sensikernels.masks import Plan, Scores, StepCosts, plan, uniform
from sensikernels.masks.step_costs import check_kinds
from sensikernels.methods import Method
from sensikernels.methods.step_time import dtype_of
from sensikernels.training.config import Settings
from sensikernels.training.data import Data


def check_model(settings: Settings, method: Method, model: nn.Module, data: Data) -> None:
    """Check that a fresh ``model`` can run these data, be trimmed, and be saved.

    Raises:
        UsageError: rows are longer than its positions; it is of no known family, or cannot be
            compacted; a plan is another model's.
        DataError: its vocabulary is not that of the data.
    """
    _check_tables(settings, model, data)
    if settings.plan is not None:
        try:
            apply(model, Plan.load(settings.plan))
        except UsageError as error:
            raise UsageError(f"plan {settings.plan}: {error}") from error
        restore(model)
    if method.needs_budget:
        _check_compact(method, model)


def check_budget(settings: Settings, method: Method, model: nn.Module, data: Data) -> None:
    """Raise UsageError now where trimming would find out later that it cannot be done."""
    if settings.budget is None:
        return
    structure = structure_of(model, method.granularity)
    flat = Scores(
        structure=structure,
        values={c.name: torch.ones(c.units) for c in structure.couplings},
        criterion="none",
        statistic="none",
    )
    timed = settings.budget.step_time is not None
    if timed:
        check_kinds(structure.couplings)
    if timed and settings.costs is None:
        return
    costs = None if settings.costs is None else StepCosts.load(settings.costs)
    if costs is not None:
        costs.check(structure, data.device.type, dtype_of(model))
    plan(
        flat,
        settings.budget,
        geometry=data.geometry,
        multiples=settings.options.get("multiples"),
        costs=costs,
    )


def _check_tables(settings: Settings, model: nn.Module, data: Data) -> None:
    """Every token id, type and position of the data has a row in the model's tables."""
    tables = {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    rows: list[Any] = [data.train.dataset, data.dev.dataset]
    words = tables.get("word_embeddings")
    largest = max(int(encoded.input_ids.max()) for encoded in rows)
    if words is not None and largest >= words.num_embeddings:
        raise DataError(
            f"model {settings.model}: expected a tokenizer of at most {words.num_embeddings} "
            f"tokens, as its config says, got token {largest}"
        )
    types = tables.get("token_type_embeddings")
    kinds = [int(e.token_type_ids.max()) for e in rows if e.token_type_ids is not None]
    if types is not None and kinds and max(kinds) >= types.num_embeddings:
        raise DataError(
            f"model {settings.model}: expected at most {types.num_embeddings} token types, as its "
            f"config says, got type {max(kinds)} from its tokenizer"
        )
    positions = tables.get("position_embeddings")
    if positions is None:
        return
    # RoBERTa counts positions from behind its padding token.
    first = 0 if positions.padding_idx is None else positions.padding_idx + 1
    room = positions.num_embeddings - first
    longest = max(int(np.max(encoded.lengths)) for encoded in rows)
    require(
        longest <= room,
        "max_length",
        f"at most {room}, the model's positions",
        f"{settings.max_length}, and a row of {longest} tokens",
    )
    padded = int(round_up(longest, settings.pad_to_multiple))
    require(
        padded <= room,
        "pad_to_multiple",
        f"one that pads {longest} tokens to at most {room}, the model's positions",
        settings.pad_to_multiple,
    )


def check_labels(settings: Settings, model: nn.Module, data: Data) -> None:
    """Raise DataError where the model's own head has the task's labels in another order."""
    config: Any = model.config
    ours = [name.lower() for name in data.task.label_names]
    named = getattr(config, "id2label", None) or {}
    theirs = [str(named.get(i, "")).lower() for i in range(len(ours))]
    if sorted(ours) == sorted(theirs) and ours != theirs:
        raise DataError(
            f"model {settings.model}: labels: expected {', '.join(ours)} in the task's order, got "
            f"{', '.join(theirs)}; take a model without a head, or with this order"
        )


def _check_compact(method: Method, model: nn.Module) -> None:
    """Trim to nearly nothing, compact, and give the model back as it was."""
    structure = structure_of(model, method.granularity)
    # Dimensions go from every head alike, which the first few of all would not be.
    smallest = {c.name: c.units if c.heads > 1 else 1 for c in structure.couplings}
    with torch.random.fork_rng([]):
        apply(model, uniform(structure, smallest))
        try:
            compact(model)
        finally:
            restore(model)
