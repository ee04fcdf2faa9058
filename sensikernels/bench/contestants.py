"""The contestants of a training step: HuggingFace's model as it is, ours dense and planned.

All see the same sentences. HuggingFace's are padded, to the longest of the batch (``hf-dynamic``,
``hf-compiled``) or to 128 tokens (``hf-padded``, as ``run_glue`` does by default); ours run on
packed tokens, on a GPU as CUDA graphs. Dropout as in the model; gradient clipping and AdamW
included everywhere.

``hf-grouped`` is the best habit of a Trainer without a compiler: the same sentences in batches of
similar length (``group_by_length``), which leaves almost no padding. Like every stock contestant it
has transformers' default attention (sdpa), torch's fused AdamW, our room for compiled shapes and
the same precision of products. Ours take those sentences in random order, as a Trainer does that
does not group: packed tokens need no grouping, and so keep the order random.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sensikernels._core.products import precision
from sensikernels._core.shapes import token_multiple
from sensikernels.data import collate, collate_packed
from sensikernels.data.rows import Per, TokenRow
from sensikernels.hf import apply, encoder_layers, sensitivity
from sensikernels.masks import Budget, Geometry, Mask, Plan, plan
from sensikernels.methods import DPS, BitFit, Method, Run
from sensikernels.methods.freeze import frozen_lowest
from sensikernels.ops.select_kept import select_kept
from sensikernels.optim import SubsetAdamW
from sensikernels.training.graph import GraphedStep

Batch = dict[str, Any]
Rows = Sequence[Sequence[TokenRow]]
Collate = Callable[..., Batch]
"""Rows, and the id that pads them as ``pad``, to a batch."""

PADDED = 128
BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""How far two losses of one batch may lie apart, by what the model computes in."""
ROWS_SHARE, FROZEN_SHARE, FLOPS_SHARE = 0.1, 2 / 3, 0.5
GROUPED = "hf-grouped"
HF = ("hf-padded", "hf-dynamic", GROUPED, "hf-compiled")
OURS = ("dense", "sensi-bert-0.5", "bitfit", "dps", "rows-0.1", "freeze-0.67")


@dataclass(kw_only=True, eq=False)
class Contestant:
    """One model, its optimizer and its own view of the batches; a call takes one step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Sequence[Batch]
    clip: bool = False
    graphs: GraphedStep | None = None
    method: Method | None = None
    run: Run | None = None
    _turn: Iterator[Batch] = field(init=False)

    def __post_init__(self) -> None:
        self._turn = cycle(self.batches)

    def __call__(self) -> None:
        """Forward, backward, clipping, update on the next batch."""
        if self.graphs is not None:
            self.graphs(next(self._turn))
            return
        self.model(**next(self._turn)).loss.backward()
        if self.method is not None and self.run is not None:
            self.method.before_step(self.run)
            self.run.step += 1
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True, kw_only=True)
class Race:
    """The model to copy, the rows of each batch and the device that all contestants share.

    ``grouped``: the same rows in batches of similar length, for the contestant that groups.
    """

    base: nn.Module
    rows: Rows
    device: str
    grouped: Rows = ()

    def batches(self, how: Collate, rows: Rows | None = None) -> list[Batch]:
        """Every batch, or those of ``rows``, as ``how`` collates it, on the device."""
        config: Any = self.base.config
        made = (how(one, pad=config.pad_token_id or 0) for one in rows or self.rows)
        return [
            {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            for batch in made
        ]

    @property
    def tokens(self) -> float:
        """Mean real tokens of a batch."""
        return sum(len(r.input_ids) for rows in self.rows for r in rows) / len(self.rows)

    @property
    def mean_length(self) -> float:
        """Σ S² / Σ S of the sentences: what attention costs on packed tokens."""
        lengths = [len(r.input_ids) for rows in self.rows for r in rows]
        return sum(n * n for n in lengths) / sum(lengths)

    @property
    def packed(self) -> Collate:
        """How ours are collated on this device."""
        return partial(packed, multiple=token_multiple(self.device))

    def make(self, name: str) -> Contestant:
        """The contestant of this name on a copy of ``base``."""
        model = copy.deepcopy(self.base)
        if name in HF:
            return self._hugging_face(model, name)
        made = self._planned(ours(model, self.batches(self.packed)), name)
        if self.device == "cuda" and made.method is None:
            made.graphs = GraphedStep(made.model, made.optimizer)
        return made

    def _hugging_face(self, model: nn.Module, name: str) -> Contestant:
        how = partial(padded, multiple=PADDED if name == "hf-padded" else 1)
        batches = self.batches(how, self.grouped if name == GROUPED else self.rows)
        contestant = hugging_face(model, batches)
        if name == "hf-compiled":
            mode = "reduce-overhead" if self.device == "cuda" else None
            compiled: Any = torch.compile(model, dynamic=True, mode=mode)
            contestant.model = compiled
        return contestant

    def _planned(self, one: Contestant, name: str) -> Contestant:
        length = self.mean_length
        if name == "sensi-bert-0.5":
            scores = sensitivity(one.model, self.batches(partial(padded, multiple=8))[:4])
            made = plan(scores, Budget(flops=FLOPS_SHARE), geometry=Geometry.uniform(length))
            apply(one.model, made, optimizer=one.optimizer)
        elif name == "rows-0.1":
            apply(one.model, largest_rows(one.model, ROWS_SHARE))
            one.optimizer = our_optimizer(one.model)
        elif name == "freeze-0.67":
            apply(one.model, frozen_lowest(one.model, FROZEN_SHARE))
        elif name in ("bitfit", "dps"):
            method: Method = BitFit() if name == "bitfit" else DPS()
            run = Run(
                model=one.model,
                optimizer=one.optimizer,
                max_steps=200,
                batches=list,
                geometry=Geometry.uniform(length),
            )
            method.begin(run)
            if name == "dps":  # the other one is done once it has begun
                one.method, one.run = method, run
        return one


def padded(rows: Sequence[TokenRow], *, pad: int = 0, multiple: int = 1) -> Batch:
    """HuggingFace's form, padded to the longest row rounded up to ``multiple``."""
    return dict(collate(rows, pad_token_id=pad, pad_to_multiple=multiple, per=_per(rows)))


