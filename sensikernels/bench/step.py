"""Whole training steps of an encoder: HuggingFace as it is, ours dense, ours under a plan.

Every contestant takes the same sentences in the same order, one step a round; see ``contestants``.
Where HuggingFace's are grouped by length (``hf-grouped``), batches differ: everyone takes a cycle
of as many batches that together hold the same sentences, still one step in turn, and a time is the
mean over a whole cycle. A ratio is then one of times per sentence.
Memory is that of the batch with the most tokens: ``peak_mib`` in all, ``step_mib`` without what
stays between steps (weights, optimizer state), ``activation_mib`` of the forward alone.
``product_share`` (not with ``--quick`` on a CPU): the step's products at the rate of one large
product timed in the same rounds, over the step's time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sensikernels._core import environment
from sensikernels._core.products import float32_products
from sensikernels.bench.contestants import GROUPED, OURS, Contestant, Race, check
from sensikernels.bench.rows import Row, row
from sensikernels.bench.sentences import shuffled
from sensikernels.bench.step_cases import Case, among, cases, named
from sensikernels.bench.timing import Timing, by_cycle, interleave, ratio_band
from sensikernels.hf import family_of
from sensikernels.training.memory import MIB, activation_mib, peak_mib, resident_bytes

BASELINES = ("hf-padded", "hf-dynamic", GROUPED, "hf-compiled", "dense")
PRODUCT = "product"
DTYPES = (torch.float32, torch.bfloat16)


def run(
    *,
    device: str,
    quick: bool,
    progress: Callable[[str], None],
    data_dir: Path | None = None,
    squad_dir: Path | None = None,
    case: Sequence[str] | None = None,
    only: str | None = None,
) -> list[Row]:
    """Rows of every case in float32 and bfloat16. ``data_dir``: a folder with ``SST-2/`` etc.

    ``squad_dir``: one with SQuAD's ``train.json``; without it that case is skipped.
    ``case``: those cases alone, even where ``quick`` with every contestant and all rounds, unless
    their batches are grouped. What cannot run is told to ``progress`` and gives no row.
    ``only``: names of contestants, separated by commas. Raises UsageError for a name that is none.
    """
    if case is None:
        chosen = cases(quick, device, data_dir, squad_dir)
    else:
        chosen = named(case, device, data_dir, squad_dir, quick)
    if only is not None:
        chosen = [among(one, [name.strip() for name in only.split(",")]) for one in chosen]
    environment.quiet_profiler()
    rows: list[Row] = []
    with float32_products(device):
        for one in chosen:
            for dtype in DTYPES[:: 1 if device == "cpu" else -1]:
                rows += measure(one, dtype, device, progress, count=not quick or device != "cpu")
    return rows


def measure(
    case: Case, dtype: torch.dtype, device: str, progress: Callable[[str], None], *, count: bool
) -> list[Row]:
    """Every contestant of a case, in turn. ``count``: the FLOPs of its step as well."""
    name = f"{case.name} {str(dtype).removeprefix('torch.')}"
    if case.absent:
        progress(f"{name}: skipped: {case.absent}")
        return []
    progress(f"{name}: setting up")
    torch.manual_seed(0)
    base = case.model().to(device=device, dtype=dtype).train()
    if reason := _padded_because(base):
        ours = ", ".join(who for who in case.contestants if who in OURS)
        progress(f"{name}: {ours} skipped, so nothing is timed: {reason}")
        return []
    race = _race(case, base, device)
    made = {who: race.make(who) for who in case.contestants}
    if "dense" in made:
        check(race, made["dense"])
    peaks = {who: _peak(one) for who, one in made.items()}
    work = {who: _flops(one) for who, one in made.items()} if count else {}
    product, work[PRODUCT] = _product(race, dtype)
    progress(f"{name}: {len(made)} contestants, {case.rounds} rounds")
    cycle = len(race.rows) if case.cycles else 1
    times = interleave(
        {who: _one(step) for who, step in made.items()} | {PRODUCT: product},
        rounds=case.rounds * cycle,
        warmup=cycle if device == "cpu" else 3 * len(race.rows),
        device=device,
    )
    if len(times[PRODUCT].samples_ms) < cycle:
        progress(f"{name}: skipped: the time was over before a whole cycle")
        return []
    times = {who: by_cycle(timing, cycle) for who, timing in times.items()}
    rate = work[PRODUCT] / times[PRODUCT].median_ms
    shares = {who: flops / rate / times[who].median_ms for who, flops in work.items()}
    return _rows(case, dtype, race, times, peaks, shares)


def _padded_because(model: nn.Module) -> str:
    """Why ours cannot run on this model; empty: they can."""
    family = family_of(model)
    return "" if family.packed is not None else f"{family.title}: {family.padded_because}"


def _race(case: Case, base: nn.Module, device: str) -> Race:
    """The race over the case's sentences; ours take those of grouped batches in random order."""
    rows = case.sentences()
    if not case.cycles:
        return Race(base=base, rows=rows, device=device)
    return Race(base=base, rows=shuffled(rows, len(rows[0])), device=device, grouped=rows)


