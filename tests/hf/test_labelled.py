"""A language model's head on labelled tokens alone: HuggingFace's loss and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import packing_of, restore_packed, use_packed
from tests.hf.packed_cases import LENGTHS, draw, make, pack, run, same


def both(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A masked-language model packed, and another whose head sees labelled tokens alone."""
    model = make("language").to(dtype).train()
    twin = copy.deepcopy(model)
    use_packed(model, multiple=8)
    report = use_packed(twin, multiple=8, labelled_only=True)
    assert "language head on labelled tokens, in training" in report
    return model, twin


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_loss_and_gradients_are_those_of_all_tokens(lengths: list[int], form: str) -> None:
    stock, batch = make("language").double().train(), draw("language", lengths)
    out, wanted = run(stock, batch)
    _, twin = both(lengths)
    got, ours = run(twin, pack(batch) if form == "packed" else batch)
    assert abs(got.loss.item() - out.loss.item()) <= 1e-10
    same(ours, wanted)
    labelled = batch["labels"] != -100
    assert got.logits.shape == (int(labelled.sum()), out.logits.shape[-1])
    torch.testing.assert_close(got.logits, out.logits[labelled], rtol=0, atol=1e-10)


def test_shapes_repeat() -> None:
    _, twin = both([9, 9, 9])
    seen: list[int] = []
    decoder = twin.cls.predictions.decoder  # type: ignore[union-attr]
    decoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))  # type: ignore[operator, union-attr]
    for seed in range(4):
        twin(**draw("language", [9, 9, 9], seed=seed))
    assert {count % 8 for count in seen} == {0}


def test_evaluation_and_prediction_keep_huggingfaces_shapes() -> None:
    model, twin = both([7, 3])
    batch = draw("language", [7, 3])
    bare = {name: value for name, value in batch.items() if name != "labels"}
    torch.testing.assert_close(twin(**bare).logits, model(**bare).logits)
    model.eval()
    twin.eval()
    out, got = model(**batch), twin(**batch)
    torch.testing.assert_close(got.logits, out.logits)
    torch.testing.assert_close(got.loss, out.loss)
    assert got.logits.shape[:2] == (2, 7)


def test_no_token_is_labelled() -> None:
    _, twin = both([5, 4])
    batch = draw("language", [5, 4])
    out, found = run(twin, batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert out.loss.isnan()
    assert out.logits.shape[0] == 0
    assert not any(bool(g.any()) for g in found.values())


def test_tuples_copies_and_bfloat16() -> None:
    _, twin = both([6, 2], torch.bfloat16)
    batch = draw("language", [6, 2])
    loss, logits = twin(**batch, return_dict=False)
    assert (loss.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    again = copy.deepcopy(twin)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert torch.equal(again(**batch).loss, loss)
    assert not torch.equal(twin(**batch).loss, loss)


def test_restores_and_refuses() -> None:
    _, twin = both([5])
    assert packing_of(twin).labelled_only  # type: ignore[union-attr]
    restore_packed(twin)
    assert "forward" not in vars(twin)
    batch = draw("language", [5, 3])
    assert twin(**batch).logits.shape[:2] == (2, 5)
    with pytest.raises(UsageError, match="labelled_only: expected a BertForMaskedLM, got BertForS"):
        use_packed(make(), labelled_only=True)
