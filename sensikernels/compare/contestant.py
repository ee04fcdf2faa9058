"""What takes part in a comparison: a method with its budget, epochs and options, as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sensikernels._core.checks import require
from sensikernels._core.errors import UsageError
from sensikernels.masks import Budget
from sensikernels.methods import BASELINE, METHODS
from sensikernels.training import Settings
from sensikernels.training.config import parse_options

HUGGING_FACE = "hf"
"""The stock model on padded batches of like length, with torch's fused AdamW."""
FORM = "METHOD[@SHARE][/EPOCHS][:OPTION=VALUE]…[:lr=RATE]"
_RATE = "lr="
_TEXT = re.compile(
    r"(?P<name>[\w-]+)(@(?P<share>[\d.]+))?(/(?P<epochs>\d+(\.\d+)?))?(?P<options>(:[^:]+)*)"
)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One contestant; ``epochs`` None: those of the comparison. ``share``: of the FLOPs.

    ``rate``: a learning rate that is not to be chosen. ``once``: runs with the first seed alone.
    """

    text: str
    method: str
    share: float | None = None
    epochs: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: float | None = None
    once: bool = False

    @property
    def stock(self) -> bool:
        """True for HuggingFace's model, which trains beside ours dense, step by step in turn."""
        return self.text.split("/")[0] == HUGGING_FACE

    @property
    def side(self) -> str:
        """The side of a run's report that is this contestant's."""
        return "dense" if self.stock else "planned"

    @property
    def default_rate(self) -> float:
        """The learning rate given, else the method's own."""
        return METHODS[self.method].learning_rate if self.rate is None else self.rate

    @property
    def run(self) -> str:
        """The contestant whose run serves this one: HuggingFace's model trains beside ours."""
        return BASELINE.name + self.text.removeprefix(HUGGING_FACE) if self.stock else self.text

    def settings(self, common: Settings, rates: Mapping[str, float]) -> Settings:
        """Its run with ``common``'s data, model and training; ``rates`` by side of the report."""
        return replace(
            common,
            method=self.method,
            budget=None if self.share is None else Budget(flops=self.share),
            options=dict(self.options),
            epochs=self.epochs or common.epochs,
            lr=rates.get("planned", rates.get("dense")),
            dense_lr=rates.get("dense"),
            compare_dense="dense" in rates,
        )


def contestant(text: str) -> Contestant:
    """A contestant from ``METHOD[@SHARE][/EPOCHS][:OPTION=VALUE]…[:lr=RATE]``, or ``hf``.

    With ``lr`` its learning rate is given, else it is chosen; ``hf`` takes epochs and ``lr`` too.
    Raises UsageError for another form, an unknown method or option, or a share that is none.
    """
    found = _TEXT.fullmatch(text)
    require(found is not None, "methods", f"{FORM} or {HUGGING_FACE}", repr(text))
    assert found is not None
    name, share, epochs = found["name"], found["share"], found["epochs"]
    given = found["options"].split(":")[1:]
    pairs = [pair for pair in given if not pair.startswith(_RATE)]
    rates = [pair.removeprefix(_RATE) for pair in given if pair.startswith(_RATE)]
    if name == HUGGING_FACE:
        plain = share is None and not pairs
        require(plain, "methods", f"{HUGGING_FACE} without share and options", repr(text))
        name = BASELINE.name
    known = ", ".join([HUGGING_FACE, *METHODS])
    require(name in METHODS, "methods", f"one of {known}", repr(name))
    needs = METHODS[name].needs_budget
    require(needs == (share is not None), "methods", _share_wanted(name, needs), repr(text))
    require(epochs is None or float(epochs) > 0, "methods", "epochs above 0", repr(text))
    return Contestant(
        text=text,
        method=name,
        share=None if share is None else _share(text, share),
        epochs=None if epochs is None else float(epochs),
        options=parse_options(name, pairs),
        rate=_rate(text, rates),
    )


def contestants(texts: Sequence[str], once: Sequence[str] = ()) -> tuple[Contestant, ...]:
    """All of ``texts``, and those of ``once`` marked so.

    Raises UsageError: there is none, or one twice; as ``contestant``.
    """
    every = [*texts, *once]
    require(len(texts) > 0, "methods", "at least one", "none")
    twice = sorted({text for text in every if every.count(text) > 1})
    require(not twice, "methods", "each once", twice)
    marked = tuple(replace(contestant(text), once=True) for text in once)
    return (*(contestant(text) for text in texts), *marked)


def _rate(text: str, rates: Sequence[str]) -> float | None:
    if not rates:
        return None
    try:
        value = float(rates[-1])
    except ValueError:
        value = math.nan
    known = len(rates) == 1 and math.isfinite(value) and value > 0
    require(known, "methods", "one learning rate above 0", repr(text))
    return value


def _share(text: str, share: str) -> float:
    try:
        value = float(share)
        Budget(flops=value)
    except (ValueError, UsageError):
        raise UsageError(
            f"methods: expected a share of the FLOPs above 0 and at most 1, got {text!r}"
        ) from None
    return value


def _share_wanted(name: str, needs: bool) -> str:
    return f"{name}@SHARE of the FLOPs" if needs else f"{name} without a share"
