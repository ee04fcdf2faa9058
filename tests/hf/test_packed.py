"""Packed tokens compute what HuggingFace's padded ones do, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sensikernels.hf import restore_packed, use_counter_dropout, use_packed
from tests.hf.packed_cases import (
    HEADS,
    LENGTHS,
    draw,
    grads,
    make,
    pack,
    run,
    same,
    same_on_average,
)


def answering_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss of real positions alone: padding's logits differ by intent."""
    out = model(**{k: v for k, v in batch.items() if not k.endswith("positions")})
    mask = batch["attention_mask"].to(out.start_logits.dtype)
    wave = torch.arange(mask.shape[1], dtype=mask.dtype).cos()
    loss: Tensor = ((out.start_logits.square() + out.end_logits * wave) * mask).sum()
    return loss


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("head", HEADS)
def test_padded_inputs_give_huggingfaces_numbers(
    head: str, lengths: list[int], fused: bool
) -> None:
    model = make(head).double()
    batch = draw(head, lengths)
    if head == "answering":
        answering_loss(model, batch).backward()
        wanted = grads(model)
        model.zero_grad()
        use_packed(model, fused=fused, multiple=8)
        answering_loss(model, batch).backward()
        same(grads(model), wanted)
        return
    out, wanted = run(model, batch)
    assert use_packed(model, fused=fused, multiple=8)
    got, ours = run(model, batch)
    assert abs(got.loss.item() - out.loss.item()) <= 1e-10
    real = batch["attention_mask"].bool() if head == "language" else ...
    torch.testing.assert_close(got.logits[real], out.logits[real], rtol=0, atol=1e-10)
    same(ours, wanted)


def test_an_unpadded_answering_batch_has_huggingfaces_loss() -> None:
    model, batch = make("answering").double(), draw("answering", LENGTHS["full"])
    out, wanted = run(model, batch)
    use_packed(model)
    got, ours = run(model, batch)
    torch.testing.assert_close(got.start_logits, out.start_logits, rtol=0, atol=1e-10)
    assert abs(got.loss.item() - out.loss.item()) <= 1e-10
    same(ours, wanted)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("head", HEADS)
def test_packed_inputs_are_padded_ones(head: str, lengths: list[int]) -> None:
    model = make(head).double()
    batch = draw(head, lengths)
    use_packed(model, multiple=8)
    out, wanted = run(model, batch)
    got, ours = run(model, pack(batch))
    assert abs(got.loss.item() - out.loss.item()) <= 1e-12
    same(ours, wanted, 1e-12)


def test_positions_follow_from_cu_seqlens_and_a_flat_batch_will_do() -> None:
    model, batch = make().double().eval(), draw("classification", LENGTHS["ragged"])
    use_packed(model)
    packed = pack(batch)
    wanted = model(**packed).logits
    bare = {k: v for k, v in packed.items() if k != "position_ids"}
    bare["input_ids"] = bare["input_ids"][0]
    assert torch.equal(model(**bare).logits, wanted)


def test_given_positions_and_scattered_masks_are_obeyed() -> None:
    model = make().double()
    batch = draw("classification", LENGTHS["full"])
    batch["attention_mask"][0, 3] = batch["attention_mask"][1, 8] = 0
    batch["position_ids"] = torch.arange(9).flip(0)[None]
    out, wanted = run(model, batch)
    use_packed(model)
    got, ours = run(model, batch)
    torch.testing.assert_close(got.logits, out.logits, rtol=0, atol=1e-10)
    same(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", HEADS)
def test_rows_of_no_sequence_are_inert(head: str, dtype: torch.dtype) -> None:
    model = make(head, dropout=0.1).to(dtype)
    model.get_input_embeddings().sparse = True  # type: ignore[operator]
    batch = draw(head, LENGTHS["ragged"])
    use_packed(model)
    results = []
    for fill in (1, 96, 33):
        torch.manual_seed(3)
        out, found = run(model, pack(batch, 64, fill=fill))
        results.append((out.loss, found))
    loss, first = results[0]
    for other, found in results[1:]:
        assert torch.equal(other, loss)
        for name, value in first.items():
            assert torch.equal(found[name].to_dense(), value.to_dense()), name
    if head == "language":
        return  # the decoder shares the word table, and its gradient is dense
    words = first["bert.embeddings.word_embeddings.weight"].coalesce()
    occurring = batch["input_ids"][batch["attention_mask"] == 1].unique()
    assert set(words.indices()[0].tolist()) <= set(occurring.tolist())


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_first_tokens_alone_change_nothing(lengths: list[int]) -> None:
    model, batch = make().double(), draw("classification", lengths)
    use_packed(model, cls_only=False)
    full, wanted = run(model, batch)
    assert model.bert(input_ids=batch["input_ids"]).last_hidden_state.shape[1] == max(lengths)
    restore_packed(model)
    assert "last layer on first tokens" in use_packed(model)
    got, ours = run(model, batch)
    assert model.bert(input_ids=batch["input_ids"]).last_hidden_state.shape[1] == 1
    torch.testing.assert_close(got.logits, full.logits, rtol=0, atol=1e-12)
    same(ours, wanted, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    model, batch = make(), draw("classification", LENGTHS["ragged"])
    wanted = model(**batch).loss
    use_packed(model.to(dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        out, found = run(model, batch)
    torch.testing.assert_close(out.loss.float(), wanted, rtol=2e-2, atol=2e-2)
    assert all(g.dtype == dtype and g.isfinite().all() for g in found.values())


def test_dropout_is_on_in_training_alone() -> None:
    model, batch = make(dropout=0.3), draw("classification", LENGTHS["ragged"])
    wanted = model.eval()(**batch).logits
    use_counter_dropout(model)
    use_packed(model)
    torch.testing.assert_close(model(**batch).logits, wanted)
    model.train()
    one, other = model(**batch).logits, model(**batch).logits
    assert not torch.equal(one, other)
    torch.manual_seed(1)
    first = model(**batch).logits
    torch.manual_seed(1)
    assert torch.equal(model(**batch).logits, first)


def test_loss_with_dropout_is_the_same_on_average() -> None:
    model, batch = make(dropout=0.1).train(), draw("classification", LENGTHS["every length"])
    same_on_average(model, batch, use_packed)
