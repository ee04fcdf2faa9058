"""Plans by the clock: measure what widths cost on this device, choose, verify, correct.

A table of single layers cannot know what a whole step shares or overlaps. So the chosen plan is
timed beside the dense model on real batches, and the share asked for is corrected by what was met.
Of several processes each times its own rows, all at once; the slowest one's times count.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest

import torch
from torch import nn
from torch.optim import Optimizer

from sensikernels._core.checks import require
from sensikernels._core.errors import UsageError
from sensikernels._core.timing import elapsed_ms
from sensikernels.hf import apply, encoder_layers, restore, structure_of, to_padded
from sensikernels.masks import Budget, Plan, StepCosts, tokens_of, uniform
from sensikernels.masks.step_costs import INNER, KINDS, LAST
from sensikernels.methods.base import Batch, Run
from sensikernels.world import ALONE, World

MakeOptimizer = Callable[[nn.Module], Optimizer]

TOLERANCE = 0.02
_CORRECTIONS = 4
_SAMPLE = 8  # batches that a plan is timed on
_SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)


def measure_costs(
    model: nn.Module,
    batches: Iterable[Batch],
    make_optimizer: MakeOptimizer,
    *,
    seconds: float = 20.0,
    progress: Callable[[str], object] = lambda _: None,
) -> StepCosts:
    """Measure the time that trimming one layer to each width saves of a step of ``model``.

    A copy cut to its first and last layer is trimmed, one layer and one kind of unit at a time,
    and stepped in turn with an untrimmed twin on the batch of median size. Gradients, update and
    all that a step does are in the times. ``seconds`` is shared among the widths; each takes three
    rounds at least.
    """
    structure = structure_of(model)
    units = {c.kind: c.units for c in structure.couplings}
    layers = encoder_layers(model)
    sample = sorted(islice(iter(batches), 4 * _SAMPLE), key=tokens_of)
    require(len(sample) > 0, "batches", "at least one", "none")
    batch = sample[len(sample) // 2]
    first = next(model.parameters())
    twin, cut = (_first_and_last(copy.deepcopy(model)) for _ in range(2))
    ends = {INNER: 0, LAST: len(encoder_layers(cut)) - 1}
    points = [
        (where, kind, width)
        for where in ends
        for kind in KINDS
        for width in _grid(kind, units[kind], first.device.type, coarse=where == LAST)
    ]
    saved: dict[str, dict[str, dict[int, float]]] = {
        where: {kind: {units[kind]: 0.0} for kind in KINDS} for where in ends
    }
    plain = _stepper(twin, make_optimizer, first.device)
    for where, kind, width in points:
        progress(f"{where} layer, {width} of {units[kind]} {kind}")
        apply(cut, uniform(structure_of(cut), {f"layer.{ends[where]}.{kind}": width}))
        pairs = _pairs(
            plain, _stepper(cut, make_optimizer, first.device), [batch], seconds / len(points)
        )
        restore(cut)
        saved[where][kind][width] = _difference(pairs)
    del twin, cut
    dense = _stepper(copy.deepcopy(model), make_optimizer, first.device)
    whole = [dense(batch) for _ in range(4)]
    return StepCosts(
        device=first.device.type,
        dtype=dtype_of(model),
        threads=torch.get_num_threads() if first.device.type == "cpu" else 0,
        tokens=tokens_of(batch),
        layers=len(layers),
        units=units,
        dense_ms=statistics.median(whole[1:]),
        saved=saved,
        staircase=first.device.type != "cpu",
    )


def time_ratio(
    dense: nn.Module,
    planned: nn.Module,
    batches: Iterable[Batch],
    make_optimizer: MakeOptimizer,
    *,
    rounds: int = 5,
    world: World = ALONE,
) -> float:
    """Step time of ``planned`` over that of ``dense`` on the same batches, in turn; both train.

    Eight batches, of every eighth of their sizes the middle one; per batch the median over
    ``rounds``; the ratio of their sums. The processes of ``world`` step together, the averaging of
    gradients included, and the slowest one's sums count.
    """
    sample = _spread(list(islice(iter(batches), 4 * _SAMPLE)))
    require(len(sample) > 0, "batches", "at least one", "none")
    device = next(dense.parameters()).device
    steps = [
        _stepper(model, make_optimizer, device, world.gradients(model))
        for model in (dense, planned)
    ]
    # Batches take turns, as in a run: the same one again would find its shapes' code warm.
    several = len(sample)
    pairs = _pairs(steps[0], steps[1], sample, None, rounds)[several - 1 :]
    totals = [0.0, 0.0]
    for place in range(several):
        for i, times in enumerate(zip(*pairs[place::several], strict=True)):
            totals[i] += statistics.median(times)
    slowest = [max(sums) for sums in zip(*world.gather(totals), strict=True)]
    return float(slowest[1] / slowest[0])


def _spread(batches: list[Batch]) -> list[Batch]:
    """``_SAMPLE`` of the batches, evenly spaced by tokens: a plan saves less on small ones."""
    ordered = sorted(batches, key=tokens_of)
    taken = min(_SAMPLE, len(ordered))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * taken)] for i in range(taken)]


def own_rows(run: Run) -> list[Batch]:
    """Ranking batches as this process would train on them: its rows of each."""
    device = next(run.model.parameters()).device
    count = -(-4 * _SAMPLE // run.world.size)
    mine = [{n: v.cpu() for n, v in to_padded(b).items()} for b in islice(run.batches(), count)]
    turns = zip_longest(*run.world.gather(mine))
    whole = [batch for turn in turns for batch in turn if batch is not None]
    rows = slice(run.world.rank, None, run.world.size)
    return [
        {n: (v[rows] if len(v) > run.world.rank else v[:1]).to(device) for n, v in batch.items()}
        for batch in whole
    ]


def by_the_clock(run: Run, make_plan: Callable[[Budget], Plan], budget: Budget) -> Plan:
    """The plan whose step time by the clock is nearest ``budget.step_time`` of the dense step.

    ``make_plan(budget)`` allocates by ``run.costs``, which are measured first where there are none.
    Every process must call it; all get the plan of the first, made by the slowest one's costs.
    The plan returned carries the budget as asked; ``origin["step_time"]`` says what was met and how
    many plans were timed: up to four, until one is within 2 %. A table's error is much alike for
    neighbouring plans and each timing has noise of its own, so the next share asked of the table
    and the plan taken go by the mean error of the last two timings. Models, optimizer and random
    state of the run are left as they are.

    Raises:
        UsageError: the run has no ``make_optimizer``; its costs are for another model or device;
            the budget is below the smallest feasible one.
    """
    asked, make_optimizer = budget.step_time, run.make_optimizer
    if asked is None or make_optimizer is None:
        raise UsageError("run: expected a step_time budget and make_optimizer, got none")
    device = next(run.model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        batches = own_rows(run)
        if run.costs is None:
            own = measure_costs(run.model, batches, make_optimizer)
            run.costs = max(run.world.gather(own), key=lambda costs: costs.dense_ms)
        run.costs.check(structure_of(run.model), device.type, dtype_of(run.model))
        return _corrected(run, make_plan, budget, asked, make_optimizer, batches)


def _corrected(
    run: Run,
    make_plan: Callable[[Budget], Plan],
    budget: Budget,
    asked: float,
    make_optimizer: MakeOptimizer,
    batches: Sequence[Batch],
) -> Plan:
    tried: list[tuple[float, float, Plan]] = []  # share asked of the table, share met, plan
    error = 1.0
    for _ in range(_CORRECTIONS):
        aim = min(1.0, asked / error)
        nearer = replace(budget, step_time=aim)
        try:
            made: Plan = run.world.agree(partial(make_plan, nearer))
        except UsageError:
            if not tried:
                raise
            break  # no plan of this model is that much faster
        planned = copy.deepcopy(run.model)
        apply(planned, made)
        dense = copy.deepcopy(run.model)
        met = time_ratio(dense, planned, batches, make_optimizer, world=run.world)
        tried.append((aim, met, made))
        error = statistics.geometric_mean(found / sought for sought, found, _ in tried[-2:])
        if abs(met / asked - 1) <= TOLERANCE:
            break
    _, met, best = min(tried, key=lambda one: abs(one[0] * error / asked - 1))
    facts = {"asked": asked, "met": met, "plans": len(tried)}
    return replace(best, budget=budget, origin={**best.origin, "step_time": facts})


def dtype_of(model: nn.Module) -> str:
    """Name of the dtype of the model's parameters."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _first_and_last(model: nn.Module) -> nn.Module:
    """``model`` with only its first and last encoder layer."""
    layers = encoder_layers(model)
    holder, _, leaf = layers[0].prefix.rpartition(".")[0].rpartition(".")
    kept = [layers[0].module, layers[-1].module][: len(layers)]
    setattr(model.get_submodule(holder), leaf, nn.ModuleList(kept))
    return model


