"""Every family with every head: trimmed, packed, compacted and read back as stock computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sensikernels._core.errors import UsageError
from sensikernels.hf import apply, compact, export, restore, sensitivity
from sensikernels.hf.families import FAMILIES, family_named
from sensikernels.masks import Budget, Plan, plan
from tests.hf.families import DIFFERENCES, ROUNDED, config_of, draw, heads_of, make, tensors
from tests.hf.packed_cases import SMALL, pack

transformers = pytest.importorskip("transformers")

CASES = [(kind, head) for kind in DIFFERENCES for head in heads_of(kind)]
PACKED = [(kind, head) for kind, head in CASES if family_named(kind).packed is not None]
STEP = ("dropout", "packed", "cls", "fused")


def trim(model: Any, head: str, granularity: str = "heads") -> Plan:
    kind = model.config.model_type
    batches, criterion = (
        ([], "magnitude") if head == "Model" else ([draw(head, kind)], "mask-gradient")
    )
    scores = sensitivity(model, batches, criterion, granularity=granularity)
    return plan(scores, Budget(flops=0.7), multiples=SMALL, minimums=SMALL)


def granularities(kind: str) -> tuple[str, ...]:
    return tuple(family_named(kind).couplings)


def test_every_family_is_tested() -> None:
    assert {family.name for family in FAMILIES} == set(DIFFERENCES)


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_ranked_trimmed_compacted_and_read_back(kind: str, head: str, tmp_path: Path) -> None:
    for granularity in granularities(kind):
        model, batch = make(kind, head).eval(), draw(head, kind)
        before = tensors(model, batch)
        made = trim(model, head, granularity)
        assert made.flops_ratio < 0.8
        apply(model, made, form="masked")
        masked = tensors(model, batch)
        restore(model)
        apply(model, made)
        trimmed = tensors(model, batch)
        small = compact(model)
        small.save_pretrained(tmp_path / f"compact-{granularity}")
        auto = getattr(transformers, "AutoModel" if head == "Model" else f"AutoModel{head}")
        back = auto.from_pretrained(tmp_path / f"compact-{granularity}").eval()
        assert type(back) is type(small)
        own = small.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in back.state_dict().items())
        stock = export(model, tmp_path / f"stock-{granularity}")
        assert type(stock) is type(make(kind, head))
        read = type(stock).from_pretrained(tmp_path / f"stock-{granularity}").eval()
        again = export(small).eval()
        for name, value in masked.items():
            torch.testing.assert_close(trimmed[name], value, rtol=1e-4, atol=1e-5)
            for other in (small, back, stock, read, again):
                got = tensors(other, batch)[name]
                torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
        restore(model)
        assert all(torch.equal(v, before[k]) for k, v in tensors(model, batch).items())


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_gradients_of_what_is_kept_are_those_of_the_masked_model(kind: str, head: str) -> None:
    if head == "Model":
        pytest.skip("a bare encoder has no loss")
    batch = draw(head, kind)
    one, other = make(kind, head), make(kind, head)
    made = trim(one, head)
    apply(one, made, form="masked")
    apply(other, made)
    one(**batch).loss.backward()
    other(**batch).loss.backward()
    restore(one)
    restore(other)
    for name, parameter in one.named_parameters():
        theirs = other.get_parameter(name).grad
        if theirs is not None and name.rpartition(".")[0] not in made.weight_masks:
            torch.testing.assert_close(theirs, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "given packed"])
@pytest.mark.parametrize(("kind", "head"), PACKED)
def test_the_fast_step_is_stocks(kind: str, head: str, packed: bool) -> None:
    if packed and head in ("ForMultipleChoice", "ForNextSentencePrediction", "ForPreTraining"):
        pytest.skip("its loss reshapes padded rows")
    # Stock's loss for answers reads the hidden states of padding.
    batch = draw(head, kind, ragged=head != "ForQuestionAnswering")
    stock, fast = make(kind, head), make(kind, head)
    wanted = stock(**batch)
    apply(fast, features=STEP)
    got = fast(**(without_positions(pack(batch)) if packed else batch))
    if head == "Model":
        return
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    wanted.loss.backward()
    got.loss.backward()
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None and "loss" not in name:
            mine = fast.get_parameter(name).grad
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def without_positions(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "position_ids"}


@pytest.mark.parametrize(("kind", "head"), PACKED)
def test_outputs_of_the_fast_step_are_stocks_where_tokens_are(kind: str, head: str) -> None:
    batch = {k: v for k, v in draw(head, kind).items() if "label" not in k and "position" not in k}
    model = make(kind, head).eval().double()
    wanted = tensors(model, batch)
    apply(model, features=STEP)
    mask, near = batch["attention_mask"].bool(), ROUNDED.get(kind, 1e-9)
    for name, value in tensors(model, batch).items():
        here = mask if value.shape[: mask.ndim] == mask.shape else slice(None)
        torch.testing.assert_close(value[here], wanted[name][here], rtol=near, atol=near)
    restore(model)
    assert all(torch.equal(v, wanted[k]) for k, v in tensors(model, batch).items())


@pytest.mark.parametrize("kind", [kind for kind, head in PACKED if head == "ForMaskedLM"])
def test_a_language_head_on_labelled_tokens(kind: str) -> None:
    batch = draw("ForMaskedLM")
    batch["labels"][:, ::2] = -100
    stock, fast = make(kind, "ForMaskedLM"), make(kind, "ForMaskedLM")
    wanted = stock(**batch)
    apply(fast, features=(*STEP, "labelled"))
    got = fast(**batch)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=1e-5)
    assert len(got.logits) == int((batch["labels"] != -100).sum())
    wanted.loss.backward()
    got.loss.backward()
    for name, parameter in stock.named_parameters():
        mine = fast.get_parameter(name).grad
        if parameter.grad is not None:
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", list(DIFFERENCES))
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    head = "ForSequenceClassification"
    batch = draw(head)
    features = STEP if family_named(kind).packed is not None else ()
    grads: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model: Any = make(kind, head)
        if checkpointing and not model.supports_gradient_checkpointing:
            pytest.skip(f"transformers' {type(model).__name__} has none")
        made = trim(model, head)
        apply(model, made, features=features)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [f.name for f in FAMILIES if f.packed is None])
def test_what_a_family_cannot_do_is_said_before_anything_changes(kind: str) -> None:
    family = family_named(kind)
    model = make(kind, "ForSequenceClassification")
    before = list(model.state_dict())
    for features in (("packed",), STEP):
        with pytest.raises(UsageError, match=f"which has {family.padded_because}"):
            apply(model, features=features)
    with pytest.raises(UsageError, match=f"granularity: expected one of heads for {family.title}"):
        sensitivity(model, [], "magnitude", granularity="dimensions")
    assert list(model.state_dict()) == before
    apply(model, features=("dropout", "words"))
    restore(model)


@pytest.mark.parametrize("kind", list(DIFFERENCES))
def test_an_encoder_without_padding_token_or_pooler(kind: str) -> None:
    model: Any = make(kind, "ForTokenClassification").eval()
    made = trim(model, "ForTokenClassification")
    apply(model, made)
    assert type(compact(model).config).model_type == f"sk_{kind}"
    assert config_of(kind).model_type == kind


def test_token_types_that_a_family_ignores_are_ignored() -> None:
    batch = draw("ForSequenceClassification", "distilbert")
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    model = make("distilbert", "ForSequenceClassification").eval()
    wanted = model(**batch).logits
    apply(model, features=STEP)
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-5, atol=1e-5)


def test_the_documented_table_is_the_families() -> None:
    page = Path(__file__).parents[2] / "ARCHITECTURE.md"
    if not page.is_file():
        pytest.skip("no repository around these tests")
    lines = page.read_text().split("| encoders | trim | fast |")[1].split("\n\n")[0].splitlines()
    said = {}
    for line in lines[2:]:
        titles, trimmed, fast = (cell.strip() for cell in line.split("|")[1:4])
        said.update(dict.fromkeys(titles.split(", "), (trimmed, fast)))
    able = {True: "yes", False: "no"}
    assert said == {
        f.title: (able[f.compact is not None], able[f.packed is not None]) for f in FAMILIES
    }
