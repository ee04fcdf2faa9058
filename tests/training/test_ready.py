"""The needs of a run's end are checked before its first step; nothing is left behind then."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensikernels._core.errors import DataError, SensiError, UsageError
from sensikernels.masks import Budget, Plan
from sensikernels.training import finetune, rank
from sensikernels.training.session import Session
from tests.training.tiny import save_tiny

LONG = " ".join(["film"] * 90)


@pytest.fixture
def refused(settings, tmp_path, monkeypatch):
    """``refused(error, said, **settings)``: the run raises so, and no step of it is done."""
    monkeypatch.setattr(Session, "_step", lambda *_: pytest.fail("a step was done"))

    def check(error, said, **given):
        asked = settings(**given)
        with pytest.raises(error, match=said) as caught:
            finetune(asked)
        assert "\n" not in str(caught.value)
        assert not asked.output.exists()

    return check


def write_rows(folder, train, dev):
    target = folder / "SST-2"
    target.mkdir(parents=True)
    for name, rows in (("train", train), ("dev", dev)):
        lines = [f"{text}\t{i % 2}" for i, text in enumerate(rows)]
        (target / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return {"task": "sst2", "data_dir": folder}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("where", ["train", "dev"])
def test_rows_longer_than_the_models_positions(refused, tmp_path, packed, where):
    rows = {"train": ["a film"] * 32, "dev": ["a film"] * 4}
    rows[where][1] = LONG
    given = write_rows(tmp_path / "glue", **rows)
    refused(
        UsageError,
        "max_length: expected at most 64, the model's positions, got 128",
        packed=packed,
        **given,
    )


def test_padding_beyond_the_models_positions(refused, tmp_path):
    given = write_rows(tmp_path / "glue", ["a film"] * 32, [LONG] * 2)
    refused(
        UsageError,
        "pad_to_multiple: expected one that pads 60 tokens to at most 64",
        max_length=60,
        pad_to_multiple=50,
        **given,
    )


def altered(tiny, folder, **config):
    path = shutil.copytree(tiny, folder / "altered")
    body = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**body, **config}))
    return path


def test_a_tokenizer_of_more_words_than_the_model(refused, tiny, tmp_path):
    path = altered(tiny, tmp_path, vocab_size=20)
    tensors = load_file(path / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    tensors[name] = tensors[name][:20].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    refused(DataError, "expected a tokenizer of at most 20 tokens", model=str(path))


def test_a_head_with_the_labels_in_another_order(refused, settings, tiny, tmp_path):
    names = {
        "id2label": {"0": "Positive", "1": "negative"},
        "label2id": {"Positive": 0, "negative": 1},
    }
    path = altered(tiny, tmp_path, **names)
    refused(DataError, "labels: expected negative, positive in the task's order", model=str(path))


def test_a_head_of_other_labels_is_a_new_one(settings, tiny, tmp_path):
    path = save_tiny(tmp_path / "three")
    body = json.loads((path / "config.json").read_text())
    three = {str(i): name for i, name in enumerate("abc")}
    (path / "config.json").write_text(json.dumps({**body, "id2label": three}))
    tensors = load_file(path / "model.safetensors")
    tensors |= {"classifier.weight": torch.ones(3, 32), "classifier.bias": torch.ones(3)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert finetune(settings(model=str(path), method="bitfit"))["failed"] == []


@pytest.mark.parametrize("packed", [True, False])
def test_a_model_that_cannot_be_compacted(refused, tiny, tmp_path, packed):
    from transformers import AlbertConfig, AlbertForSequenceClassification

    path = tmp_path / "albert"
    words = json.loads((tiny / "config.json").read_text())["vocab_size"]
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 66,
        "embedding_size": 16,
    }
    AlbertForSequenceClassification(AlbertConfig(vocab_size=words, **shape)).save_pretrained(path)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, path)
    refused(
        UsageError,
        "model: expected",
        model=str(path),
        packed=packed,
        dropout="counter" if packed else "torch",
    )


def test_a_plan_of_another_model_names_its_file(refused, settings, tmp_path):
    other = save_tiny(tmp_path / "other", layers=3)
    _, plan, _ = rank(settings(model=str(other)))
    plan.save(tmp_path / "plan.json")
    refused(
        UsageError,
        r"plan .*plan\.json: plan: expected a model with a module bert",
        plan=tmp_path / "plan.json",
        budget=None,
    )
    assert Plan.load(tmp_path / "plan.json").kept_counts()


def test_a_library_that_the_end_needs(refused, monkeypatch):
    import sensikernels.training.end as end

    def without(name):
        return None if name == "matplotlib" else find_spec(name)

    monkeypatch.setattr(end, "find_spec", without)
    refused(UsageError, r"sensitivity\.png: expected matplotlib installed")
    monkeypatch.undo()

    def missing(*_):
        raise UsageError("metrics: expected sklearn.metrics installed, got none")

    monkeypatch.setattr(end, "compute", missing)
    refused(UsageError, "metrics: expected sklearn", method="dense")


def test_a_disk_without_room(refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 300_000, 300_000))
    refused(SensiError, r"cannot be written: No space: .* take about \d\.\d MiB, 0\.3 MiB are free")


def test_a_tokenizer_that_cannot_be_saved(refused, monkeypatch):
    def broken(*_, **__):
        raise AttributeError("no state\nsecond line")

    name = "transformers.tokenization_utils_base.PreTrainedTokenizerBase.save_pretrained"
    monkeypatch.setattr(name, broken)
    refused(DataError, "config or tokenizer cannot be saved: no state second line")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"criterion": "luck"}, "criterion"),
        ({"statistic": "mode"}, "statistic"),
        ({"granularity": "layers"}, "granularity"),
        ({"multiples": {"neurons": 0}}, "neurons"),
        ({"multiples": {"neurons": 1 << 40}}, "neurons"),
        ({"warmup": float("nan")}, "warmup"),
    ],
)
def test_options_that_only_ranking_would_read(refused, options, said):
    refused(UsageError, said, options={"warmup": 0.5, **options})


def test_ranking_an_untrained_head_is_said(settings):
    (said, *_) = finetune(settings(options={"warmup": 0.1}))["events"]
    assert said == (
        "step 0: warmup 0.1 of 6 steps is none: the new head is ranked untrained "
        "(warmup=0.167 trains it for a step)"
    )
    events = finetune(settings(options={"warmup": 0.167}, output=settings().output / "b"))["events"]
    assert [e[:7] for e in events] == ["step 1:"]


BAD = {
    "epochs": (0, -1.5, 10**9, float("nan"), float("inf"), True, None),
    "batch_size": (0, -1, 10**12, "8"),
    "seed": (-1, 2**64, 0.5),
    "max_length": (0, 7, 10**9),
    "ranking_rows": (0, 10**12),
    "max_train_samples": (0, -5, 10**12, 1.5),
    "max_eval_samples": (0, -5, 10**12, 1.5),
    "pad_to_multiple": (0, 10**9),
    "checkpoint_every": (-1, 10**12, None),
    "lr": (-1.0, float("nan"), float("inf"), 1e308),
    "dense_lr": (-1.0, float("nan")),
    "weight_decay": (-1.0, float("inf"), 1e300),
    "max_grad_norm": (-1.0, float("nan"), float("inf")),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs], ids=str)
def test_numbers_that_no_run_can_have(settings, name, value):
    with pytest.raises(UsageError, match=f"^{name}: expected"):
        settings(**{name: value})


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan"), float("inf"), 1e308, True, "0.5"])
@pytest.mark.parametrize("measure", ["flops", "params", "step_time"])
def test_shares_that_no_budget_can_have(measure, share):
    with pytest.raises(UsageError, match=f"budget {measure}: expected a share"):
        Budget(**{measure: share})