def _grid(kind: str, units: int, device: str, *, coarse: bool) -> list[int]:
    """Widths to measure below all units: where tiles end on a GPU, a smooth curve on a CPU."""
    if coarse:
        shares: Sequence[float] = (1 / 16, 1 / 2)
    elif device != "cpu":
        tile = 1 if kind == "heads" else 64
        return list(range(tile, units, tile))
    else:
        shares = _SHARES
    tile = 1 if kind == "heads" else 16
    widths = {max(tile, round(share * units / tile) * tile) for share in shares}
    return sorted(w for w in widths if w < units)


def _stepper(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    device: torch.device,
    gradients: Callable[[Batch], object] | None = None,
) -> Callable[[Batch], float]:
    """A function that takes one training step and returns its milliseconds."""
    optimizer = make_optimizer(model)
    backward = gradients or ALONE.gradients(model)
    model.train()

    def step(batch: Batch) -> None:
        backward(batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda batch: elapsed_ms(lambda: step(batch), device)


def _pairs(
    one: Callable[[Batch], float],
    other: Callable[[Batch], float],
    batches: Sequence[Batch],
    seconds: float | None,
    rounds: int = 9,
) -> list[tuple[float, float]]:
    """Times of both, in turn, after a round that does not count; three rounds at least."""
    taken: list[tuple[float, float]] = []
    start = time.perf_counter()
    for batch in _repeated(batches, rounds + 1):
        if seconds is not None and len(taken) > 3 and time.perf_counter() - start > seconds:
            break
        first, second = (one, other) if len(taken) % 2 else (other, one)
        times = first(batch), second(batch)
        taken.append(times if first is one else times[::-1])
    return taken[1:]


def _difference(pairs: Sequence[tuple[float, float]]) -> float:
    """Best time of the first less that of the second: what else the machine did is left out."""
    first, second = zip(*pairs, strict=True)
    return float(min(first) - min(second))


def _repeated(batches: Sequence[Batch], rounds: int) -> Iterator[Batch]:
    return (batch for _ in range(rounds) for batch in batches)
