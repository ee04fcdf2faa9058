"""A run on every kind of task and every source of rows: trained, trimmed, saved, predicted."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.cli import main
from sensikernels.data.conll import read_words
from sensikernels.masks import Budget
from sensikernels.training import Settings, finetune
from tests.data.corpora import letters_tokenizer, question, write_conll, write_squad
from tests.training.children import STEP, run
from tests.training.reports import assert_same_end

datasets = pytest.importorskip("datasets")
NAMES = ("ann", "bob")
PLACES = ("rome", "oslo")


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers that spells words by letters."""
    from transformers import BertConfig, BertModel

    path, tokenizer = tmp_path_factory.mktemp("speller") / "model", letters_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.1,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def make(speller: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a run of a few epochs, fast enough to learn what is made up here."""

    def settings(**given: Any) -> Settings:
        common: dict[str, Any] = {
            "model": str(speller),
            "output": tmp_path / "out",
            "method": "sensi-bert",
            "budget": Budget(flops=0.7),
            "batch_size": 16,
            "epochs": 6,
            "lr": 3e-3,
            "ranking_rows": 32,
            "device": "cpu",
        }
        return Settings(**common | given)

    return settings


@pytest.fixture
def ner(tmp_path: Path) -> Path:
    """Names of people and places among words that are neither; some sentences have none."""
    draw = random.Random(0)

    def sentence() -> list[tuple[str, str]]:
        words = [(draw.choice(["the", "film", "was", "good", "zzz"]), "O") for _ in range(3)]
        if draw.random() < 0.7:
            words.insert(draw.randrange(4), (draw.choice(NAMES), "B-PER"))
        if draw.random() < 0.7:
            words += [(draw.choice(PLACES), "B-LOC"), ("film", "I-LOC")]
        return words

    for name, count in (("train", 96), ("dev", 24)):
        write_conll(tmp_path / "ner" / f"{name}.conll", [sentence() for _ in range(count)])
    return tmp_path / "ner"


@pytest.fixture
def squad(tmp_path: Path) -> Callable[[bool], Path]:
    """Who saw the film: the name after "was"; with ``nulls`` a third of contexts do not say."""

    def write(nulls: bool) -> Path:
        draw = random.Random(0)

        def one(name: str) -> tuple[str, list[dict[str, Any]]]:
            who = draw.choice(NAMES)
            before, after = ("the film " * draw.randrange(1, 9) for _ in range(2))
            if nulls and draw.random() < 1 / 3:
                return f"{before}{after}", [question(name, "what was", f"{before}{after}")]
            context = f"{before}was {who} good {after}"
            return context, [question(name, "what was", context, who)]

        for split, count in (("train", 128), ("dev", 24)):
            parts = [one(f"{split}{i}") for i in range(count)]
            write_squad(tmp_path / "squad" / f"{split}.json", *parts)
        return tmp_path / "squad"

    return write


def test_words_are_learned_trimmed_and_written_as_they_were_scored(make, ner, tmp_path):
    from seqeval.metrics import f1_score
    from transformers import AutoModelForTokenClassification

    written = tmp_path / "tags.conll"
    report = finetune(make(task="ner", data_dir=ner, predict=written, compare_dense=True))
    assert report["failed"] == []
    assert report["saved_model"]["bit_equal"]
    assert report["metric"]["name"] == "f1"
    assert report["metric"]["value"] > 0.8 < report["metric"]["dense_value"]
    assert report["labels"]["kind"] == "tokens"
    assert report["labels"]["names"] == ["O", "B-LOC", "B-PER", "I-LOC"]
    gold, made = read_words(ner / "dev.conll"), read_words(written)
    assert made.words == gold.words
    assert f1_score(gold.tags, made.tags) == pytest.approx(report["metric"]["value"], abs=1e-9)
    planned = report["budget"]["flops_ratio_planned"]
    assert report["budget"]["flops_ratio_measured"] == pytest.approx(planned, rel=0.03)
    model = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "out" / "model", trust_remote_code=True
    )
    assert model.config.id2label[2] == "B-PER"


@pytest.mark.parametrize("nulls", [False, True])
def test_answers_are_learned_trimmed_and_written_as_they_were_scored(make, squad, tmp_path, nulls):
    folder, written = squad(nulls), tmp_path / "answers.json"
    report = finetune(
        make(
            task="squad",
            data_dir=folder,
            predict=written,
            compare_dense=True,
            max_length=32,
            doc_stride=8,
        )
    )
    assert report["failed"] == []
    assert report["saved_model"]["bit_equal"]
    assert report["metric"]["name"] == "f1"
    assert report["metric"]["value"] > 0.8 < report["metric"]["dense_value"]
    answers = json.loads(written.read_text())
    gold = {
        item["id"]: [answer["text"] for answer in item["answers"]] or [""]
        for paragraph in json.loads((folder / "dev.json").read_text())["data"][0]["paragraphs"]
        for item in paragraph["qas"]
    }
    assert answers.keys() == gold.keys()
    exact = sum(answers[name] in texts for name, texts in gold.items()) / len(gold)
    assert exact == pytest.approx(report["metrics"]["planned"][-1]["exact_match"], abs=1e-6)
    planned = report["budget"]["flops_ratio_planned"]
    assert report["budget"]["flops_ratio_measured"] == pytest.approx(planned, rel=0.03)


@pytest.mark.parametrize("task", ["ner", "squad"])
def test_a_killed_run_of_any_kind_resumes_to_the_same_end(make, ner, squad, tmp_path, task):
    given = {"task": task, "data_dir": ner if task == "ner" else squad(True), "epochs": 2}
    given |= {
        "checkpoint_every": 3,
        "predict": tmp_path / f"made{'.conll' if task == 'ner' else '.json'}",
    }
    whole = tmp_path / "whole"
    finetune(make(**given, output=whole))
    wanted = given["predict"].read_bytes()
    given["predict"].unlink()
    assert run(make(**given), (STEP, 8)) == -signal.SIGKILL
    finetune(make(**given, resume=True))
    assert_same_end(tmp_path / "out", whole)
    assert given["predict"].read_bytes() == wanted


def rows(count: int, label: Callable[[int], Any]) -> Any:
    """Texts of one of three words; ``label`` of the word's number."""
    words = [i % 3 for i in range(count)]
    texts = [f"the {('film', 'plot', 'zzz')[w]} was good" for w in words]
    return datasets.Dataset.from_dict({"text": texts, "label": [label(w) for w in words]})


SHAPES = {
    "classes": (lambda w: "abc"[w], "accuracy", "single_label_classification"),
    "scores": (lambda w: w - 0.5, "pearson", "regression"),
    "several": (
        lambda w: ["x"] * (w > 0) + ["y"] * (w > 1),
        "micro_f1",
        "multi_label_classification",
    ),
}
WRITE = {
    "classes": ("csv", lambda t, p: t.to_csv(p, index=False)),
    "scores": ("jsonl", lambda t, p: t.to_json(p)),
    "several": ("parquet", lambda t, p: t.to_parquet(p)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_files_of_classes_scores_and_several_labels(make, tmp_path, shape):
    label, metric, problem = SHAPES[shape]
    suffix, write = WRITE[shape]
    for name, count in (("train", 192), ("dev", 21)):
        write(rows(count, label), tmp_path / f"{name}.{suffix}")
    written = tmp_path / "made.jsonl"
    files = {f"{name}_file": tmp_path / f"{name}.{suffix}" for name in ("train", "dev")}
    report = finetune(make(task="file", **files, predict=written, compare_dense=True))
    assert report["failed"] == []
    assert report["saved_model"]["bit_equal"]
    assert report["metric"]["name"] == metric
    assert report["metric"]["value"] > 0.8 < report["metric"]["dense_value"]
    assert report["labels"]["problem"] == problem
    assert [e for e in report["events"] if e.startswith("labels: ")] == report["labels"]["inferred"]
    made = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["row"] for row in made] == list(range(21))
    wanted = [label(i % 3) for i in range(21)]
    assert [row["label"] for row in made] == wanted
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config.get("problem_type", problem) == problem


def test_a_folder_of_the_hub_and_given_rows_train_alike(make, tmp_path):
    train, dev = rows(48, lambda w: w % 2), rows(12, lambda w: w % 2)
    folder = tmp_path / "mine"
    for name, split in (("train", train), ("validation", dev)):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    hub = finetune(make(task=f"hub:{folder}", epochs=2))
    given = finetune(
        make(task="given", epochs=2, output=tmp_path / "given"),
        data={"train": train, "validation": dev},
    )
    assert hub["losses"] == given["losses"]
    assert hub["metric"]["value"] == given["metric"]["value"]
    assert "splits: train trains, validation is dev" in hub["labels"]["inferred"]


def test_data_are_for_given_rows_alone(make):
    with pytest.raises(UsageError, match="data: expected none for task demo"):
        finetune(make(task="demo"), data={"train": rows(3, str), "dev": rows(3, str)})
    with pytest.raises(UsageError, match="in Python for given, got no data"):
        finetune(make(task="given"))


def test_the_command_takes_every_kind(speller, ner, squad, tmp_path, capsys):
    write = WRITE["classes"][1]
    for name in ("train", "dev"):
        write(rows(32, SHAPES["classes"][0]), tmp_path / f"{name}.csv")
    files = f"--train-file {tmp_path / 'train.csv'} --dev-file {tmp_path / 'dev.csv'}"
    asked = {
        "ner": f"--data-dir {ner} --predict {tmp_path / 'a.conll'}",
        "squad": f"--data-dir {squad(False)} --doc-stride 8 --max-length 32",
        "file": f"{files} --text-column text --label-column label --predict {tmp_path / 'a.tsv'}",
    }
    for task, given in asked.items():
        output = tmp_path / f"of-{task}"
        line = f"finetune --task {task} {given} --model {speller} --flops 0.7 --output {output}"
        assert main([*line.split(), "--device", "cpu"]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        assert json.loads((output / "report.json").read_text())["task"] == task
        assert "bit-equal" in out
        line = f"plan --task {task} {given} --model {speller} --flops 0.7 --device cpu"
        line = line.partition(" --predict")[0] + f" --model {speller} --flops 0.7 --device cpu"
        assert main(line.split()) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task": "ner"}, "data_dir: expected the folder that holds train.conll and dev.conll"),
        ({"task": "file"}, "train_file: expected a file for task file, got none"),
        ({"task": "demo", "train_file": Path("a.csv")}, "train_file: expected none for task demo"),
        ({"task": "demo", "text_column": "a"}, "text_column: expected none for task demo"),
        ({"task": "demo", "doc_stride": 8}, "doc_stride: expected none for task demo"),
        ({"task": "demo", "data_dir": Path("a")}, "data_dir: expected none, as demo is generated"),
        (
            {"task": "file", "train_file": Path("a.xls"), "dev_file": Path("b.csv")},
            "train_file: expected a file that ends in .csv",
        ),
        ({"task": "demo", "predict": Path("a.json")}, "predict: expected a file that ends in .tsv"),
        ({"task": "hub:"}, "task: expected hub:NAME"),
    ],
)
def test_places_that_a_task_has_no_use_for(make, given, said):
    with pytest.raises(UsageError, match=said):
        make(**given)
