"""The bars each figure is held against, as data, and how a set of results meets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
Rates = Mapping[str, float]
"""Ceilings by name: GB/s, TFLOP/s, microseconds."""
Figure = Callable[[Row, Rates], float | None]
NOT_YET = "not yet measured"
BOTH = ("cpu", "cuda")
CUBE = "gemm-bfloat16-8192x8192x8192"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """The worst of the rows that match ``where`` must be ``at_least`` or ``at_most`` a number.

    ``figure`` is what a row measured, its ratio by default. With a ``ceiling`` the number is for
    their quotient. A tuple in ``where`` lists what is allowed, a callable decides.
    """

    what: str
    suite: str
    where: Mapping[str, Any]
    devices: tuple[str, ...] = ("cuda",)
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "×"
    figure: Figure = field(default=lambda row, _: float(row["ratio"]))
    ceiling: Figure | None = None

    def text(self) -> str:
        """The bar as a table shows it."""
        sign, number = ("≥", self.at_least) if self.at_least is not None else ("≤", self.at_most)
        unit = " of the ceiling" if self.ceiling is not None else f" {self.unit}"
        return f"{sign} {number:g}{unit}".replace(" ×", "×")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The worst matching row: its figure, the ceiling, their quotient, and whether it holds."""

    measured: float
    ceiling: float | None
    share: float | None
    held: bool
    rows: int


def _value(name: str, scale: float = 1.0) -> Figure:
    def read(row: Row, _: Rates) -> float | None:
        return None if row.get(name) is None else float(row[name]) * scale

    return read


def _rate(name: str) -> Figure:
    return lambda _, rates: rates.get(name)


def l2_rate(rates: Rates) -> float | None:
    """The best of the L2 read rates, GB/s."""
    return max((v for n, v in rates.items() if n.startswith("l2-read")), default=None)


def blocks_ceiling(row: Row, rates: Rates) -> float | None:
    """TFLOP/s of 128 tokens by a block: 128 b / (128 + b) FLOP per byte of L2, or the GEMM's."""
    l2, gemm = l2_rate(rates), rates.get(CUBE)
    if l2 is None or gemm is None:
        return None
    side = int(str(row["block"]).partition("x")[0])
    return min(gemm, 128 * side / (128 + side) * l2 / 1e3)


def step_ceiling_ms(
    _: Row, rates: Rates, tokens: int = 4096, wide: int = 768, layers: int = 12
) -> float | None:
    """Milliseconds of a BERT-base step of 32 x 128 tokens at this machine's own rates.

    Encoder products forward and backward with attention; 1.2 GB of normalisations and dropout if
    fused; AdamW's 28 bytes for each of 109.48 M parameters.
    """
    gemm, copy = rates.get(CUBE), rates.get("copy")
    if gemm is None or copy is None:
        return None
    operations = 3 * 2 * tokens * (4 * wide**2 + 8 * wide**2) * layers + 0.07e12
    return operations / gemm / 1e9 + (1.2e9 + 28 * 109.48e6) / copy / 1e6


def _saved(row: Row, _: Rates) -> float:
    return float(row["ratio"]) * float(row["density"])


_COMPACT = {
    "candidate": "compact",
    "pattern": ("rows", "columns"),
    "direction": "forward+backward",
    "baseline": "dense",
}
_STEP = {"case": "bert-base-32x128", "dtype": "bfloat16"}
_SST2 = "sst2-minilm-32"
_LONG = "bert-base-8x128"


def _linear(what: str, devices: tuple[str, ...] = ("cuda",), **facts: Any) -> Bar:
    named = {
        k: facts.pop(k) for k in ("at_least", "at_most", "figure", "ceiling", "unit") if k in facts
    }
    return Bar(what=what, suite="linear", where=facts, devices=devices, **named)


def _step(what: str, least: float, candidate: str, baseline: str, case: str) -> Bar:
    where = {"case": case, "candidate": candidate, "baseline": baseline}
    return Bar(what=what, suite="step", devices=("cpu",), where=where, at_least=least)


