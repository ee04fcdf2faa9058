"""Whole training steps of BERT: HuggingFace as it is, ours dense, ours under a plan.

Every contestant takes the same sentences in the same order, one step a round; see ``contestants``.
Memory is that of the batch with the most tokens: ``peak_mib`` in all, ``step_mib`` without what
stays between steps (weights, optimizer state), ``activation_mib`` of the forward alone.
``product_share`` (not with ``--quick`` on a CPU): the step's products at the rate of one large
product timed in the same rounds, over the step's time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sensikernels._core import environment
from sensikernels._core.checks import require_one_of
from sensikernels.bench.contestants import HF, OURS, Contestant, Race
from sensikernels.bench.rows import Row, row
from sensikernels.bench.timing import Timing, interleave
from sensikernels.data.rows import TokenRow as Sentence
from sensikernels.hf import load_model, load_tokenizer, quiet
from sensikernels.training.memory import MIB, activation_mib, peak_mib, resident_bytes

BASELINES = ("hf-padded", "hf-dynamic", "hf-compiled", "dense")
PRODUCT = "product"
BATCH = 32
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, the sentences of its batches, who is left out, and how many rounds."""

    name: str
    model: Callable[[], nn.Module]
    sentences: Callable[[], list[list[Sentence]]]
    rounds: int
    without: tuple[str, ...] = ()


def run(
    *,
    device: str,
    quick: bool,
    progress: Callable[[str], None],
    data_dir: Path | None = None,
    case: Sequence[str] | None = None,
    only: str | None = None,
) -> list[Row]:
    """Rows of every case in float32 and bfloat16. ``data_dir``: a folder with ``SST-2/`` etc.

    ``case``: those cases alone, with every contestant and all rounds even where ``quick``.
    ``only``: names of contestants, separated by commas. Raises UsageError for a name that is none.
    """
    chosen = cases(quick, device, data_dir) if case is None else named(case, device, data_dir)
    if only is not None:
        chosen = [among(one, [name.strip() for name in only.split(",")]) for one in chosen]
    environment.reserve_primitive_cache(16384)
    environment.quiet_profiler()
    torch.set_float32_matmul_precision("medium" if device == "cpu" else "high")
    rows: list[Row] = []
    for one in chosen:
        for dtype in DTYPES[:: 1 if device == "cpu" else -1]:
            rows += measure(one, dtype, device, progress, count=not quick or device != "cpu")
    return rows


def named(names: Sequence[str], device: str, data_dir: Path | None) -> list[Case]:
    """The full cases of these names. Raises UsageError for a name that is none."""
    known = {one.name: one for one in cases(False, device, data_dir)}
    for name in names:
        require_one_of(name, "case", known)
    return [known[name] for name in names]


def among(case: Case, names: Sequence[str]) -> Case:
    """The case with those of its contestants alone. Raises UsageError for a name that is none."""
    for name in names:
        require_one_of(name, "only", (*HF, *OURS))
    others = tuple(name for name in (*HF, *OURS) if name not in names)
    return replace(case, without=(*case.without, *others))


def cases(quick: bool, device: str, data_dir: Path | None) -> list[Case]:
    """The most telling first. ``--quick`` on a CPU: the bars' contestants, without a compiler's."""
    cpu = device == "cpu"
    tasks = ("demo",) if data_dir is None else ("sst2", "mrpc", "qnli")
    if quick and cpu:
        less = ("hf-compiled",)
        least = ("hf-padded", *less, "dps", "rows-0.1", "freeze-0.67")
        real = [
            _real(task, data_dir, "minilm", minilm, 3, less if place == 0 else least)
            for place, task in enumerate(tasks[:2])
        ]
        return [*real, _full("bert-base-8x128", bert_base, 8, 128, 3, least)]
    rounds = 9 if cpu else 30
    small, large = (
        _full(f"bert-base-{rows}x128", bert_base, rows, 128, rounds) for rows in (8, 32)
    )
    real = [_real(task, data_dir, "minilm", minilm, 24) for task in tasks]
    if quick:
        return [large, real[0]]
    base = [_real(task, data_dir, "bert-base", bert_base, 8) for task in tasks]
    if cpu:
        return [*real, small, large, *base]
    return [large, *real, *base, small, _full("bert-large-16x384", bert_large, 16, 384, 20)]


