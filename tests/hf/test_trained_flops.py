"""TrainedFlops against what FlopCounterMode measures, for any set of parameters that trains."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.data import geometry
from sensikernels.hf import (
    computed,
    encoder_layers,
    family_of,
    structure_of,
    training_flops,
    use_packed,
)
from sensikernels.hf.packed import joined
from sensikernels.hf.trained_flops import TrainedFlops, trained_flops
from sensikernels.masks import Geometry
from sensikernels.methods.bitfit import select
from tests.hf.families import draw, make

HEAD, ANSWERS = "ForSequenceClassification", "ForQuestionAnswering"
PACKED: dict[str, dict[str, int]] = {
    "bert": {},
    "electra": {},
    "distilbert": {},
    # The structure counts windowed attention as if every key were seen.
    "modernbert": {"local_attention": 64},
}


def measure(model: nn.Module, batch: dict[str, Tensor], names: Collection[str]) -> float:
    """FLOPs per computed token with exactly ``names`` trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return training_flops(model, batch) / computed(model, batch)["input_ids"].numel()


def seen(model: nn.Module, batch: dict[str, Tensor]) -> Geometry:
    return geometry([computed(model, batch)])


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def sets_of(model: nn.Module) -> dict[str, list[str]]:
    names, family = names_of(model), family_of(model)
    head = [n for n in names if n.startswith(family.heads)]
    made = {"everything": names, "biases": [*select(names, ("all",), family)], "head": head}
    layers = encoder_layers(model)
    for depth, layer in enumerate(layers):
        upper = tuple(f"{one.prefix}." for one in layers[depth:])
        made[f"above {depth}"] = head + [n for n in names if n.startswith(upper)]
        made[f"only {depth}"] = [n for n in names if n.startswith(f"{layer.prefix}.")]
    return made | {name: [name] for name in names if not name.endswith("bias")}


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_step_costs_what_is_counted(kind: str) -> None:
    model, batch = make(kind, HEAD, **PACKED[kind]), draw(HEAD, kind)
    use_packed(model)
    costs = TrainedFlops.of(model, seen(model, batch))
    assert set(costs.depths) == set(names_of(model))
    # ModernBERT's table of rotations is a product, which the structure leaves out.
    close = 1e-3 if kind == "modernbert" else 1e-9
    for what, names in sets_of(model).items():
        want = measure(model, batch, names)
        assert costs.total(names) == pytest.approx(want, rel=close), what


@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_so_does_one_of_answers(kind: str) -> None:
    """But for the head, which runs on padded rows and is counted on packed tokens."""
    model, batch = make(kind, ANSWERS, **PACKED[kind]), draw(ANSWERS, kind)
    use_packed(model)
    costs = TrainedFlops.of(model, seen(model, batch))
    for what in ("everything", "biases", "head", "above 1", "only 0"):
        names = sets_of(model)[what]
        want = measure(model, batch, names)
        assert costs.total(names) == pytest.approx(want, rel=2e-3), what


@pytest.mark.parametrize("kind", ["distilbert", "mpnet"])
def test_a_padded_step_costs_no_more_than_counted(kind: str) -> None:
    """Attention's backward is done in part where one of its inputs alone trains."""
    model, batch = make(kind, HEAD), draw(HEAD, kind)
    costs = TrainedFlops.of(model, seen(model, batch))
    for what, names in sets_of(model).items():
        want = measure(model, batch, names)
        single = len(names) == 1 and what != "head"
        assert costs.total(names) == pytest.approx(want, rel=0.05 if single else 1e-9), what
        assert costs.total(names) >= want * (1 - 1e-9), what


@pytest.mark.parametrize("limit", [0, joined.SMALL])
def test_weights_that_are_one_product_have_one_gradient(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sensikernels.hf.packed.joined.SMALL", limit)
    monkeypatch.setattr("sensikernels.hf.trained_flops.SMALL", limit)
    model, batch = make("bert", HEAD), draw(HEAD)
    use_packed(model)
    costs = TrainedFlops.of(model, seen(model, batch))
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert costs.total([query]) == pytest.approx(measure(model, batch, [query]), rel=1e-9)
    together = next(unit for unit in costs.chain() if query in unit.names)
    assert len(together.names) == (3 if limit else 1)


def test_everything_is_what_the_structure_counts() -> None:
    model, batch = make("bert", HEAD, num_hidden_layers=3), draw(HEAD)
    use_packed(model)
    shapes = seen(model, batch)
    structure = structure_of(model).at(shapes)
    whole = trained_flops(model, shapes, names_of(model))
    assert whole == pytest.approx(structure.flops(shapes.mean_length), rel=1e-12)


MODEL = make("roberta", HEAD, num_hidden_layers=3)
use_packed(MODEL)
COSTS = TrainedFlops.of(MODEL, seen(MODEL, draw(HEAD)))
TOP = [name for name in COSTS.depths if name.startswith("classifier.")]


@given(chosen=st.sets(st.sampled_from(range(len(COSTS.chain(above=TOP))))))
def test_a_chain_adds_up_to_the_total(chosen: set[int]) -> None:
    chain = COSTS.chain(above=TOP)
    names = [name for i in chosen for name in chain[i].names]
    spent = sum(chain[i].t_dw for i in chosen)
    spent += sum(unit.t_dy for unit in chain[min(chosen, default=len(chain)) :])
    want = COSTS.total([*TOP, *names])
    assert COSTS.total(TOP) + spent == pytest.approx(want, rel=1e-12)
    whole = sorted(name for unit in chain for name in unit.names)
    assert whole == sorted(set(COSTS.depths) - set(TOP))


def test_half_precision_decides_what_is_one_product() -> None:
    """Three weights of 320² are more than a MiB in float32 alone."""
    model = make("bert", HEAD, hidden_size=320, num_hidden_layers=1, intermediate_size=8)
    use_packed(model, cls_only=False)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    wide = trained_flops(model, Geometry.uniform(9), [query])
    narrow = trained_flops(model.to(torch.bfloat16), Geometry.uniform(9), [query])
    assert 3 * 320**2 * 4 > joined.SMALL >= 3 * 320**2 * 2
    assert narrow - wide == 2 * 2 * 320**2


def test_unknown_and_no_names_are_refused() -> None:
    with pytest.raises(UsageError, match=r"names: expected parameters of the model, got \['x'\]"):
        COSTS.total(["x"])
    with pytest.raises(UsageError, match="names: expected at least one parameter, got none"):
        COSTS.total([])
    low = "roberta.embeddings.word_embeddings.weight"
    with pytest.raises(UsageError, match="above: expected parameters over all others"):
        COSTS.chain(above=[low])
