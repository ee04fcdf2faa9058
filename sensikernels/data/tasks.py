"""The tasks: where each one's rows lie, what its columns mean, how it is scored.

GLUE is Wang et al., ICLR 2019; column names are those of its original files. ``demo`` is this
package's own task (``demo.py``) and no part of GLUE. ``FORMS`` are tasks of any data of a form:
their labels are known when the training rows have been read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from sensikernels._core.checks import expected, require

Split = Literal["train", "dev"]
SPLITS: Final = ("train", "dev")
KindName = Literal["sequences", "tokens", "answers"]
"""What is labelled: a whole text or pair, each word of it, a span of it that answers a question.
``hf.load_model`` takes the same names for heads; ``data.kinds`` has a module of each."""
Source = Literal["glue", "generated", "folder", "files", "hub", "given"]
HUB: Final = "hub:"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. ``metrics[0]`` is the main metric; ``label_names[i]`` is class ``i``.

    ``dev_files`` are tried in order. ``label_values[i]`` is what the file writes for class ``i``
    (the names, unless given). ``columns`` names a headerless file's columns. A regression task
    has a ``label_range`` and no names. ``short_rows`` allows for truncated lines in the original
    files: so many are dropped with a warning, one more is an error. ``source``: GLUE's folders, a
    ``folder`` of the task's own files, two ``files``, the ``hub``, or rows ``given`` in Python.
    ``multi_label``: a row has any number of the names.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    texts: tuple[str, ...] = ("sentence",)
    label: str = "label"
    label_names: tuple[str, ...] = ()
    label_values: tuple[str, ...] = ()
    label_range: tuple[float, float] | None = None
    kind: KindName = "sequences"
    source: Source = "glue"
    multi_label: bool = False
    folder: str | None = None
    train_files: tuple[str, ...] = ("train.tsv",)
    dev_files: tuple[str, ...] = ("dev.tsv",)
    columns: tuple[str, ...] | None = None
    short_rows: int = 0
    hub_config: str | None = None
    hub_texts: tuple[str, ...] = ()
    hub_dev: str = "validation"

    @property
    def regression(self) -> bool:
        """True if labels are scores rather than classes."""
        return self.label_range is not None

    @property
    def num_labels(self) -> int:
        """Outputs of the head: classes, 1 for regression, 2 (start and end) for answers."""
        if self.kind == "answers":
            return 2
        return 1 if self.regression else len(self.label_names)

    @property
    def problem(self) -> str | None:
        """HuggingFace's ``problem_type`` where it is not what its labels say anyway."""
        if self.multi_label:
            return "multi_label_classification"
        return "regression" if self.regression else None

    @property
    def main_metric(self) -> str:
        """The metric a report quotes."""
        return self.metrics[0]

    @property
    def values(self) -> tuple[str, ...]:
        """The label that the file writes for each class, in class order."""
        return self.label_values or self.label_names

    def files(self, split: Split) -> tuple[str, ...]:
        """File names to try, in order, inside ``folder``."""
        return self.train_files if split == "train" else self.dev_files


_PAIR = ("sentence1", "sentence2")
_BITS = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")


def _mnli(name: str, title: str, dev_files: tuple[str, ...], hub_dev: str) -> Task:
    return Task(
        name=name,
        title=title,
        folder="MNLI",
        dev_files=dev_files,
        texts=_PAIR,
        label="gold_label",
        label_names=_NLI,
        metrics=("accuracy",),
        hub_config="mnli",
        hub_texts=("premise", "hypothesis"),
        hub_dev=hub_dev,
    )


