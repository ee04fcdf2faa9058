"""BitFit trains what the paper's code trains; counts from methods' published tables."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from sensikernels._core.errors import UsageError
from sensikernels.hf import restore, training_flops
from sensikernels.hf.families.bert import BERT
from sensikernels.masks import Geometry
from sensikernels.methods import BitFit, Run
from sensikernels.methods.bitfit import SUBSETS, select
from tests.hf.conftest import make_batch, make_model

SHAPES = {
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "minilm": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
}


@pytest.mark.parametrize(
    ("shape", "subsets", "count"),
    [
        ("base", ["all"], 102_912),
        ("large", ["all"], 272_384),
        ("minilm", ["all"], 26_112),
        ("base", ["query", "intermediate"], 46_848),
        ("minilm", ["query", "intermediate"], 11_904),
        ("base", ["frozen"], 0),
    ],
)
def test_counts(shape: str, subsets: list[str], count: int) -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(**SHAPES[shape]))
    names = dict(model.named_parameters())
    trained = [n for n in select(names, subsets, BERT) if not n.startswith("classifier")]
    assert sum(names[n].numel() for n in trained) == count


@pytest.mark.parametrize(
    ("subset", "matches"),
    [
        ("output", 4),
        ("output_layernorm", 4),
        ("attention_layernorm", 2),
        ("query", 2),
        ("key", 2),
        ("value", 2),
        ("intermediate", 2),
    ],
)
def test_subsets_match_like_the_papers_code(subset: str, matches: int) -> None:
    names = [n for n, _ in make_model().named_parameters()]
    always = {"bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert len(set(select(names, [subset], BERT)) - always) == matches
    assert set(select(names, [subset], BERT)) >= always


def make_run(optimizer: object = None) -> Run:
    model = make_model()
    return Run(
        model=model,
        optimizer=optimizer or torch.optim.AdamW(model.parameters()),  # type: ignore[arg-type]
        max_steps=10,
        batches=lambda: [make_batch()],
        geometry=Geometry.uniform(9),
    )


def test_no_weight_moves_and_flops_are_as_planned() -> None:
    run = make_run()
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    BitFit().begin(run)
    assert run.plan is not None
    batch = make_batch()
    run.model(**batch).loss.backward()
    run.optimizer.step()
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    # A key's bias shifts all scores of a query alike: softmax leaves it no gradient.
    still = {n for n in run.plan.trainable or () if "key.bias" in n}
    assert moved - still == set(run.plan.trainable or ()) - still
    counted = training_flops(run.model, batch) / batch["input_ids"].numel()
    assert counted == pytest.approx(run.plan.flops_planned, rel=0.03)
    restore(run.model)
    assert all(p.requires_grad for p in run.model.parameters())


def test_unknown_subset() -> None:
    with pytest.raises(UsageError, match="subsets: expected one of all, "):
        BitFit(subsets=["weights"])
    assert set(SUBSETS) >= {"all", "query", "intermediate", "frozen"}
