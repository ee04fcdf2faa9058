"""S2FT: which bands of which weights train, how they are chosen, and that nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import UsageError
from sensikernels.hf import compact, training_flops, use_packed
from sensikernels.methods import method
from sensikernels.methods.parts import head_and_pooler
from sensikernels.methods.s2ft import S2FT, kept_count
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import draw, make
from tests.methods.part_runs import (
    HEAD,
    assert_resumes,
    drive,
    family_run,
    in_head,
    make_run,
    values,
)

ATTENTION, HEAD_DIM = "bert.encoder.layer.{}.attention.", 8
VALUE, OUT = ATTENTION + "self.value", ATTENTION + "output.dense"
FIRST, SECOND = (f"bert.encoder.layer.{{}}.{name}.dense" for name in ("intermediate", "output"))


@given(
    units=st.integers(1, 5000),
    share=st.floats(0.001, 1.0),
    multiple=st.sampled_from([1, 16]),
)
def test_counts_are_the_nearest_multiples(units: int, share: float, multiple: int) -> None:
    count = kept_count(units, share, multiple)
    assert 1 <= count <= units
    assert count % multiple == 0 or count == units
    if multiple <= share * units <= units - multiple:
        assert abs(count - share * units) <= multiple / 2


def bands(run: Any, name: str) -> torch.Tensor:
    """The entries that a plan trains, from its grid and tile alone."""
    mask = run.plan.update_masks[name]
    (height, width), (rows, columns) = mask.block_shape, mask.shape
    row, column = torch.arange(rows) // height, torch.arange(columns) // width
    return mask.grid[row][:, column]


@pytest.mark.parametrize("sides", ["both", "rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_chosen_bands_and_the_head_move(sides: str, dtype: torch.dtype) -> None:
    run, s2ft = make_run(make_model().to(dtype)), S2FT(share=0.3, sides=sides)
    before = values(run.model)
    s2ft.begin(run)
    assert run.plan is not None
    drive(s2ft, run, 4)
    after = values(run.model)
    assert after.keys() == before.keys()
    expected = set()
    for layer in range(2):
        expected |= {n.format(layer) for n in (VALUE, FIRST) if sides != "columns"}
        expected |= {n.format(layer) for n in (OUT, SECOND) if sides != "rows"}
    assert run.plan.update_masks.keys() == expected
    for name, value in after.items():
        moved = value != before[name]
        linear = name.removesuffix(".weight")
        if linear in expected:
            kept = bands(run, linear)
            axis = 1 if linear.endswith(("value", "intermediate.dense")) else 0
            lines = kept.all(axis)
            assert torch.equal(kept, lines.unsqueeze(axis).expand_as(kept))
            unit = HEAD_DIM if "attention" in linear else 1
            assert torch.equal(lines, lines[::unit].repeat_interleave(unit))
            assert int(lines.sum()) == (8 if unit == HEAD_DIM else 16)
            assert not bool(moved[~kept].any())
            assert bool(moved[kept].float().mean() > 0.5)
        elif name.startswith(("classifier", "bert.pooler")):
            assert bool(moved.any())
        else:
            assert not bool(moved.any()), name
    for layer in range(2):
        if sides == "both":
            heads = bands(run, VALUE.format(layer)).any(1)
            assert torch.equal(heads, bands(run, OUT.format(layer)).any(0))
            neurons = bands(run, FIRST.format(layer)).any(1)
            assert torch.equal(neurons, bands(run, SECOND.format(layer)).any(0))


def test_gradients_are_the_chosen_part_of_the_dense_ones() -> None:
    run, s2ft = make_run(), S2FT(share=0.5)
    dense = make_model()
    s2ft.begin(run)
    run.model(**make_batch()).loss.backward()
    dense(**make_batch()).loss.backward()
    for name in run.plan.update_masks:  # type: ignore[union-attr]
        linear: Any = run.model.get_submodule(name)
        whole = dense.get_submodule(name).weight.grad
        kept = bands(run, name)
        wanted = whole[kept].sort().values
        got = linear.values.grad.flatten().sort().values
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        moments = run.optimizer.state.get(linear.values)
        assert moments is None or not moments
    run.optimizer.step()
    held = sum(len(s["exp_avg"].flatten()) for s in run.optimizer.state.values())
    assert held == sum(p.numel() for p in run.model.parameters() if p.requires_grad)


def test_by_weight_the_largest_sums_are_chosen() -> None:
    run = make_run()
    dense = make_model()
    S2FT(share=0.3, selection="weight").begin(run)
    for layer in range(2):
        own = {n: dense.get_parameter(f"{n}.weight").abs().double() for n in names_of(layer)}
        query, key, value, out, first, second = own.values()
        heads = (query + key + value + out.T).sum(1).view(4, HEAD_DIM).sum(1)
        neurons = first.sum(1) + second.sum(0)
        assert chosen(run, VALUE.format(layer), 1)[::HEAD_DIM].nonzero().flatten().tolist() == [
            int(heads.argmax())
        ]
        best = neurons.topk(16).indices
        assert set(chosen(run, FIRST.format(layer), 1).nonzero().flatten().tolist()) == set(
            best.tolist()
        )


def names_of(layer: int) -> list[str]:
    stem = ATTENTION.format(layer)
    attention = [f"{stem}self.{n}" for n in ("query", "key", "value")]
    return [*attention, OUT.format(layer), FIRST.format(layer), SECOND.format(layer)]


def chosen(run: Any, name: str, axis: int) -> torch.Tensor:
    return bands(run, name).any(axis)


def test_by_gradient_the_largest_mask_gradients_are_chosen() -> None:
    run, dense = make_run(), make_model()
    total = torch.zeros(2, 4, dtype=torch.float64)
    for batch in run.batches():
        gates = [torch.ones(4, requires_grad=True) for _ in range(2)]
        hooks = [
            dense.get_submodule(OUT.format(i)).register_forward_pre_hook(
                lambda _, x, gate=gate: (x[0] * gate.repeat_interleave(HEAD_DIM),)
            )
            for i, gate in enumerate(gates)
        ]
        grads = torch.autograd.grad(dense.eval()(**batch).loss, gates)
        total += torch.stack(grads).double().square()
        for hook in hooks:
            hook.remove()
    S2FT(share=0.5, selection="gradient").begin(run)
    for layer in range(2):
        got = chosen(run, OUT.format(layer), 0)[::HEAD_DIM].nonzero().flatten().tolist()
        assert got == sorted(total[layer].topk(2).indices.tolist())


def test_random_choices_follow_the_seed() -> None:
    def grids(seed: int) -> list[torch.Tensor]:
        run = make_run(seed=seed)
        torch.rand(seed)  # history does not matter
        S2FT(share=0.5).begin(run)
        return [m.grid for m in run.plan.update_masks.values()]  # type: ignore[union-attr]

    one, same, other = grids(1), grids(1), grids(2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sides", ["both", "rows", "columns"])
def test_flops_are_as_planned(sides: str, packed: bool) -> None:
    run = make_run()
    if packed:
        use_packed(run.model, multiple=1)
    S2FT(share=0.5, sides=sides).begin(run)
    batch = make_batch()
    batch["attention_mask"][:] = 1
    counted = training_flops(run.model, batch) / batch["input_ids"].numel()
    assert run.plan is not None
    assert counted == pytest.approx(run.plan.flops_planned, rel=1e-9)
    assert run.plan.flops_planned < run.plan.flops_dense


@pytest.mark.parametrize("kind", ["electra", "distilbert", "modernbert"])
def test_flops_that_other_families_save_are_as_planned(kind: str) -> None:
    run, batch = family_run(kind), draw(HEAD, kind, ragged=False)
    use_packed(run.model, multiple=1)
    dense = training_flops(run.model, batch)
    S2FT(share=0.5).begin(run)
    saved = (dense - training_flops(run.model, batch)) / batch["input_ids"].numel()
    assert run.plan is not None
    assert saved == pytest.approx(run.plan.flops_dense - run.plan.flops_planned, rel=1e-9)


@pytest.mark.parametrize("selection", ["random", "gradient"])
def test_a_killed_run_goes_on(selection: str) -> None:
    def fresh() -> Any:
        return make_run(make_model(dropout=0.1))

    assert_resumes(lambda: S2FT(share=0.5, selection=selection), fresh, at=3)


@pytest.mark.parametrize("kind", ["roberta", "electra", "distilbert", "modernbert", "deberta-v2"])
def test_other_families(kind: str) -> None:
    run = family_run(kind)
    before = values(run.model)
    s2ft = S2FT(share=0.5)
    s2ft.begin(run)
    drive(s2ft, run, 3, lambda _: draw(HEAD, kind))
    masks = run.plan.update_masks  # type: ignore[union-attr]
    plain = values(compact(run.model))
    assert plain.keys() == before.keys()
    for name, value in plain.items():
        moved = value != before[name]
        linear = name.removesuffix(".weight")
        if linear in masks:
            assert bool(moved.any())
            assert not bool(moved[~masks[linear].dense()].any())
        else:
            assert in_head(name) or not bool(moved.any()), name
    if kind == "modernbert":
        of_all = masks["model.layers.0.attn.Wqkv"].dense()
        query_key, value = of_all[: 2 * 32], of_all[2 * 32 :]
        assert not bool(query_key.any())
        assert torch.equal(value[:, 0], masks["model.layers.0.attn.Wo"].dense()[0])
        gated = masks["model.layers.0.mlp.Wi"].dense()[:, 0]
        assert torch.equal(gated[:48], gated[48:])
        assert torch.equal(gated[:48], masks["model.layers.0.mlp.Wo"].dense()[0])


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "modernbert"])
def test_the_head_trains_for_every_task(kind: str) -> None:
    for head in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
        model = make(kind, head)
        names = set(head_and_pooler(model))
        outside = {n for n, _ in model.named_parameters() if not n.startswith(root_of(model))}
        assert outside <= names
        assert all(in_head(n) or n.startswith("qa_outputs") for n in names)


def root_of(model: Any) -> str:
    return f"{model.base_model_prefix}."


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 0.0}, r"share: expected a share in \(0, 1\], got 0.0"),
        ({"selection": "best"}, "selection: expected one of gradient, random, weight, got 'best'"),
        ({"sides": "top"}, "sides: expected one of both, columns, rows, got 'top'"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        method("s2ft", **options)
