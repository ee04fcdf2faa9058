"""A whole run: what it writes, what it reports, and what the figures must obey."""

from __future__ import annotations

import json

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.masks import Budget, Plan
from sensikernels.methods import METHODS
from sensikernels.training import finetune
from sensikernels.training.session import Progress

KEYS = """
task method seed versions budget.requested budget.flops_ratio_measured budget.params_ratio
flops_per_token.dense flops_per_token.planned flops_per_token.measured step_ms.dense
step_ms.planned step_speedup peak_mib.planned metric.name metric.value metric.dense_value
""".split()


def at(report, path):
    for name in path.split("."):
        report = report[name]
    return report


def test_report_files_and_model_of_a_compared_run(settings):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    asked = settings(compare_dense=True, epochs=2)
    seen: list[Progress] = []
    report = finetune(asked, seen.append)

    assert json.loads((asked.output / "report.json").read_text()) == json.loads(json.dumps(report))
    for key in KEYS:
        assert at(report, key) is not None, key
    assert [p.step for p in seen] == list(range(1, 13))
    assert len(report["losses"]["planned"]) == len(report["losses"]["dense"]) == 12
    names = {p.name for p in asked.output.iterdir()}
    assert names == {"model", "plan.json", "plan.safetensors", "report.json", "sensitivity.png"}
    assert (asked.output / "sensitivity.png").read_bytes().startswith(b"\x89PNG")

    plan = Plan.load(asked.output / "plan.json")
    assert plan.kept_counts() == report["kept"]
    assert report["budget"]["flops_ratio_measured"] == pytest.approx(plan.flops_ratio, rel=1e-9)
    assert report["budget"]["flops_ratio_measured"] <= 0.6
    assert report["flops_per_token"]["measured"] == pytest.approx(
        report["flops_per_token"]["planned"], rel=2e-3
    )
    assert report["peak_mib"]["planned"] < report["peak_mib"]["dense"]
    assert report["saved_model"]["bit_equal"]
    assert report["saved_model"]["max_difference_to_trained"] < 1e-5
    assert report["saved_model"]["accuracy"] == report["metric"]["value"]

    model = AutoModelForSequenceClassification.from_pretrained(asked.output / "model")
    tokenizer = AutoTokenizer.from_pretrained(asked.output / "model")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    batch = tokenizer(["the plot was gripping ."], return_tensors="pt")
    assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(name, "fp32") for name in sorted(METHODS)]
    + [(name, "bf16") for name in ("dense", "dps", "lora", "sensi-bert", "smt")],
)
def test_losses_do_not_depend_on_the_baseline_beside(settings, tmp_path, method, dtype):
    common = {"method": method, "dtype": dtype, "max_train_samples": 64}
    alone = finetune(settings(**common, output=tmp_path / "alone"))
    beside = finetune(settings(**common, output=tmp_path / "beside", compare_dense=True))
    assert alone["losses"]["planned"] == beside["losses"]["planned"]
    assert alone["step_speedup"] is None
    assert alone["metric"]["dense_value"] is None
    assert beside["step_speedup"] > 0


def test_dense_method_and_baseline_agree(settings):
    report = finetune(
        settings(
            method="dense", compare_dense=True, embeddings="dense", dropout="torch", packed=False
        )
    )
    ours, theirs = (torch.tensor(report["losses"][k]) for k in ("planned", "dense"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert report["budget"]["flops_ratio_measured"] == 1.0


@pytest.mark.parametrize("embeddings", ["sparse", "frozen", "dense"])
def test_word_embeddings_move_as_asked(settings, tiny, embeddings):
    from transformers import AutoModelForSequenceClassification

    asked = settings(method="dense", embeddings=embeddings, weight_decay=0.0)
    finetune(asked)
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(p).get_input_embeddings().weight
        for p in (tiny, asked.output / "model")
    )
    moved = (before != after).any(1)
    assert moved.any() == (embeddings != "frozen")
    assert not moved.all()  # words that never occur stay, whatever the optimizer


def test_bitfit_moves_biases_and_the_classifier_only(settings, tiny):
    from transformers import AutoModelForSequenceClassification

    asked = settings(method="bitfit")
    report = finetune(asked)
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(p).state_dict()
        for p in (tiny, asked.output / "model")
    )
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved
    assert all("bias" in n or n.startswith("classifier") for n in moved)
    assert 0.6 < report["budget"]["flops_ratio_measured"] < 0.75


@pytest.mark.parametrize(
    "budget",
    [
        Budget(params=0.7),
        Budget(units={"heads": 4, "neurons": 160}),
        Budget(flops=0.7, scope="per_layer"),
    ],
    ids=["params", "units", "per_layer"],
)
def test_other_budgets(settings, budget):
    report = finetune(settings(budget=budget))
    assert report["budget"]["requested"] == budget.requested
    if budget.params:
        assert report["budget"]["params_ratio"] <= 0.7
    if budget.units:
        assert sum(v for k, v in report["kept"].items() if k.endswith("heads")) == 4
        assert sum(v for k, v in report["kept"].items() if k.endswith("neurons")) == 160


def test_a_finished_run_is_not_run_again(settings):
    first = finetune(settings())
    again = finetune(settings(resume=True), watch=pytest.fail)
    assert again == json.loads(json.dumps(first))


@pytest.mark.parametrize(("epochs", "steps"), [(1.5, [6, 9]), (0.4, [3]), (2.0, [6, 12])])
def test_the_last_epoch_may_be_a_part_of_one(settings, epochs, steps):
    report = finetune(settings(epochs=epochs))
    assert report["evaluated_at"] == steps
    assert report["steps"]["total"] == len(report["losses"]["planned"]) == steps[-1]
    assert report["saved_model"]["bit_equal"]


def test_an_infeasible_budget_names_the_smallest_and_leaves_nothing(settings):
    asked = settings(budget=Budget(flops=0.01))
    with pytest.raises(UsageError, match=r"at least 0\.\d+ \(the smallest feasible"):
        finetune(asked)
    assert not asked.output.exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_keeps_its_prefix_and_trains_as_without(settings, tmp_path, monkeypatch, dtype):
    common = {
        "method": "freeze",
        "options": {"share": 0.5, "cache": True},
        "epochs": 3,
        "dtype": dtype,
    }
    kept = finetune(settings(**common))
    assert kept["events"][0] == "step 0: embeddings and 1 layers frozen, their output kept"
    assert kept["budget"]["flops_ratio_measured"] < 1
    monkeypatch.setattr("sensikernels.methods.freeze.cache_frozen_prefix", lambda model: None)
    plain = finetune(settings(**common, output=tmp_path / "plain"))
    close = 1e-5 if dtype == "fp32" else 2e-2
    assert kept["losses"]["planned"] == pytest.approx(plain["losses"]["planned"], rel=close)
    ratio = "flops_ratio_measured"
    assert kept["budget"][ratio] == plain["budget"][ratio]
