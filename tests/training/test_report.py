"""Every figure of ``report.json``, for every method, against a count of its own."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from sensikernels.data import load
from sensikernels.masks import Budget, Plan
from sensikernels.methods import METHODS
from sensikernels.training import Settings, finetune
from tests.methods.small import OPTIONS

HIDDEN, NEURONS, LAYERS, LABELS = 32, 128, 2, 2


@pytest.fixture(scope="module", params=sorted(METHODS))
def case(request, tiny, tmp_path_factory):
    """Settings, report, and the tensors of the model before and after."""
    method = request.param
    asked = Settings(
        task="demo",
        model=str(tiny),
        output=tmp_path_factory.mktemp("run") / "out",
        method=method,
        options=OPTIONS.get(method, {}),
        epochs=2,
        compare_dense=True,
        max_train_samples=96,
        batch_size=16,
        ranking_rows=64,
        device="cpu",
        budget=Budget(flops=0.6) if method == "sensi-bert" else None,
    )
    report = finetune(asked)
    assert report == json.loads((asked.output / "report.json").read_text())
    saved = load_file(asked.output / "model" / "model.safetensors")
    return asked, report, load_file(f"{asked.model}/model.safetensors"), saved


def outside_embeddings(tensors):
    return sum(t.numel() for name, t in tensors.items() if "embeddings." not in name)


def may_train(method, name):
    """The parameters that the method's own paper lets move."""
    if method == "bitfit":
        return name.endswith("bias") or name.startswith("classifier")
    if method == "freeze":
        return "embeddings." not in name and "layer.0." not in name
    return True


def test_parameters(case):
    asked, report, before, after = case
    counted = report["params"]
    assert counted["dense"] == outside_embeddings(before)
    assert counted["planned"] == outside_embeddings(after)
    assert counted["total"] == sum(t.numel() for t in after.values())
    trains = [t.numel() for n, t in after.items() if may_train(asked.method, n)]
    assert counted["trainable"] == sum(trains)
    assert report["budget"]["params_ratio"] == counted["planned"] / counted["dense"]
    assert report["saved_model"]["parameters"] == counted["total"]


def test_what_is_said_to_be_frozen_did_not_move(case):
    asked, _, before, after = case
    for name, tensor in after.items():
        if not may_train(asked.method, name):
            assert torch.equal(tensor, before[name]), name


def kept_of(asked, report):
    """Heads and neurons of each layer, from the plan's own grids."""
    plan = asked.output / "plan.json"
    if asked.method != "sensi-bert":
        assert report["kept"] == {}
        return [(HIDDEN, NEURONS)] * LAYERS
    counts = Plan.load(plan).kept_counts()
    assert counts == report["kept"]
    return [(8 * counts[f"layer.{i}.heads"], counts[f"layer.{i}.neurons"]) for i in range(LAYERS)]


def flops_by_hand(widths, data, method):
    """Training FLOPs of one padded-to-64 epoch, per token, for the packed step.

    Products of the encoder forward and twice backward, of the last layer but K and V on one token
    a row; a frozen layer costs its forward, a bias-only one no gradient of its weight.
    """
    total = 0.0
    for layer, (across, neurons) in enumerate(widths):
        last = layer == LAYERS - 1
        once = data["rows"] if last else data["tokens"]
        pairs = data["real"] if last else data["squares"]
        every = 2 * HIDDEN * across * data["tokens"]
        parts = {
            "query": 2 * HIDDEN * across * once,
            "key": every,
            "value": every,
            "out": 2 * HIDDEN * across * once,
            "ffn": 4 * HIDDEN * neurons * once,
        }
        products = sum(parts.values())
        attention = 4 * across * pairs
        frozen = method == "freeze" and layer == 0
        if frozen:
            total += products + attention
        elif method == "bitfit":
            total += 2 * products + 3 * attention
        elif method == "freeze":
            below = parts["query"] + 2 * every  # their input's gradient goes nowhere
            total += 3 * products + 3 * attention - below
        else:
            total += 3 * products + 3 * attention
    heads = 2 * HIDDEN * (HIDDEN + LABELS) * data["rows"]
    pooler, classifier = 2 * HIDDEN**2 * data["rows"], 2 * HIDDEN * LABELS * data["rows"]
    total += (2 * pooler + 3 * classifier) if method == "bitfit" else 3 * heads
    return total / data["tokens"]


def shapes_of(asked):
    """Rows, tokens as packed, real tokens and their squares, of the two epochs."""
    from sensikernels.training.loop import prepare

    geometry = prepare(asked).data.geometry
    lengths = [(length, count * rows) for (rows, length), count in geometry.shapes.items()]
    return {
        "rows": sum(n for _, n in lengths),
        "tokens": sum(tokens * n for tokens, n in geometry.packed.items()),
        "real": sum(length * n for length, n in lengths),
        "squares": sum(length**2 * n for length, n in lengths),
    }


def test_flops(case):
    asked, report, _, _ = case
    data = shapes_of(asked)
    assert data["rows"] == 2 * 96
    flops = report["flops_per_token"]
    dense = flops_by_hand([(HIDDEN, NEURONS)] * LAYERS, data, "dense")
    ours = flops_by_hand(kept_of(asked, report), data, asked.method)
    assert flops["dense"] == pytest.approx(dense, rel=1e-6)
    assert flops["measured"] == pytest.approx(ours, rel=1e-6)
    assert flops["planned"] == pytest.approx(ours, rel=2e-3)
    ratio = report["budget"]["flops_ratio_measured"]
    assert ratio == flops["measured"] / flops["dense"]
    assert report["budget"]["flops_ratio_planned"] == pytest.approx(ratio, rel=2e-3)


def test_steps_tokens_and_seconds(case):
    asked, report, _, _ = case
    steps = 2 * math.ceil(96 / asked.batch_size)
    assert report["steps"]["total"] == steps
    assert all(len(losses) == steps for losses in report["losses"].values())
    assert report["data"]["train_rows"] == 96
    assert report["data"]["dev_rows"] == len(load("demo", split="dev"))
    seconds = report["seconds"]
    for name in ("planned", "dense"):
        own = seconds[name]
        parts = own["train"] + own["rank"] + own["evaluate"]
        assert own["to_finish"] == pytest.approx(parts)
        assert own["train"] * 1e3 >= report["step_ms"][name] * steps / 4
    both = seconds["planned"]["to_finish"] + seconds["dense"]["to_finish"]
    assert both <= seconds["wall"]
    assert seconds["setup"] <= seconds["wall"]
    speed = report["step_ms"]["dense"] / report["step_ms"]["planned"]
    assert report["step_speedup"] == speed
    assert report["failed"] == []


def test_the_metric_is_that_of_the_saved_model(case):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import sensikernels  # noqa: F401

    asked, report, _, _ = case
    rows = load("demo", split="dev")
    tokenizer = AutoTokenizer.from_pretrained(asked.output / "model")
    model = AutoModelForSequenceClassification.from_pretrained(asked.output / "model").eval()
    right = 0
    for text, label in zip(rows.texts_a, rows.labels, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits
        right += int(logits.argmax() == label)
    share = right / len(rows)
    assert report["metric"]["value"] == pytest.approx(share, abs=2 / len(rows))
    assert report["saved_model"][report["metric"]["name"]] == report["metric"]["value"]
    assert report["metrics"]["planned"][-1]["accuracy"] == report["metric"]["value"]