BARS: tuple[Bar, ...] = (
    Bar(
        what="BERT-base 32 × 128 bf16, ours dense",
        suite="step",
        unit="ms",
        at_most=1.35,
        where=_STEP | {"candidate": "dense"},
        figure=_value("candidate_ms"),
        ceiling=step_ceiling_ms,
    ),
    Bar(
        what="… over HF compiled",
        suite="step",
        at_least=1.3,
        where=_STEP | {"candidate": "dense", "baseline": "hf-compiled"},
    ),
    Bar(
        what="… half the FLOPs over ours dense",
        suite="step",
        at_least=1.8,
        where=_STEP | {"candidate": "sensi-bert-0.5", "baseline": "dense"},
    ),
    _linear(
        "compact linear over cuBLAS compacted by hand",
        candidate="compact",
        baseline="hand-compacted",
        at_least=0.97,
    ),
    _linear(
        "64 × 64 blocks, forward",
        candidate="block-sparse",
        block="64x64",
        direction="forward",
        tokens=lambda n: n >= 1024,
        density=lambda d: d < 1,
        figure=_value("gflops", 1e-3),
        ceiling=blocks_ceiling,
        unit="TFLOP/s",
        at_least=0.8,
    ),
    _linear("blocks over torch BSR", candidate="block-sparse", baseline="torch-bsr", at_least=1.0),
    _linear(
        "weight gradient of rows: speed-up × density",
        candidate="selective",
        pattern="rows",
        baseline="dense",
        figure=_saved,
        at_least=0.9,
    ),
    _linear(
        "weight gradient of 64 × 64 blocks at 1/10",
        candidate="selective",
        density=0.1,
        pattern="blocks",
        baseline="dense",
        at_least=2.0,
    ),
    _linear("compact at 1/2 over dense", ("cpu",), density=0.5, at_least=1.8, **_COMPACT),
    _linear("compact at 1/4 over dense", ("cpu",), density=0.25, at_least=3.4, **_COMPACT),
    _linear("compact at 1/10 over dense", ("cpu",), density=0.1, at_least=8.0, **_COMPACT),
    _linear(
        "compact over compacted by hand",
        ("cpu",),
        candidate="compact",
        baseline="hand-compacted",
        direction="forward+backward",
        at_least=0.95,
    ),
    _linear(
        "64 × 64 blocks at 1/4 over dense",
        ("cpu",),
        candidate="block-sparse",
        density=0.25,
        direction="forward+backward",
        block="64x64",
        baseline="dense",
        at_least=2.0,
    ),
    _linear(
        "weight gradient of 1/10 of the rows over dense",
        ("cpu",),
        candidate="selective",
        density=0.1,
        pattern="rows",
        baseline="dense",
        at_least=6.0,
    ),
    _linear(
        "what auto chooses over dense", BOTH, candidate="auto", baseline="dense", at_least=0.98
    ),
    Bar(
        what="row sums of all tensors",
        suite="reductions",
        unit="GB/s",
        at_least=0.9,
        where={"case": "row_sums"},
        figure=_value("gigabytes_per_s"),
        ceiling=_rate("copy"),
    ),
    Bar(
        what="row sums, share of the read rate",
        suite="reductions",
        devices=("cpu",),
        unit="",
        where={"case": "row_sums"},
        figure=_value("share_of_read_rate"),
        at_least=0.9,
    ),
    Bar(
        what="row sums over a loop and foreach",
        suite="reductions",
        devices=("cpu",),
        where={"case": "row_sums", "baseline": ("loop", "foreach")},
        at_least=7.0,
    ),
    Bar(
        what="unit budget",
        suite="reductions",
        unit="ms",
        at_most=0.02,
        where={"case": "unit_budget"},
        figure=_value("candidate_ms"),
    ),
    Bar(
        what="best tenth of 10⁸ entries",
        suite="reductions",
        unit="ms",
        at_most=0.25,
        where={"case": "threshold", "entries": lambda n: n >= 10**8},
        figure=_value("candidate_ms"),
    ),
    Bar(
        what="best tenth, streaming passes",
        suite="reductions",
        devices=("cpu",),
        unit="",
        where={"case": "threshold"},
        figure=_value("streaming_passes"),
        at_most=1.5,
    ),
    Bar(
        what="best tenth over topk",
        suite="reductions",
        devices=("cpu",),
        where={"case": "threshold", "baseline": "topk"},
        at_least=25.0,
    ),
    Bar(
        what="best tenth over kthvalue",
        suite="reductions",
        devices=("cpu",),
        where={"case": "threshold", "baseline": "kthvalue"},
        at_least=10.0,
    ),
    Bar(
        what="AdamW on 1/10 of the rows over fused on all",
        suite="optimizer",
        devices=BOTH,
        where={"candidate": "subset-rows", "baseline": "adamw-fused"},
        at_least=6.0,
    ),
    Bar(
        what="AdamW on everything over fused",
        suite="optimizer",
        devices=BOTH,
        where={"candidate": "subset", "baseline": "adamw-fused"},
        at_least=0.95,
    ),
    Bar(
        what="… with fused sensitivities",
        suite="optimizer",
        devices=BOTH,
        where={"candidate": "subset-statistics", "baseline": "subset"},
        at_least=0.97,
    ),
    _step("SST-2 batches, ours dense over HF", 2.0, "dense", "hf-dynamic", _SST2),
    _step("… over HF padded to 128", 6.0, "dense", "hf-padded", _SST2),
    _step("… half the FLOPs over ours dense", 1.5, "sensi-bert-0.5", "dense", _SST2),
    _step("BERT-base 8 × 128, ours dense over HF", 1.25, "dense", "hf-dynamic", _LONG),
    _step("… half the FLOPs over ours dense", 1.75, "sensi-bert-0.5", "dense", _LONG),
    _step("… biases only over ours dense", 1.45, "bitfit", "dense", _LONG),
)