_ALL: Final = (
    Task(
        name="sst2",
        title="SST-2",
        folder="SST-2",
        label_names=("negative", "positive"),
        label_values=_BITS,
        metrics=("accuracy",),
        hub_config="sst2",
    ),
    Task(
        name="mrpc",
        title="MRPC",
        folder="MRPC",
        texts=("#1 String", "#2 String"),
        label="Quality",
        label_names=("not_equivalent", "equivalent"),
        label_values=_BITS,
        metrics=("f1", "accuracy"),
        hub_config="mrpc",
        hub_texts=_PAIR,
    ),
    Task(
        name="stsb",
        title="STS-B",
        folder="STS-B",
        texts=_PAIR,
        label="score",
        label_range=(0.0, 5.0),
        metrics=("spearman", "pearson"),
        hub_config="stsb",
    ),
    Task(
        name="qnli",
        title="QNLI",
        folder="QNLI",
        texts=("question", "sentence"),
        label_names=_ENTAILMENT,
        metrics=("accuracy",),
        hub_config="qnli",
    ),
    Task(
        name="qqp",
        title="QQP",
        folder="QQP",
        texts=("question1", "question2"),
        label="is_duplicate",
        label_names=("not_duplicate", "duplicate"),
        label_values=_BITS,
        metrics=("f1", "accuracy"),
        short_rows=32,  # a line feed inside a question cuts a few of GLUE's rows in two
        hub_config="qqp",
    ),
    # A bare dev.tsv is read as matched: it is what samples of MNLI carry.
    _mnli("mnli", "MNLI-m", ("dev_matched.tsv", "dev.tsv"), "validation_matched"),
    _mnli("mnli-mm", "MNLI-mm", ("dev_mismatched.tsv",), "validation_mismatched"),
    Task(
        name="rte",
        title="RTE",
        folder="RTE",
        texts=_PAIR,
        label_names=_ENTAILMENT,
        metrics=("accuracy",),
        hub_config="rte",
    ),
    Task(
        name="cola",
        title="CoLA",
        folder="CoLA",
        columns=("source", "label", "mark", "sentence"),
        label_names=("unacceptable", "acceptable"),
        label_values=_BITS,
        metrics=("matthews", "accuracy"),
        hub_config="cola",
    ),
    Task(
        name="wnli",
        title="WNLI",
        folder="WNLI",
        texts=_PAIR,
        label_names=("not_entailment", "entailment"),
        label_values=_BITS,
        metrics=("accuracy",),
        hub_config="wnli",
    ),
    Task(
        name="demo",
        title="demo (generated, not GLUE)",
        source="generated",
        label_names=("negative", "positive"),
        metrics=("accuracy",),
    ),
)

TASKS: Final[Mapping[str, Task]] = MappingProxyType({task.name: task for task in _ALL})


_FORMS: Final = (
    Task(
        name="ner",
        title="named entities",
        kind="tokens",
        source="folder",
        metrics=("f1", "precision", "recall"),
        train_files=("train.conll", "train.txt"),
        dev_files=("dev.conll", "dev.txt", "valid.conll", "valid.txt"),
    ),
    Task(
        name="squad",
        title="SQuAD",
        kind="answers",
        source="folder",
        metrics=("f1", "exact_match"),
        train_files=("train.json", "train-v1.1.json", "train-v2.0.json"),
        dev_files=("dev.json", "dev-v1.1.json", "dev-v2.0.json"),
    ),
    Task(name="file", title="files", source="files", metrics=("accuracy",)),
    Task(name="given", title="given rows", source="given", metrics=("accuracy",)),
)

FORMS: Final[Mapping[str, Task]] = MappingProxyType({task.name: task for task in _FORMS})


def get_task(task: str | Task) -> Task:
    """The ``Task`` of that command-line name. Raises UsageError listing the known names.

    ``hub:NAME`` is any data set of the hub, or a local folder laid out as one.
    """
    if isinstance(task, Task):
        return task
    if task.startswith(HUB):
        require(len(task) > len(HUB), "task", f"{HUB}NAME or {HUB}NAME/CONFIG", repr(task))
        return Task(name=task, title=task.removeprefix(HUB), source="hub", metrics=("accuracy",))
    known = {**TASKS, **FORMS}
    if task not in known:
        names = ", ".join(sorted([*known, f"{HUB}NAME"]))
        raise expected("task", f"one of {names}", repr(task))
    return known[task]