def _real(
    task: str,
    data_dir: Path | None,
    name: str,
    model: Callable[[], nn.Module],
    batches: int,
    without: tuple[str, ...] = (),
) -> Case:
    return Case(
        name=f"{task}-{name}-32",
        model=model,
        sentences=lambda: sentences(task, data_dir, batches),
        rounds=batches,
        without=without,
    )


def _full(
    name: str,
    model: Callable[[], nn.Module],
    rows: int,
    length: int,
    rounds: int,
    without: tuple[str, ...] = (),
) -> Case:
    return Case(
        name=name,
        model=model,
        sentences=lambda: [full_length(rows, length, seed) for seed in range(4)],
        rounds=rounds,
        without=("hf-padded", *without),
    )


def measure(
    case: Case, dtype: torch.dtype, device: str, progress: Callable[[str], None], *, count: bool
) -> list[Row]:
    """Every contestant of a case, in turn. ``count``: the FLOPs of its step as well."""
    name = f"{case.name} {str(dtype).removeprefix('torch.')}"
    progress(f"{name}: setting up")
    torch.manual_seed(0)
    base = case.model().to(device=device, dtype=dtype).train()
    race = Race(base=base, rows=case.sentences(), device=device)
    made = {who: race.make(who) for who in (*HF, *OURS) if who not in case.without}
    peaks = {who: _peak(one) for who, one in made.items()}
    work = {who: _flops(one) for who, one in made.items()} if count else {}
    product, work[PRODUCT] = _product(race, dtype)
    progress(f"{name}: {len(made)} contestants, {case.rounds} rounds")
    times = interleave(
        {who: _one(step) for who, step in made.items()} | {PRODUCT: product},
        rounds=case.rounds,
        warmup=1 if device == "cpu" else 3 * len(race.rows),
        device=device,
    )
    rate = work[PRODUCT] / times[PRODUCT].median_ms
    shares = {who: flops / rate / times[who].median_ms for who, flops in work.items()}
    return _rows(case, dtype, race, times, peaks, shares)


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
                "tokens_per_s": race.tokens / times[candidate].median_ms * 1e3,
                "product_share": shares.get(candidate),
                "baseline_product_share": shares.get(baseline),
            },
        )
        for candidate in OURS
        for baseline in BASELINES
        if candidate != baseline and candidate in times and baseline in times
    ]


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


def minilm() -> nn.Module:
    """The embedded weights with a fresh classifier."""
    with quiet():
        return load_model(_minilm(), labels=2)


def _minilm() -> Path:
    from sensikernels.data import embedded_model_path

    return embedded_model_path()


def bert_base() -> nn.Module:
    """BERT-base at random."""
    from sensikernels.hf.load import random_bert

    return random_bert()


def bert_large() -> nn.Module:
    """BERT-large at random."""
    from sensikernels.hf.load import random_bert

    return random_bert(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )


def sentences(task: str, data_dir: Path | None, count: int) -> list[list[Sentence]]:
    """``count`` batches of 32 tokenised training rows in random order, as a Trainer draws them."""
    from sensikernels.data import encode, load

    examples = load(task, data_dir=data_dir, split="train", max_samples=BATCH * count)
    encoded = encode(examples, load_tokenizer(_minilm()))
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(0)).tolist()
    return [[encoded[i] for i in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]


def full_length(rows: int, length: int, seed: int) -> list[Sentence]:
    """Random rows without padding."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [
        Sentence(rng.integers(1000, 30000, length, dtype=np.int32), None, int(rng.integers(2)))
        for _ in range(rows)
    ]