def of_device(device: str) -> tuple[Bar, ...]:
    """The bars that concern ``cpu`` or ``cuda``."""
    return tuple(bar for bar in BARS if device in bar.devices)


def rates(ceilings: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Ceilings by name."""
    return {one["name"]: float(one["value"]) for one in ceilings}


def judge(bar: Bar, rows: Sequence[Row], known: Rates) -> Verdict | None:
    """Hold the matching rows against the bar; None where nothing that it needs was measured."""
    found = []
    for row in rows:
        if not _matches(row, bar.where) or row.get("l2") == "cold":
            continue
        measured = bar.figure(row, known)
        ceiling = None if bar.ceiling is None else bar.ceiling(row, known)
        if measured is None or (bar.ceiling is not None and not ceiling):
            continue
        share = measured / ceiling if ceiling else None
        found.append((measured if share is None else share, measured, ceiling, share))
    if not found:
        return None
    if bar.at_least is not None:
        value, measured, ceiling, share = min(found, key=lambda f: f[0])
        held = value >= bar.at_least
    else:
        value, measured, ceiling, share = max(found, key=lambda f: f[0])
        held = bar.at_most is not None and value <= bar.at_most
    return Verdict(measured=measured, ceiling=ceiling, share=share, held=held, rows=len(found))


def _matches(row: Row, where: Mapping[str, Any]) -> bool:
    for name, wanted in where.items():
        if name not in row:
            return False
        value = row[name]
        if callable(wanted):
            if not wanted(value):
                return False
        elif value not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            return False
    return True


def table(device: str, rows: Mapping[str, Sequence[Row]], known: Rates) -> list[str]:
    """Markdown lines: what, measured, ceiling, ratio, bar, held; of ``rows`` by suite."""
    lines = ["| | measured | ceiling | ratio | bar | held |", "|---|---:|---:|---:|---|---|"]
    for bar in of_device(device):
        verdict = judge(bar, rows.get(bar.suite, ()), known)
        if verdict is None:
            lines.append(f"| {bar.what} | {NOT_YET} | | | {bar.text()} | – |")
            continue
        unit = f" {bar.unit}".replace(" ×", "×").rstrip()
        ceiling = "" if verdict.ceiling is None else f"{verdict.ceiling:.4g}{unit}"
        share = "" if verdict.share is None else f"{verdict.share:.2f}"
        held = "yes" if verdict.held else "**no**"
        lines.append(
            f"| {bar.what} | {verdict.measured:.3g}{unit} | {ceiling} | {share} "
            f"| {bar.text()} | {held} |"
        )
    return lines
