"""The settings of a fine-tuning run, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sensikernels._core.checks import require, require_one_of
from sensikernels._core.errors import UsageError
from sensikernels.data import Task, get_task, kind_of
from sensikernels.data.sources import SUFFIXES
from sensikernels.hf.schedule import SCHEDULES
from sensikernels.masks import Budget, Plan
from sensikernels.methods import BASELINE, DEFAULT, METHODS, Method, method, options_of
from sensikernels.training.trackers import check_trackers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32}
"""What weights are stored in."""
AUTOCAST = {"fp16": torch.float16}
"""What products are computed in where that is narrower."""
EMBEDDINGS = ("sparse", "frozen", "dense")
DROPOUTS = ("counter", "torch")
DEVICES = ("auto", "cpu", "cuda")
PARALLELS = ("ddp", "fsdp")
# Least and most of each whole number; beyond is a slip of the keyboard, and would never end.
_COUNTS = {
    "batch_size": (1, 1 << 20),
    "pad_to_multiple": (1, 1 << 16),
    "ranking_rows": (1, 1 << 31),
    "max_train_samples": (1, 1 << 31),
    "max_eval_samples": (1, 1 << 31),
    "held_out": (1, 1 << 31),
    "seed": (0, (1 << 63) - 1),
    "checkpoint_every": (0, 1 << 31),
    "max_length": (8, 1 << 20),
    "warmup_steps": (0, 1 << 31),
    "gradient_accumulation_steps": (1, 1 << 20),
    "eval_steps": (0, 1 << 31),
    "early_stopping_patience": (1, 1 << 31),
    "doc_stride": (0, 1 << 20),
}
_OPTIONAL = (
    "max_train_samples",
    "max_eval_samples",
    "held_out",
    "early_stopping_patience",
    "doc_stride",
)
_LARGEST = 1e30
_MOST_EPOCHS = 10_000
# What may differ between a run and its continuation.
_FREE = ("output", "resume", "checkpoint_every", "data_dir", "device", "parallel", "report_to")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A fine-tuning run. Raises UsageError naming the first argument that is wrong.

    ``lr`` and ``dense_lr`` default to the methods' own; with ``lr`` given, the dense baseline
    takes it too. The last of ``epochs`` may be a part of one. ``embeddings``: the word table's
    gradients are row-``sparse`` (only rows that occur move), the table is ``frozen``, or updated
    ``dense``. ``dropout``: masks from a ``counter`` (parallel, none stored) or ``torch``'s own; the
    baseline's are torch's. ``packed``: the method's model runs on packed tokens, the last layer
    on first tokens (``use_packed``).
    ``checkpoint_every`` counts steps; with 0 there are those at the trim and after the last step
    alone, which every run has. ``ranking_rows`` of the training data rank the units; with ``plan``,
    a saved plan, nothing is ranked and its budget is the run's. ``held_out`` training rows take the
    place of the development rows, to choose settings by; none shares a text with those trained on.
    ``max_eval_samples`` of the development rows are scored, the same ones whatever the ``seed``.
    ``costs``: a table of ``sensikernels tune`` for a ``step_time`` budget, else measured anew.
    ``batch_size`` is that of all processes together; ``parallel`` says how several train: copies
    of the model (``ddp``) or shards of it (``fsdp``).

    ``data_dir``: the folder of GLUE, ``ner`` or ``squad``; ``train_file`` and ``dev_file`` those of
    task ``file``; the columns name what its rows, and those of ``hub:`` and ``given`` data, hold
    where that is not clear. ``max_length`` and ``doc_stride``, the tokens that neighbouring windows
    of a long context share, default to the kind of task. ``predict``: a file for the predictions of
    the development rows.

    ``schedule``: transformers' name of the learning rate's course (None: the method's own), which
    rises from zero over ``warmup_steps`` or ``warmup_ratio`` of the steps; the ``warmup`` of a
    method is another, of the trim. ``max_grad_norm`` 0 clips nothing.
    ``dtype`` fp16: float32 weights, products in float16 under autocast, a scaled loss.
    ``gradient_accumulation_steps`` batches make an optimizer step, as one big batch would.

    Evaluations come after each epoch and, unless 0, every ``eval_steps`` steps. After
    ``early_stopping_patience`` of them without a main metric above the best before by more than
    ``early_stopping_threshold`` the run ends, the dense baseline's too. ``keep_best``: the model
    of the best evaluation is saved, and both models' best metrics are reported. Evaluations before
    the trim do not count for either: that was another model. ``report_to``: trackers that the run
    logs to, below ``output``.
    """

    task: str
    output: Path
    model: str = "minilm"
    method: str = DEFAULT
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: Budget | None = None
    plan: Path | None = None
    costs: Path | None = None
    data_dir: Path | None = None
    epochs: float = 1
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    held_out: int | None = None
    batch_size: int = 32
    lr: float | None = None
    dense_lr: float | None = None
    dtype: str = "fp32"
    seed: int = 0
    device: str = "auto"
    parallel: str = "ddp"
    compare_dense: bool = False
    resume: bool = False
    checkpoint_every: int = 500
    embeddings: str = "sparse"
    dropout: str = "counter"
    packed: bool = True
    pad_to_multiple: int = 8
    max_length: int | None = None
    ranking_rows: int = 256
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    schedule: str | None = None
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    gradient_accumulation_steps: int = 1
    eval_steps: int = 0
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    keep_best: bool = False
    report_to: Sequence[str] = ()
    # Data of one's own, and what is written about them.
    train_file: Path | None = None
    dev_file: Path | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    doc_stride: int | None = None
    predict: Path | None = None

    def __post_init__(self) -> None:
        task = get_task(self.task)
        self._fill_cut(task)
        require_one_of(self.method, "method", METHODS)
        require_one_of(self.dtype, "dtype", DTYPES)
        require_one_of(self.embeddings, "embeddings", EMBEDDINGS)
        require_one_of(self.dropout, "dropout", DROPOUTS)
        fits = self.dropout == "counter" or not self.packed
        require(fits, "dropout", "counter on packed tokens", self.dropout)
        require_one_of(self.device, "device", DEVICES)
        require_one_of(self.parallel, "parallel", PARALLELS)
        narrow = self.dtype in AUTOCAST
        fits = not narrow or self.parallel == "ddp"
        require(fits, "parallel", "ddp for dtype fp16, as each shard would scale alone", "fsdp")
        timed = self.budget is not None and self.budget.measure == "step_time"
        require(not (narrow and timed), "dtype", "fp32 or bf16 for a step_time budget", "fp16")
        whole = f"ddp for {self.method}, which needs whole gradients"
        fits = self.parallel == "ddp" or not METHODS[self.method].needs_whole_gradients
        require(fits, "parallel", whole, self.parallel)
        for name, (least, most) in _COUNTS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            require(type(value) is int, name, "a whole number", f"{value!r:.40}")
            require(value >= least, name, f"at least {least}", value)
            require(value <= most, name, f"at most {most}", f"{value:.3g}")
        for name in ("lr", "dense_lr", "weight_decay", "max_grad_norm", "early_stopping_threshold"):
            value = getattr(self, name)
            ok = value is None or (math.isfinite(value) and 0 <= value <= _LARGEST)
            require(ok, name, f"a finite number of at least 0, at most {_LARGEST:g}", value)
        self._check_epochs()
        self._check_schedule()
        check_trackers(self.report_to)
        lone = self.early_stopping_threshold > 0 and self.early_stopping_patience is None
        wanted = "none without early_stopping_patience"
        require(not lone, "early_stopping_threshold", wanted, self.early_stopping_threshold)
        self._check_places(task)
        self._check_budget()

    def _check_epochs(self) -> None:
        number = type(self.epochs) in (int, float) and math.isfinite(self.epochs)
        require(number, "epochs", "a number", f"{self.epochs!r:.40}")
        require(self.epochs > 0, "epochs", "above 0", self.epochs)
        require(
            self.epochs <= _MOST_EPOCHS, "epochs", f"at most {_MOST_EPOCHS}", f"{self.epochs:.3g}"
        )
        if self.epochs == int(self.epochs):
            object.__setattr__(self, "epochs", int(self.epochs))

    def _check_schedule(self) -> None:
        steps, ratio = self.warmup_steps, self.warmup_ratio
        share = isinstance(ratio, (int, float)) and 0 <= ratio <= 1
        require(share, "warmup_ratio", "a share of the steps in [0, 1]", ratio)
        require(not (steps and ratio), "warmup_ratio", "none beside warmup_steps", ratio)
        if self.schedule is None:
            return
        require_one_of(self.schedule, "schedule", SCHEDULES)
        fits = self.schedule != "constant" or not (steps or ratio)
        require(fits, "schedule", "constant_with_warmup for a warm-up", "constant")

    def _fill_cut(self, task: Task) -> None:
        """The kind's own lengths where none are given; a stride only where there are windows."""
        cut = kind_of(task).cut
        if self.max_length is None:
            object.__setattr__(self, "max_length", cut.max_length)
        if cut.doc_stride is None:
            wanted = f"none for task {task.name}, which has no windows"
            require(self.doc_stride is None, "doc_stride", wanted, self.doc_stride)
        elif self.doc_stride is None:
            object.__setattr__(self, "doc_stride", cut.doc_stride)

    def _check_places(self, task: Task) -> None:
        """Each task has its own rows from its own place, and no other."""
        name, source = task.name, task.source
        if source == "folder":
            held = " and ".join(task.files(split)[0] for split in ("train", "dev"))
            require(self.data_dir is not None, "data_dir", f"the folder that holds {held}", "none")
        elif source != "glue":
            why = f"none, as {name} is generated" if source == "generated" else f"none for {name}"
            require(self.data_dir is None, "data_dir", why, self.data_dir)
        for option in ("train_file", "dev_file"):
            path = getattr(self, option)
            if source == "files":
                require(path is not None, option, f"a file for task {name}", "none")
                known = path.suffix.lower() in SUFFIXES
                require(known, option, f"a file that ends in {', '.join(SUFFIXES)}", path)
            else:
                require(path is None, option, f"none for task {name}, but for task file", path)
        columns = source in ("files", "hub", "given")
        for option in ("text_column", "pair_column", "label_column"):
            column = getattr(self, option)
            require(columns or column is None, option, f"none for task {name}", column)
        if self.predict is not None:
            some = self.max_eval_samples
            require(some is None, "predict", "none beside max_eval_samples", self.predict)
            kind_of(task).check_file(task, self.predict)

    def _check_budget(self) -> None:
        needs = METHODS[self.method].needs_budget
        timed = self.budget is not None and self.budget.measure == "step_time"
        require(timed or self.costs is None, "costs", "none without a step_time budget", self.costs)
        if self.plan is not None:
            require(needs, "plan", f"none for method {self.method}", self.plan)
            require(self.budget is None, "budget", "none beside a plan", self.budget)
            return
        if needs and self.budget is None:
            raise UsageError(
                "budget: expected --flops, --params, --step-time, --units or --plan for method "
                f"{self.method}, "
                "got none"
            )
        if self.budget is not None and not needs:
            takers = ", ".join(sorted(name for name, m in METHODS.items() if m.needs_budget))
            raise UsageError(
                f"budget: expected none for method {self.method} (budgets are for {takers}), "
                f"got {self.budget.measure} {self.budget.requested}"
            )

    def make_method(self) -> Method:
        """The method with its options."""
        if self.plan is not None:
            return METHODS[self.method].planned(Plan.load(self.plan), **self.options)
        return method(self.method, **self.options)

    def learning_rate(self) -> float:
        """Peak learning rate of the method."""
        return METHODS[self.method].learning_rate if self.lr is None else self.lr

    def dense_learning_rate(self) -> float:
        """Peak learning rate of the dense baseline."""
        given = self.lr if self.dense_lr is None else self.dense_lr
        return BASELINE.learning_rate if given is None else given

    def to_json(self) -> dict[str, Any]:
        """Every setting, plain."""
        plain = {k: v for k, v in vars(self).items() if k not in ("budget", "options")}
        paths = ("output", "data_dir", "plan", "costs", "train_file", "dev_file", "predict")
        plain |= {k: None if plain[k] is None else str(plain[k]) for k in paths}
        plain["report_to"] = list(self.report_to)
        plain["options"] = {k: _plain(v) for k, v in self.options.items()}
        plain["budget"] = None if self.budget is None else self.budget.to_json()
        return plain

    def identity(self) -> dict[str, Any]:
        """The settings that a continuation must share with the run it continues."""
        return {k: v for k, v in self.to_json().items() if k not in _FREE}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def parse_options(method_name: str, pairs: Iterable[str]) -> dict[str, Any]:
    """``key=value`` pairs as options of the method, typed by their defaults.

    Lists are separated by commas; ``multiples=heads:1,neurons:16`` makes a mapping. Raises
    UsageError for a malformed pair, an unknown key or a value of the wrong kind.
    """
    known = {name: default for name, (default, _) in options_of(method_name).items()}
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        require(bool(separator), "method-option", "key=value", repr(pair))
        if key not in known:
            names = ", ".join(sorted(known)) or "none"
            raise UsageError(f"method-option: {method_name} takes {names}; got {key!r}")
        options[key] = _typed(key, text.strip(), known[key])
    method(method_name, **options)
    return options


def _typed(key: str, text: str, default: Any) -> Any:
    argument = f"method-option {key}"
    if isinstance(default, bool):
        require(text in ("true", "false"), argument, "true or false", repr(text))
        return text == "true"
    if isinstance(default, int):
        return _number(argument, text, int)
    if isinstance(default, float):
        return _number(argument, text, float)
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(","))
    if default is None:
        return parse_counts(text, argument, separator=":")
    return text


def parse_counts(text: str, argument: str = "units", *, separator: str = "=") -> dict[str, int]:
    """``heads=36,neurons=4608`` as a mapping. Raises UsageError."""
    counts: dict[str, int] = {}
    for part in text.split(","):
        name, found, number = part.partition(separator)
        expected = f"pairs like heads{separator}36,neurons{separator}4608"
        require(bool(found) and bool(name.strip()), argument, expected, repr(text))
        counts[name.strip()] = _number(argument, number.strip(), int)
    return counts


def _number(argument: str, text: str, kind: type) -> Any:
    require(len(text) <= 40, argument, "a number of few digits", f"{text:.40}…")
    try:
        return kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise UsageError(f"{argument}: expected {expected}, got {text!r}") from None
