"""Made-up rows in the layout of each of GLUE's original files."""

from __future__ import annotations

from pathlib import Path

from sensikernels.data.tasks import Split, Task

HEADERS = {
    "sst2": "sentence label",
    "mrpc": "Quality|#1 ID|#2 ID|#1 String|#2 String",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "qnli": "index question sentence label",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
    "sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label",
    "rte": "index sentence1 sentence2 label",
    "cola": "source label mark sentence",
    "wnli": "index sentence1 sentence2 label",
}
HEADERS["mnli-mm"] = HEADERS["mnli"]
GLUE = sorted(HEADERS)


def columns(task: Task) -> list[str]:
    header = HEADERS[task.name]
    return header.split("|" if "|" in header else " ")


def line(task: Task, label: str, *texts: str) -> str:
    """One line in GLUE's layout, with ``-`` in the columns that nobody reads."""
    cells = dict.fromkeys(columns(task), "-") | {task.label: label}
    return "\t".join((cells | dict(zip(task.texts, texts, strict=True))).values())


def lines(task: Task) -> list[str]:
    """The header, if the task has one, and a row for each label (three scores for STS-B)."""
    labels = task.values or ("0.0", "2.75", "5.000")
    texts = [
        [f'a "quoted {i} sentence ', f"its {i} twin's end"][: len(task.texts)]
        for i in range(len(labels))
    ]
    header = [] if task.columns else ["\t".join(columns(task))]
    return header + [line(task, label, *pair) for label, pair in zip(labels, texts, strict=True)]


def write(
    root: Path, task: Task, split: Split, text: list[str], *, name: str | None = None
) -> Path:
    path = root / str(task.folder) / (name or task.files(split)[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(row + "\n" for row in text).encode())
    return path
