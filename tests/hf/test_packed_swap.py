"""Packing is reversible and goes with plans, checkpoints, optimizers and the compiler."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from sensikernels._core.errors import UsageError
from sensikernels.hf import (
    apply,
    compact,
    packing_of,
    restore,
    restore_packed,
    sensitivity,
    use_packed,
)
from sensikernels.masks import Budget, Mask, Plan, plan
from tests.hf.packed_cases import HEADS, LENGTHS, SMALL, draw, grads, make, pack, run, same

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("granularity", ["heads", "dimensions"])
@pytest.mark.parametrize("order", ["plan first", "packed first"])
@pytest.mark.parametrize("form", ["compact", "masked"])
def test_trimmed_packed_is_trimmed(granularity: str, order: str, form: str) -> None:
    model, batch = make().double(), draw("classification", LENGTHS["ragged"])
    made = plan(
        sensitivity(model, [batch], granularity=granularity),
        Budget(flops=0.5),
        multiples=SMALL,
        minimums=SMALL,
    )
    twin = copy.deepcopy(model)
    apply(twin, made, form=form)
    out, wanted = run(twin, batch)
    if order == "packed first":
        use_packed(model)
    apply(model, made, form=form)
    if order == "plan first":
        use_packed(model)
    got, ours = run(model, batch)
    torch.testing.assert_close(got.logits, out.logits, rtol=0, atol=1e-10)
    same(ours, wanted)
    if form == "compact":
        small = compact(model)
        assert packing_of(small) is None
        torch.testing.assert_close(small.eval()(**batch).logits, out.logits)
        use_packed(small)
        torch.testing.assert_close(small(**batch).logits, out.logits)


@pytest.mark.parametrize("part", ["attention.self.query", "intermediate.dense", "output.dense"])
def test_selective_layers_run_as_they_are(part: str) -> None:
    model, batch = make().double(), draw("classification", LENGTHS["ragged"])
    name = f"bert.encoder.layer.1.{part}"
    shape = tuple(model.get_submodule(name).weight.shape)
    made = Plan(
        method="rows", update_masks={name: Mask.rows(torch.arange(shape[0]) % 3 == 0, shape)}
    )
    apply(model, made)
    out, wanted = run(model, batch)
    use_packed(model)
    got, ours = run(model, batch)
    torch.testing.assert_close(got.logits, out.logits, rtol=0, atol=1e-10)
    same(ours, wanted)
    restore(model)
    same(run(model, batch)[1], run(make().double(), batch)[1])


@pytest.mark.parametrize("head", HEADS)
def test_packing_and_back_is_bit_equal(head: str) -> None:
    model, batch = make(head), draw(head, LENGTHS["ragged"])
    out, wanted = run(model, batch)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = list(model.parameters())
    kinds = [type(m) for m in model.modules()]
    use_packed(model)
    assert list(model.state_dict()) == list(before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    restore_packed(model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    got, ours = run(model, batch)
    assert torch.equal(got.loss, out.loss)
    same(ours, wanted, 0.0)


def test_state_travels(tmp_path: Path) -> None:
    model, other = make().eval(), make().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    batch = draw("classification", LENGTHS["ragged"])
    use_packed(model)
    use_packed(other)
    other.load_state_dict(model.state_dict())
    wanted = model(**batch).logits
    assert torch.equal(other(**batch).logits, wanted)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, wanted)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path).eval()
    assert packing_of(back) is None
    use_packed(back)
    assert torch.equal(back(**batch).logits, wanted)


def test_no_two_parameters_share_a_storage() -> None:
    model, batch = make(), draw("classification", LENGTHS["ragged"])
    for change in (use_packed, nn.Module.double, lambda m: run(m, batch), restore_packed):
        change(model)
        held = [p.untyped_storage().data_ptr() for p in model.parameters()]
        assert len(set(held)) == len(held)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_frozen_parts_need_no_gradient() -> None:
    model, batch = make().double(), draw("classification", LENGTHS["ragged"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.1." in name or name.startswith("classifier"))
    model.get_parameter("bert.encoder.layer.1.attention.self.key.weight").requires_grad_(False)
    _, wanted = run(model, batch)
    use_packed(model)
    seen: list[bool] = []
    lowest = model.get_submodule("bert.encoder.layer.0.output.dense")
    lowest.register_forward_hook(lambda m, i, o: seen.append(o.requires_grad))
    same(run(model, batch)[1], wanted)
    assert seen == [False]


@pytest.mark.parametrize(("fused", "dropout"), [(False, 0.1), (True, 0.0)])
def test_gradient_checkpointing_computes_the_same(fused: bool, dropout: float) -> None:
    model = make(dropout=dropout).double().train()
    batch = draw("classification", LENGTHS["ragged"])
    use_packed(model, fused=fused)
    torch.manual_seed(5)
    out, wanted = run(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    torch.manual_seed(5)
    got, ours = run(model, batch)
    torch.testing.assert_close(got.loss, out.loss, rtol=0, atol=1e-14)
    same(ours, wanted, 1e-13)


@pytest.mark.parametrize("statistic", ["sum_batch_grad_squared", "sum_grad_squared"])
def test_ranking_is_that_of_the_model_before(statistic: str) -> None:
    model, batch = make(dropout=0.1), draw("classification", LENGTHS["ragged"])
    wanted = sensitivity(model, [batch], statistic=statistic)
    use_packed(model)
    for form in (batch, pack(batch)):
        got = sensitivity(model, [form], statistic=statistic)
        assert packing_of(model) is not None
        assert got.rows == wanted.rows
        for name, value in wanted.values.items():
            torch.testing.assert_close(got.values[name], value)


def test_a_bare_bert_packs_too() -> None:
    model = make().double().bert
    batch = {k: v for k, v in draw("classification", LENGTHS["ragged"]).items() if k != "labels"}
    wanted = model(**batch)
    use_packed(model)
    got = model(**batch)
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(got.pooler_output, wanted.pooler_output, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        got.last_hidden_state[mask], wanted.last_hidden_state[mask], rtol=0, atol=1e-10
    )
    assert not got.last_hidden_state[~mask].any()
    restore_packed(model)
    assert type(model) is transformers.BertModel


def test_compiles_whole_on_packed_inputs() -> None:
    model, batch = make().eval(), pack(draw("classification", LENGTHS["ragged"]))
    use_packed(model)
    wanted = run(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    got = compiled(**batch)
    got.loss.backward()
    torch.testing.assert_close(got.logits, wanted[0].logits)
    for name, value in grads(model).items():
        torch.testing.assert_close(value, wanted[1][name], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_done_is_said() -> None:
    model, batch = make(), draw("classification", LENGTHS["ragged"])
    with pytest.raises(UsageError, match="expected packed tokens, got padded"):
        restore_packed(model)
    with pytest.raises(UsageError, match="model: expected a BERT.*, got Linear"):
        use_packed(nn.Linear(2, 2))
    config = make().config
    config.is_decoder = True
    decoder = transformers.BertLMHeadModel(config)
    with pytest.raises(UsageError, match="expected an encoder, got a decoder"):
        use_packed(decoder)
    use_packed(model)
    with pytest.raises(UsageError, match="packed ones already"):
        use_packed(model)
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(UsageError, match=f"{name}: expected none"):
            model(**batch, **{name: True})
    embeds = torch.zeros(4, 12, 32)
    with pytest.raises(UsageError, match="input_ids: expected token ids"):
        model(inputs_embeds=embeds)
    left = {**batch, "attention_mask": batch["attention_mask"].flip(1)}
    with pytest.raises(UsageError, match="attention_mask: expected a token at the start"):
        model(**left)
    with pytest.raises(UsageError, match=r"attention_mask: expected \[4, 12\]"):
        model(**{**batch, "attention_mask": batch["attention_mask"][:, None]})
    packed = pack(batch)
    for changed, message in (
        ({"max_length": None}, "max_length: expected a Python int"),
        ({"cu_seqlens": packed["cu_seqlens"].long()}, "cu_seqlens: expected int32"),
        ({"attention_mask": batch["attention_mask"]}, "attention_mask: expected none beside"),
        ({"input_ids": batch["input_ids"]}, "input_ids: expected"),
    ):
        with pytest.raises(UsageError, match=message):
            model(**{**packed, **changed})
