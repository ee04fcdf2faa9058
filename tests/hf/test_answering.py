"""Question answering on packed tokens: HuggingFace's loss and gradients without its padding."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sensikernels.hf import apply, class_of, compact, restore, sensitivity
from sensikernels.hf.families import family_named
from sensikernels.hf.packed.answers import AnswerHead
from sensikernels.masks import Budget, plan
from tests.hf.families import DIFFERENCES, ROUNDED, draw, heads_of, make
from tests.hf.packed_cases import SMALL, pack
from tests.hf.test_encoders import STEP, without_positions

transformers = pytest.importorskip("transformers")

HEAD = "ForQuestionAnswering"
KINDS = [k for k in DIFFERENCES if HEAD in heads_of(k) and family_named(k).packed is not None]
SPAN = ("start_positions", "end_positions")


def fast(kind: str = "bert") -> nn.Module:
    model = make(kind, HEAD)
    apply(model, features=STEP)
    return model


def without_padding(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Stock's logits, none where padding is, and the loss that they have."""
    out = model(**{name: value for name, value in batch.items() if name not in SPAN})
    padding = batch["attention_mask"] == 0
    logits = [out[name].masked_fill(padding, -torch.inf) for name in ("start_logits", "end_logits")]
    losses = [F.cross_entropy(one, batch[name]) for one, name in zip(logits, SPAN, strict=True)]
    return logits[0], logits[1], sum(losses) / 2