def packed(rows: Sequence[TokenRow], *, pad: int = 0, multiple: int = 1) -> Batch:
    """Tokens end to end, their number rounded up to ``multiple``."""
    return collate_packed(rows, pad_token_id=pad, multiple=multiple, per=_per(rows))


def _per(rows: Sequence[TokenRow]) -> Per:
    """What has a label: a label that is a pair is an answer's first and last token."""
    return "span" if np.ndim(rows[0].label) else "row"


def hugging_face(model: nn.Module, batches: Sequence[Batch]) -> Contestant:
    """The stock model with torch's fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return Contestant(model=model, optimizer=optimizer, batches=batches, clip=True)


def ours(model: nn.Module, batches: Sequence[Batch]) -> Contestant:
    """Our dense step: packed tokens, counter dropout, row-sparse words, clipping folded in."""
    apply(model, features=("dropout", "words", "packed", "cls", "fused"))
    return Contestant(model=model, optimizer=our_optimizer(model), batches=batches)


def our_optimizer(model: nn.Module) -> SubsetAdamW:
    return SubsetAdamW(model.parameters(), lr=1e-5, max_grad_norm=1.0)


def check(race: Race, dense: Contestant) -> None:
    """No timing of a wrong step: without dropout our dense loss is HuggingFace's on a batch."""
    losses = []
    with precision("highest"), torch.no_grad():
        for model, how in ((race.base, padded), (dense.model, race.packed)):
            (batch,) = race.batches(how, race.rows[:1])
            losses.append(float(model.eval()(**batch).loss))
            model.train()
    theirs, mine = losses
    bound = BOUND[next(dense.model.parameters()).dtype] * max(1.0, abs(theirs))
    if not abs(theirs - mine) <= bound:
        raise AssertionError(f"dense: loss {mine:.6f}, HuggingFace's {theirs:.6f} (+-{bound:.1g})")


def largest_rows(model: nn.Module, share: float) -> Plan:
    """An update mask on every encoder linear: the rows with the largest Σ|w|."""
    masks = {}
    for layer in encoder_layers(model):
        for role in layer.family.linears:
            weight: Any = layer.linear(role).weight
            kept = select_kept(
                weight.detach().float().abs().sum(1).cpu(), k=max(1, round(share * len(weight)))
            )
            masks[layer.name(role)] = Mask.rows(kept.bits, tuple(weight.shape))
    return Plan(method=f"rows-{share:g}", update_masks=masks)
