"""Whole training steps of BERT: HuggingFace as it is, ours dense, ours under a plan.

Every contestant takes the same batches in the same order, one step a round. Dropout as in the
model, gradient clipping and AdamW included. ``hf-dynamic``: stock model, dense embedding gradient,
``torch.optim.AdamW(fused=True)``. ``dense`` (ours): counter dropout, ``SubsetAdamW``, row-sparse
word gradients. The plans come on top of ``dense``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels import _settings
from sensikernels.bench.rows import Row, row
from sensikernels.bench.timing import interleave
from sensikernels.hf import (
    apply,
    load_model,
    load_tokenizer,
    quiet,
    sensitivity,
    use_counter_dropout,
)
from sensikernels.masks import Budget, plan, tokens_of
from sensikernels.methods import BitFit, Run
from sensikernels.ops.subset_adamw import SubsetAdamW
from sensikernels.training.memory import peak_mib

Batch = dict[str, Tensor]
BASELINES = ("hf-dynamic", "dense")
CANDIDATES = ("dense", "sensi-bert-0.5", "bitfit")
_FLOPS_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the batches it trains on."""

    name: str
    model: Callable[[], nn.Module]
    batches: Callable[[], list[Batch]]
    rounds: int


def run(
    *, device: str, quick: bool, progress: Callable[[str], None], data_dir: Path | None = None
) -> list[Row]:
    """Rows of every case in float32 and bfloat16. ``data_dir``: a folder with ``SST-2/``."""
    _settings.reserve_primitive_cache(16384)
    _settings.quiet_profiler()
    torch.set_float32_matmul_precision("medium")
    rows: list[Row] = []
    for case in _cases(quick, data_dir):
        for dtype in (torch.float32, torch.bfloat16):
            progress(f"{case.name} {dtype}")
            rows += _measure(case, dtype, device, quick)
    return rows


def _cases(quick: bool, data_dir: Path | None) -> list[Case]:
    words = "demo-minilm-32" if data_dir is None else "sst2-minilm-32"
    return [
        Case(
            name=words,
            model=minilm,
            batches=lambda: sentences(data_dir, 40 if quick else 120),
            rounds=40 if quick else 120,
        ),
        Case(
            name="bert-base-8x128",
            model=_bert_base,
            batches=lambda: [_random_batch(seed) for seed in range(4)],
            rounds=4 if quick else 12,
        ),
    ]


def _measure(case: Case, dtype: torch.dtype, device: str, quick: bool) -> list[Row]:
    torch.manual_seed(0)
    batches = [{k: v.to(device) for k, v in b.items()} for b in case.batches()]
    base = case.model().to(device=device, dtype=dtype).train()
    length = sum(tokens_of(b) * b["input_ids"].shape[1] for b in batches) / sum(
        tokens_of(b) for b in batches
    )
    steps = {
        "hf-dynamic": hugging_face(copy.deepcopy(base)),
        "dense": _ours(copy.deepcopy(base)),
        "sensi-bert-0.5": _trimmed(copy.deepcopy(base), batches, length),
        "bitfit": _bitfit(copy.deepcopy(base), length),
    }
    peaks = {n: peak_mib(step.model, step.optimizer, batches[0]) for n, step in steps.items()}
    times = interleave(
        {name: _taking(step, cycle(batches)) for name, step in steps.items()},
        rounds=case.rounds,
        warmup=1 if case.rounds < 20 else len(batches),
        device=device,
    )
    return [
        row(
            suite="step",
            case=case.name,
            candidate=candidate,
            baseline=baseline,
            density=_FLOPS_SHARE if candidate.startswith("sensi") else 1.0,
            tokens=round(sum(map(tokens_of, batches)) / len(batches)),
            dtype=str(dtype).removeprefix("torch."),
            direction="step",
            candidate_time=times[candidate],
            baseline_time=times[baseline],
            peak_mib=peaks[candidate],
            extra={"baseline_peak_mib": peaks[baseline]},
        )
        for candidate in CANDIDATES
        for baseline in BASELINES
        if candidate != baseline
    ]


@dataclass(kw_only=True, eq=False)
class Step:
    """One training step of a model, as its contestant does it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip: bool = False

    def __call__(self, batch: Batch) -> None:
        self.model(**batch).loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def hugging_face(model: nn.Module) -> Step:
    return Step(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), clip=True
    )


def _ours(model: nn.Module) -> Step:
    use_counter_dropout(model)
    words: Any = model.get_input_embeddings()  # type: ignore[operator]
    words.sparse = True
    return Step(
        model=model, optimizer=SubsetAdamW(model.parameters(), lr=1e-5, max_grad_norm=1.0)
    )


def _trimmed(model: nn.Module, batches: Sequence[Batch], length: float) -> Step:
    step = _ours(model)
    scores = sensitivity(model, batches[:4])
    made = plan(scores, Budget(flops=_FLOPS_SHARE), sequence_length=length)
    apply(model, made, optimizer=step.optimizer)
    return step


def _bitfit(model: nn.Module, length: float) -> Step:
    step = _ours(model)
    BitFit().begin(
        Run(model=model, optimizer=step.optimizer, max_steps=1, batches=list,
            sequence_length=length)
    )  # fmt: skip
    return step


def _taking(step: Step, batches: Iterator[Batch]) -> Callable[[], None]:
    return lambda: step(next(batches))


def minilm() -> nn.Module:
    """The embedded weights with a fresh classifier."""
    with quiet():
        return load_model(_minilm(), labels=2)


def _minilm() -> Path:
    from sensikernels.glue import embedded_model_path

    return embedded_model_path()


def sentences(
    data_dir: Path | None, count: int, *, pad_to_multiple: int = 8, bucket: int = 32
) -> list[Batch]:
    """``count`` batches of 32 tokenised sentences: SST-2's, or the demo task's without a folder."""
    from sensikernels.glue import Batches, encode, load

    task = "demo" if data_dir is None else "sst2"
    examples = load(task, data_dir=data_dir, split="train", max_samples=32 * count)
    encoded = encode(examples, load_tokenizer(_minilm()))
    batches = Batches(
        encoded, batch_size=32, pad_to_multiple=pad_to_multiple, bucket=bucket
    )
    return [dict(batch) for batch in batches]


def _bert_base() -> nn.Module:
    from sensikernels.hf.load import random_bert

    return random_bert()


def _random_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 30000, (8, 128), generator=generator)
    labels = torch.randint(0, 2, (8,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
