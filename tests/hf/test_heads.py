"""Every head of a BERT is ranked, trimmed, packed, compacted and read back as stock computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import apply, compact, export, restore, sensitivity
from sensikernels.masks import Budget, Plan, plan
from tests.hf.conftest import make_model
from tests.hf.packed_cases import SMALL

transformers = pytest.importorskip("transformers")

ROWS, LENGTH, CHOICES = 4, 9, 3
AUTO = {
    "BertModel": "AutoModel",
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
    "BertForTokenClassification": "AutoModelForTokenClassification",
    "BertForQuestionAnswering": "AutoModelForQuestionAnswering",
    "BertForMultipleChoice": "AutoModelForMultipleChoice",
    "BertForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "BertForPreTraining": "AutoModelForPreTraining",
}
HEADS = sorted(AUTO)


def make(head: str, **named: Any) -> nn.Module:
    config = make_model(**named).config
    torch.manual_seed(1)
    model: nn.Module = getattr(transformers, head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def draw(head: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    shape = (ROWS, CHOICES, LENGTH) if head == "BertForMultipleChoice" else (ROWS, LENGTH)
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, ..., 5:] = 0
    batch = {"input_ids": ids(97, *shape), "attention_mask": mask}
    labels = {
        "BertModel": {},
        "BertForSequenceClassification": {"labels": ids(3, ROWS) - 1},
        "BertForTokenClassification": {"labels": ids(3, ROWS, LENGTH) - 1},
        "BertForQuestionAnswering": {
            "start_positions": ids(4, ROWS),
            "end_positions": ids(4, ROWS),
        },
        "BertForMultipleChoice": {"labels": ids(CHOICES + 1, ROWS) - 1},
        "BertForNextSentencePrediction": {"labels": ids(3, ROWS) - 1},
        "BertForMaskedLM": {"labels": ids(97, ROWS, LENGTH)},
        "BertForPreTraining": {
            "labels": ids(97, ROWS, LENGTH),
            "next_sentence_label": ids(3, ROWS) - 1,
        },
    }
    batch |= labels[head]
    if batch.get("labels", mask[..., 0]).ndim == 2:  # stock counts the labels of padding, too
        batch["labels"] = torch.where(mask.bool(), batch["labels"], -100)
    return batch


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in model(**batch).items() if isinstance(v, Tensor)}


def trim(model: nn.Module, head: str) -> Plan:
    batches, criterion = [draw(head)], "mask-gradient"
    if head == "BertModel":
        batches, criterion = [], "magnitude"
    scores = sensitivity(model, batches, criterion)
    return plan(scores, Budget(flops=0.7), multiples=SMALL, minimums=SMALL)


def compare(got: dict[str, Tensor], wanted: dict[str, Tensor], mask: Tensor) -> None:
    """Equal where tokens are; packed hidden states are zero at padding, stock's are not."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.ndim >= 3 or (value.ndim == 2 and value.shape == mask.shape):
            torch.testing.assert_close(got[name][mask.bool()], value[mask.bool()])
        else:
            torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("head", HEADS)