@pytest.mark.parametrize("form", ["right", "left", "given packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_has_stocks_loss_and_gradients_without_padding(kind: str, form: str) -> None:
    batch = draw(HEAD, kind)
    if form == "left":
        batch |= {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
        batch |= {name: batch["input_ids"].shape[1] - 1 - batch[name] for name in SPAN}
    stock, ours = make(kind, HEAD), fast(kind)
    start, end, wanted = without_padding(stock, batch)
    got = ours(**(without_positions(pack(batch)) if form == "given packed" else batch))
    torch.testing.assert_close(got.loss, wanted, rtol=1e-5, atol=1e-5)
    wanted.backward()
    got.loss.backward()
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            mine = ours.get_parameter(name).grad
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    near = max(1e-5, ROUNDED.get(kind, 0.0))
    for mine, theirs in ((got.start_logits, start), (got.end_logits, end)):
        there = theirs > -torch.inf
        torch.testing.assert_close(mine[there], theirs[there], rtol=near, atol=near)
        assert (mine[~there] == torch.finfo(mine.dtype).min).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_loss_is_its_own(kind: str) -> None:
    """However long the other rows are: the batch's loss is the mean of its rows' losses."""
    model, batch = fast(kind), draw(HEAD, kind, rows=5)
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [
        {k: v[i : i + 1, :length] if v.ndim == 2 else v[i : i + 1] for k, v in batch.items()}
        for i, length in enumerate(lengths)
    ]
    alone = torch.stack([model(**row).loss for row in rows])
    torch.testing.assert_close(model(**batch).loss, alone.mean(), rtol=1e-5, atol=1e-6)
    longer = {k: F.pad(v, (0, 4)) if v.ndim == 2 else v for k, v in batch.items()}
    torch.testing.assert_close(model(**longer).loss, alone.mean(), rtol=1e-5, atol=1e-6)


def test_positions_outside_a_row_are_not_counted() -> None:
    model, batch = fast(), draw(HEAD)
    length = batch["input_ids"].shape[1]
    rest = {k: v[1:] for k, v in batch.items()}
    outside = {name: torch.cat([batch[name].new_tensor([7]), batch[name][1:]]) for name in SPAN}
    wanted = model(**rest).loss
    for far in (7, length, length + 100):  # in the padding of row 0, and past every row
        outside = {name: torch.cat([batch[name].new_tensor([far]), rest[name]]) for name in SPAN}
        torch.testing.assert_close(model(**{**batch, **outside}).loss, wanted)
        column = {name: value[:, None] for name, value in outside.items()}
        torch.testing.assert_close(model(**{**batch, **column}).loss, wanted)
    nowhere = {name: torch.full_like(batch[name], length) for name in SPAN}
    assert model(**{**batch, **nowhere}).loss.isnan()  # as stock's mean of nothing
    before = {name: torch.full_like(batch[name], -1) for name in SPAN}
    first = {name: torch.zeros_like(batch[name]) for name in SPAN}
    assert torch.equal(model(**{**batch, **before}).loss, model(**{**batch, **first}).loss)


def test_units_are_ranked_by_huggingfaces_loss_packed_or_not() -> None:
    stock, ours, batch = make("bert", HEAD), fast(), draw(HEAD)
    wanted, got = sensitivity(stock, [batch]), sensitivity(ours, [batch])
    assert got.values.keys() == wanted.values.keys()
    for name, value in wanted.values.items():
        assert torch.equal(got.values[name], value), name
    assert isinstance(ours, AnswerHead)


def test_calls_by_place_tuples_and_bfloat16() -> None:
    model, batch = fast(), draw(HEAD)
    wanted = model(**batch)
    kept = [None, None, None]  # token types, positions, embeddings
    by_place = (batch["input_ids"], batch["attention_mask"], *kept, *(batch[n] for n in SPAN))
    assert torch.equal(model(*by_place).loss, wanted.loss)
    loss, start, end = model(**batch, return_dict=False)
    assert all(torch.equal(a, b) for a, b in zip((loss, start, end), wanted.values(), strict=True))
    model.config.return_dict = False
    assert torch.equal(model(**batch)[0], wanted.loss)
    model.config.return_dict = True
    assert model(**{k: v for k, v in batch.items() if k not in SPAN}).loss is None
    low = model.to(torch.bfloat16)(**batch)
    assert (low.loss.dtype, low.start_logits.dtype) == (torch.float32, torch.bfloat16)
    assert low.loss.isfinite()


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_compiles_whole(kind: str) -> None:
    model, batch = fast(kind), without_positions(pack(draw(HEAD, kind)))
    wanted = model(**batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(**batch)
    torch.testing.assert_close(got.loss, wanted.loss)
    got.loss.backward()
    torch.testing.assert_close(got.start_logits, wanted.start_logits)


def test_it_stays_its_class_and_is_restored() -> None:
    model, batch = make("bert", HEAD), draw(HEAD)
    kind, wanted = type(model), model(**batch).loss
    apply(model, features=STEP)
    loss = model(**batch).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, kind)
        assert class_of(twin) is kind
        assert torch.equal(twin(**batch).loss, loss)
    restore(model)
    assert type(model) is kind
    assert torch.equal(model(**batch).loss, wanted)
    scores = sensitivity(model, [batch])
    apply(model, plan(scores, Budget(flops=0.7), multiples=SMALL, minimums=SMALL), features=STEP)
    small = compact(model)
    assert not isinstance(small, AnswerHead)
    torch.testing.assert_close(without_padding(small, batch)[2], model(**batch).loss)


@pytest.mark.parametrize(("head", "features"), [(HEAD, STEP), ("ForMaskedLM", (*STEP, "labelled"))])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_a_changed_head_keeps_the_columns_of_a_trainer(
    kind: str, head: str, features: tuple[str, ...], tmp_path: Any
) -> None:
    """It drops what ``forward``'s signature does not name, and finds labels by it."""
    datasets = pytest.importorskip("datasets")
    model, batch = make(kind, head), draw(head, kind)
    before = inspect.signature(model.forward)
    apply(model, features=features)
    assert inspect.signature(model.forward) == before
    columns = {name: value.tolist() for name, value in batch.items()} | {"note": [0] * 4}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
        ),
        train_dataset=datasets.Dataset.from_dict(columns),
        eval_dataset=datasets.Dataset.from_dict(columns),
        data_collator=transformers.default_data_collator,
    )
    wanted = model.eval()(**batch).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.item(), rel=1e-4)
    assert trainer.train().global_step == 1
