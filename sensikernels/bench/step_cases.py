"""The cases of ``step``: models, the sentences of their batches, and who races in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from sensikernels._core.checks import require_one_of
from sensikernels.bench.contestants import GROUPED, HF, OURS
from sensikernels.bench.sentences import (
    full_length,
    grouped,
    grouped_sentences,
    sentences,
    windows,
)
from sensikernels.data import embedded_model_path
from sensikernels.data.rows import TokenRow
from sensikernels.hf import load_model, quiet
from sensikernels.hf.load import random_model

WINDOW, WINDOWS = 384, 8
BATCHES, QUICK_BATCHES = 10, 3
CYCLES, QUICK_CYCLES = 7, 2
RACING = (GROUPED, "dense", "sensi-bert-0.5")
"""Who races over grouped batches."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, the sentences of its batches, who is left out, and how many rounds.

    ``cycles``: the sentences are those of batches grouped by length, and a round is all of them.
    ``absent``: what is missing for it to run; empty: nothing.
    """

    name: str
    model: Callable[[], nn.Module]
    sentences: Callable[[], list[list[TokenRow]]]
    rounds: int
    without: tuple[str, ...] = ()
    cycles: bool = False
    absent: str = ""

    @property
    def contestants(self) -> tuple[str, ...]:
        """Who races, in turn: the one that groups only where batches are grouped."""
        without = self.without if self.cycles else (*self.without, GROUPED)
        return tuple(name for name in (*HF, *OURS) if name not in without)


def named(
    names: Sequence[str],
    device: str,
    data_dir: Path | None,
    squad_dir: Path | None = None,
    quick: bool = False,
) -> list[Case]:
    """The full cases of these names; ``quick`` shortens those of grouped batches alone.

    Raises UsageError for a name that is none.
    """
    every = cases(False, device, data_dir, squad_dir)
    shorter = {one.name: one for one in grouped_cases(quick, data_dir, squad_dir)}
    known = {one.name: shorter.get(one.name, one) for one in every}
    for name in names:
        require_one_of(name, "case", known)
    return [known[name] for name in names]


def among(case: Case, names: Sequence[str]) -> Case:
    """The case with those of its contestants alone. Raises UsageError for a name that is none."""
    for name in names:
        require_one_of(name, "only", (*HF, *OURS))
    others = tuple(name for name in (*HF, *OURS) if name not in names)
    return replace(case, without=(*case.without, *others))


def cases(
    quick: bool, device: str, data_dir: Path | None, squad_dir: Path | None = None
) -> list[Case]:
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
    by_length = grouped_cases(False, data_dir, squad_dir)
    if cpu:
        return [*real, small, large, *base, *by_length]
    wide = _full("bert-large-16x384", bert_large, 16, 384, 20)
    return [large, *real, *base, small, wide, *by_length]


def grouped_cases(quick: bool, data_dir: Path | None, squad_dir: Path | None) -> list[Case]:
    """Every family's usual shape on short sentences, and full windows of question answering."""
    task = "demo" if data_dir is None else "sst2"
    batches, cycles = (QUICK_BATCHES, QUICK_CYCLES) if quick else (BATCHES, CYCLES)
    without = tuple(name for name in (*HF, *OURS) if name not in RACING)
    short = [
        Case(
            name=f"{task}-{name}-32",
            model=model,
            sentences=partial(grouped_sentences, task, data_dir, batches, types=name in TYPED),
            rounds=cycles,
            without=without,
            cycles=True,
        )
        for name, model in SHAPES.items()
    ]
    long = Case(
        name=f"squad-minilm-{WINDOW}-{WINDOWS}",
        model=minilm_answering,
        sentences=lambda: grouped(windows(squad_dir or Path(), WINDOWS * batches, WINDOW), WINDOWS),
        rounds=cycles,
        without=without,
        cycles=True,
        absent="" if squad_dir else "expected squad-dir, a folder with SQuAD's train.json",
    )
    return [*short, long]


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


def minilm() -> nn.Module:
    """The embedded weights with a fresh classifier."""
    with quiet():
        return load_model(embedded_model_path(), labels=2)


def minilm_answering() -> nn.Module:
    """A question-answering model of the embedded one's shape, at random."""
    from transformers import AutoConfig, AutoModelForQuestionAnswering

    config = AutoConfig.from_pretrained(str(embedded_model_path()))
    model: nn.Module = AutoModelForQuestionAnswering.from_config(config)
    return model


def bert_base() -> nn.Module:
    """BERT-base at random."""
    return random_model("bert")


def bert_large() -> nn.Module:
    """BERT-large at random."""
    return random_model(
        "bert",
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    )


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "roberta-base": partial(
        random_model,
        "roberta",
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    ),
    "distilbert": partial(random_model, "distilbert"),
    "electra-small": partial(random_model, "electra"),
    "modernbert-base": partial(random_model, "modernbert", classifier_pooling="mean"),
}
"""By name: a published model's shape at random, vocabulary and dropout as there."""
TYPED = ("electra-small",)
"""Those of them with token types."""