def test_ranked_trimmed_compacted_and_read_back(head: str, tmp_path: Path) -> None:
    model, batch = make(head).eval(), draw(head)
    before = outputs(model, batch)
    made = trim(model, head)
    apply(model, made, form="masked")
    masked = outputs(model, batch)
    restore(model)
    apply(model, made)
    trimmed = outputs(model, batch)
    small = compact(model)
    small.save_pretrained(tmp_path / "compact")
    back = getattr(transformers, AUTO[head]).from_pretrained(tmp_path / "compact").eval()
    assert type(back) is type(small)
    stock = export(model, tmp_path / "stock")
    assert type(stock).__name__ == head
    plain = getattr(transformers, head).from_pretrained(tmp_path / "stock").eval()
    for name, value in masked.items():
        torch.testing.assert_close(trimmed[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(outputs(small, batch)[name], outputs(back, batch)[name])
        torch.testing.assert_close(outputs(small, batch)[name], trimmed[name])
        assert torch.equal(outputs(stock, batch)[name], value), name
        assert torch.equal(outputs(plain, batch)[name], value), name
    restore(model)
    assert all(torch.equal(v, before[k]) for k, v in outputs(model, batch).items())


@pytest.mark.parametrize("head", HEADS)
def test_the_fast_step_is_stocks(head: str) -> None:
    batch = draw(head)
    if head == "BertForQuestionAnswering":
        batch["attention_mask"][:] = 1  # its loss reads padding's hidden states
    stock, fast = make(head), make(head)
    wanted = stock(**batch)
    apply(fast, features=("dropout", "packed", "cls", "fused"))
    got = fast(**batch)
    mask = batch["attention_mask"]
    compare(
        {k: v for k, v in got.items() if isinstance(v, Tensor)},
        {k: v for k, v in wanted.items() if isinstance(v, Tensor)},
        mask,
    )
    if head == "BertModel":
        return
    wanted.loss.backward()
    got.loss.backward()
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None and "loss" not in name:
            torch.testing.assert_close(
                fast.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name
            )


@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM"])
def test_a_bert_without_pooler(head: str, tmp_path: Path) -> None:
    config = make_model().config
    if head == "BertModel":
        model = transformers.BertModel(config, add_pooling_layer=False).eval()
    else:
        model = transformers.BertForMaskedLM(config).eval()
    batch = {k: v for k, v in draw(head).items() if k != "labels"}
    made = plan(
        sensitivity(model, [], "magnitude"), Budget(flops=0.7), multiples=SMALL, minimums=SMALL
    )
    apply(model, made, features=("packed", "fused"))
    wanted = outputs(model, batch)
    small = compact(model)
    restore(model)
    mask = batch["attention_mask"].bool()
    for name, value in outputs(small, batch).items():
        torch.testing.assert_close(value[mask], wanted[name][mask])


@pytest.mark.parametrize("criterion", ["mask-gradient", "learned", "first-order"])
def test_batches_without_a_loss_are_refused(criterion: str) -> None:
    model = make("BertForSequenceClassification")
    batch = draw("BertForSequenceClassification")
    bare = {k: v for k, v in batch.items() if k != "labels"}
    with pytest.raises(UsageError, match="batches: expected a loss in the model's output"):
        sensitivity(model, [bare], criterion)
    with pytest.raises(UsageError, match="batches: expected a loss"):
        sensitivity(make("BertModel"), [bare], criterion)
    scores = sensitivity(
        model, [bare], criterion, compute_loss=lambda m, b: m(**b).logits.square().sum()
    )
    assert scores.rows == ROWS


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.ones(0, 5, dtype=torch.long), r"not empty, in each, got \[0, 5\]"),
        (torch.ones(3, 0, dtype=torch.long), r"not empty, in each, got \[3, 0\]"),
        (torch.ones(5, dtype=torch.long), r"not empty, in each, got \[5\]"),
        (None, "got NoneType"),
    ],
)
def test_empty_batches_are_refused(ids: Tensor | None, said: str) -> None:
    model = make("BertForSequenceClassification")
    with pytest.raises(UsageError, match=said):
        sensitivity(model, [{"input_ids": ids, "labels": torch.zeros(3, dtype=torch.long)}])


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = make("BertForSequenceClassification")
    with torch.no_grad():
        model.get_parameter("classifier.weight").fill_(float("nan"))
    with pytest.raises(UsageError, match="batches: expected one finite loss, got"):
        sensitivity(model, [draw("BertForSequenceClassification")])


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("length", [0, 4])
def test_no_tokens_are_one_clear_error(rows: int, length: int) -> None:
    if rows and length:
        return
    model = make("BertForSequenceClassification").eval()
    apply(model, features=("packed", "fused"))
    with pytest.raises(UsageError, match="input_ids: expected at least one token"):
        model(input_ids=torch.ones(rows, length, dtype=torch.long))
    bare = make("BertForMaskedLM").eval()
    apply(bare, features=("packed", "fused"))
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(UsageError, match="input_ids: expected at least one token"):
        bare(input_ids=ids, attention_mask=torch.zeros_like(ids))
