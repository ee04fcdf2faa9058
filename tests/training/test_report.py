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
        budget=Budget(flops=0.6) if METHODS[method].needs_budget else None,
    )
    report = finetune(asked)
    assert report == json.loads((asked.output / "report.json").read_text())
    saved = load_file(asked.output / "model" / "model.safetensors")
    return asked, report, load_file(f"{asked.model}/model.safetensors"), saved


def outside_embeddings(tensors):
    return sum(t.numel() for name, t in tensors.items() if "embeddings." not in name)


def names_of(tensors):
    return [name for name in tensors if not name.endswith("position_ids")]


def plan_of(asked):
    path = asked.output / "plan.json"
    return Plan.load(path) if path.exists() else None


def trained_last(asked, names):
    """The share of every parameter's gradient that the plan's last word has computed.

    Single entries of a matrix take its whole gradient; bands and blocks theirs.
    """
    plan = plan_of(asked)
    if plan is None or plan.trainable is None:
        return dict.fromkeys(names, 1.0)
    shares = dict.fromkeys(plan.trainable, 1.0)
    for module, mask in plan.update_masks.items():
        name = f"{module}.weight".replace(".base_layer", "")
        shares[name] = 1.0 if mask.block_shape == (1, 1) else mask.density
    return shares


STILL = {
    "bitfit": lambda name: not (name.endswith("bias") or name.startswith("classifier")),
    "freeze": lambda name: "embeddings." in name or "layer.0." in name,
    "lora": lambda name: not ("classifier" in name or "pooler" in name or _adapted(name)),
    "s2ft": lambda name: "embeddings." in name or "LayerNorm" in name or "query" in name,
    "grow": lambda name: "_embeddings." in name or "pooler.dense.weight" in name,
}
"""By method, the parameters that its own paper leaves alone from the first step to the last."""


def _adapted(name):
    return name.endswith(("query.weight", "value.weight"))


def test_parameters(case):
    asked, report, before, after = case
    counted = report["params"]
    assert counted["dense"] == outside_embeddings(before)
    assert counted["planned"] == outside_embeddings(after)
    assert counted["total"] == sum(t.numel() for t in after.values())
    if asked.method not in ("lora", "dsee"):  # whose own parameters are merged by then
        assert counted["trainable"] == trainable_by_hand(asked, after)
    assert report["budget"]["params_ratio"] == counted["planned"] / counted["dense"]
    assert report["saved_model"]["parameters"] == counted["total"]


def trainable_by_hand(asked, after):
    """Entries that train in the last step, of the parameters as saved."""
    plan = plan_of(asked)
    masks = {} if plan is None or plan.trainable is None else plan.update_masks
    kept = {f"{module}.weight": mask.kept_entries for module, mask in masks.items()}
    shares = trained_last(asked, after)
    return sum(kept.get(name, after[name].numel()) for name in shares if name in after)


def test_what_is_said_to_be_frozen_did_not_move(case):
    asked, _, before, after = case
    still = STILL.get(asked.method, lambda name: False)
    for name, tensor in after.items():
        if still(name):
            assert torch.equal(tensor, before[name]), name
    moved = [
        n for n, t in after.items() if t.shape != before[n].shape or not torch.equal(t, before[n])
    ]
    assert moved


def kept_of(asked, report):
    """Heads and neurons of each layer, from the plan's own grids."""
    if asked.method == "fewer-layers":
        return [(HIDDEN, NEURONS)] * plan_of(asked).origin["layers"]
    if asked.method != "sensi-bert":
        assert report["kept"] == {}
        return [(HIDDEN, NEURONS)] * LAYERS
    counts = plan_of(asked).kept_counts()
    assert counts == report["kept"]
    return [(8 * counts[f"layer.{i}.heads"], counts[f"layer.{i}.neurons"]) for i in range(LAYERS)]


LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def flops_by_hand(widths, data, shares, *, joined=True, rank=0):
    """Training FLOPs of one padded-to-64 epoch, per token, for the packed step.

    Every product forward; the gradient of its input where something below it trains; that of its
    weight by ``shares``, by name. Query, key and value are one product, and so is their gradient,
    where they are ``joined``; of the last layer, on one token a row but for K and V, those two.
    ``rank``: of the adapters beside query and value.
    """
    total, reached = 0.0, any("embeddings." in name for name in shares)
    for layer, (across, neurons) in enumerate(widths):
        last = layer == len(widths) - 1
        once = data["rows"] if last else data["tokens"]
        rows = dict.fromkeys(LINEARS, once) | {"key": data["tokens"], "value": data["tokens"]}
        prefix = f"bert.encoder.layer.{layer}."
        own = {role: shares.get(f"{prefix}{path}.weight", 0.0) for role, path in LINEARS.items()}
        if joined:
            together = ("key", "value") if last else ("query", "key", "value")
            own |= dict.fromkeys(together, max(own[role] for role in together))
        sizes = {role: 2 * HIDDEN * across for role in ("query", "key", "value", "out")}
        sizes |= {"up": 2 * HIDDEN * neurons, "down": 2 * HIDDEN * neurons}
        projected = False
        for role, path in LINEARS.items():
            if role == "out":  # what attends lies between the projections and its output
                reached = reached or projected
                total += (
                    4 * across * (data["real"] if last else data["squares"]) * (1 + 2 * reached)
                )
            total += rows[role] * sizes[role] * (1 + reached + own[role])
            adapted = rank if role in ("query", "value") else 0
            total += rows[role] * 2 * adapted * (2 * HIDDEN * 2 + HIDDEN + HIDDEN * reached)
            mine = any(name.startswith(f"{prefix}{path}.") for name in shares) or adapted > 0
            if role in ("query", "key", "value"):
                projected = projected or mine
            else:
                norm = {"out": "attention.output.LayerNorm", "down": "output.LayerNorm"}.get(role)
                normed = norm and any(name.startswith(f"{prefix}{norm}.") for name in shares)
                reached = reached or mine or bool(normed)
    pooler, classifier = 2 * HIDDEN**2 * data["rows"], 2 * HIDDEN * LABELS * data["rows"]
    total += pooler * (1 + reached + shares.get("bert.pooler.dense.weight", 0.0))
    reached = reached or any("pooler." in name for name in shares)
    total += classifier * (1 + reached + shares.get("classifier.weight", 0.0))
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
    asked, report, before, _ = case
    data = shapes_of(asked)
    assert data["rows"] == 2 * 96
    flops = report["flops_per_token"]
    every = dict.fromkeys(before, 1.0)
    dense = flops_by_hand([(HIDDEN, NEURONS)] * LAYERS, data, every)
    swapped = plan_of(asked) is not None and bool(plan_of(asked).update_masks)
    ours = flops_by_hand(
        kept_of(asked, report),
        data,
        trained_last(asked, before),
        joined=not swapped,
        rank=OPTIONS[asked.method]["rank"] if asked.method in ("lora", "dsee") else 0,
    )
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