def _one(step: Contestant) -> Callable[[], None]:
    return lambda: step()


def _rows(
    case: Case,
    dtype: torch.dtype,
    race: Race,
    times: dict[str, Timing],
    peaks: dict[str, dict[str, float]],
    shares: dict[str, float],
) -> list[Row]:
    return [
        row(
            suite="step",
            case=case.name,
            candidate=candidate,
            baseline=baseline,
            density=_density(candidate),
            tokens=round(race.tokens),
            dtype=str(dtype).removeprefix("torch."),
            direction="step",
            candidate_time=times[candidate],
            baseline_time=times[baseline],
            peak_mib=peaks[candidate]["peak_mib"],
            extra={
                **{name: mib for name, mib in peaks[candidate].items() if name != "peak_mib"},
                **{f"baseline_{name}": mib for name, mib in peaks[baseline].items()},
                **_per_sentence(case, race, times[candidate]),
                **ratio_band(times[baseline], times[candidate]),
                "tokens_per_s": race.tokens / times[candidate].median_ms * 1e3,
                "product_share": shares.get(candidate),
                "baseline_product_share": shares.get(baseline),
            },
        )
        for candidate in OURS
        for baseline in BASELINES
        if candidate != baseline and candidate in times and baseline in times
    ]


def _per_sentence(case: Case, race: Race, timing: Timing) -> dict[str, float]:
    """Of a race over whole cycles: what a cycle holds, and the candidate's sentences a second."""
    if not case.cycles:
        return {}
    held = sum(len(rows) for rows in race.rows)
    rate = held / len(race.rows) / timing.median_ms * 1e3
    return {"cycle_batches": len(race.rows), "cycle_sentences": held, "sentences_per_s": rate}


def _density(candidate: str) -> float:
    tail = candidate.rpartition("-")[2]
    share = float(tail) if tail.replace(".", "").isdigit() else 1.0
    return round(1 - share, 2) if candidate.startswith("freeze") else share


def _peak(step: Contestant) -> dict[str, float]:
    """MiB of the largest batch: in all, without what stays between steps, of the forward."""
    # A compiled step's buffers are its own; the stock model's figure stands for it.
    model = getattr(step.model, "_orig_mod", step.model)
    batch = max(step.batches, key=lambda b: b["input_ids"].numel())
    peak = peak_mib(model, step.optimizer, batch)
    return {
        "peak_mib": peak,
        "step_mib": peak - resident_bytes(model, step.optimizer) / MIB,
        "activation_mib": activation_mib(model, batch),
    }


def _flops(step: Contestant) -> float:
    """Operations of the products of a mean step: those of the largest batch, by tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    model = getattr(step.model, "_orig_mod", step.model)
    tokens = [batch["input_ids"].numel() for batch in step.batches]
    with FlopCounterMode(display=False) as counter:
        model(**step.batches[tokens.index(max(tokens))]).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() * sum(tokens) / len(tokens) / max(tokens)


def _product(race: Race, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A wide linear on a mean batch's tokens, and its operations."""
    config: Any = race.base.config
    hidden, tokens = int(config.hidden_size), round(race.tokens)
    x = torch.randn(tokens, hidden, device=race.device).to(dtype)
    weight = torch.randn(4 * hidden, hidden, device=race.device).to(dtype)
    return (lambda: F.linear(x, weight)), 8.0 * tokens * hidden * hidden
