"""Plans meet their budget, and no plan of the same form scores higher."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sensikernels._core.errors import UsageError
from sensikernels.masks import Budget, Plan, Scores, plan
from tests.masks.conftest import make_scores, make_structure

SMALL = {"neurons": 2, "heads": 1}


def total_score(scores: Scores, made: Plan) -> float:
    return sum(
        float(scores.values[c.name].double()[made.kept_units(c)].sum()) for c in made.couplings
    )


def best_by_enumeration(scores: Scores, budget: float, step: int) -> float:
    """Try every count of every coupling; keep each one's best units."""
    structure, length = scores.structure, scores.sequence_length
    choices = [
        range(1 if c.kind == "heads" else step, c.units + 1, 1 if c.kind == "heads" else step)
        for c in structure.couplings
    ]
    best = float("-inf")
    for counts in product(*choices):
        kept = {c.name: n for c, n in zip(structure.couplings, counts, strict=True)}
        if structure.flops(length, kept) > budget * structure.flops(length) * (1 + 1e-9):
            continue
        value = sum(
            float(scores.values[name].double().sort(descending=True).values[:n].sum())
            for name, n in kept.items()
        )
        best = max(best, value)
    return best


@given(seed=st.integers(0, 1000), share=st.floats(0.35, 1.0))
def test_the_allocation_is_the_optimum(seed: int, share: float) -> None:
    scores = make_scores(make_structure(), seed)
    made = plan(scores, Budget(flops=share), multiples=SMALL, minimums=SMALL)
    assert made.flops_ratio <= share + 1e-9
    assert total_score(scores, made) == pytest.approx(best_by_enumeration(scores, share, 2))


@given(seed=st.integers(0, 1000), share=st.floats(0.4, 1.0))
def test_counts_are_multiples_and_budgets_hold(seed: int, share: float) -> None:
    scores = make_scores(make_structure(layers=3), seed)
    for budget in (
        Budget(flops=share),
        Budget(params=share),
        Budget(flops=share, scope="per_layer"),
    ):
        made = plan(scores, budget, multiples=SMALL, minimums=SMALL)
        ratio = made.params_ratio if budget.params else made.flops_ratio
        assert ratio <= share + 1e-9
        for coupling in made.couplings:
            kept = int(made.kept_units(coupling).sum())
            assert kept >= SMALL[coupling.kind]
            assert kept % SMALL[coupling.kind] == 0
    layer_flops = {
        layer: sum(
            c.flops(10.0) * int(made.kept_units(c).sum())
            for c in made.couplings
            if c.layer == layer
        )
        for layer in range(3)
    }
    assert max(layer_flops.values()) <= share * scores.structure.flops(10.0) / 3


@given(seed=st.integers(0, 1000), share=st.floats(0.75, 1.0))
def test_a_share_of_all_parameters_counts_the_embeddings(seed: int, share: float) -> None:
    structure = replace(make_structure(), embedding_params=1000)
    scores = make_scores(structure, seed)
    made = plan(scores, Budget(params=share, params_scope="model"), multiples=SMALL, minimums=SMALL)
    whole = structure.params() + 1000
    assert made.params_planned + 1000 <= share * whole + 1e-9
    same = (share * whole - 1000) / structure.params()
    other = plan(scores, Budget(params=min(same, 1.0)), multiples=SMALL, minimums=SMALL)
    assert other.kept_counts() == made.kept_counts()


@given(
    seed=st.integers(0, 1000),
    share=st.floats(0.35, 1.0),
    layers=st.integers(1, 4),
    measure=st.sampled_from(["flops", "params"]),
)
def test_tensors_keep_shares_by_their_rank(
    seed: int, share: float, layers: int, measure: str
) -> None:
    scores = make_scores(make_structure(layers, neurons=16), seed)
    budget = Budget(**{measure: max(share, 0.5) if measure == "params" else share})  # type: ignore[arg-type]
    made = plan(scores, budget, multiples=SMALL, minimums=SMALL, allocation="tensors")
    ratio = made.params_ratio if measure == "params" else made.flops_ratio
    assert ratio <= budget.requested + 1e-9  # type: ignore[operator]
    counts = made.kept_counts()
    rank = scores.per_tensor() if measure == "flops" else None
    for coupling in made.couplings:
        kept = made.kept_units(coupling)
        values = scores.values[coupling.name]
        assert counts[coupling.name] >= SMALL[coupling.kind]
        if 0 < counts[coupling.name] < coupling.units:
            assert values[kept].min() >= values[~kept].max()
    for one in made.couplings if rank else ():
        for other in made.couplings:
            if one.kind == other.kind and rank[one.name] > rank[other.name]:
                assert counts[one.name] >= counts[other.name]
    # No coupling could take one more step.
    for coupling in made.couplings:
        if counts[coupling.name] == coupling.units:
            continue
        step = SMALL[coupling.kind]
        cost = coupling.params if measure == "params" else coupling.flops(10.0)
        whole = made.params_dense if measure == "params" else made.flops_dense
        assert ratio + step * cost / whole > budget.requested  # type: ignore[operator]


def test_tensors_need_a_share() -> None:
    scores = make_scores(make_structure())
    with pytest.raises(UsageError, match="^allocation: expected units for a budget of units, got"):
        plan(scores, Budget(units={"heads": 2}), allocation="tensors")
    with pytest.raises(UsageError, match="^allocation: expected one of"):
        plan(scores, Budget(flops=0.5), allocation="layers")


def test_a_share_of_all_parameters_below_the_embeddings_names_the_smallest() -> None:
    scores = make_scores(replace(make_structure(), embedding_params=1000))
    with pytest.raises(UsageError, match=r"budget params: expected at least 0\.\d+") as error:
        plan(scores, Budget(params=0.5, params_scope="model"), multiples=SMALL, minimums=SMALL)
    least = float(str(error.value).split("at least ")[1].split()[0])
    plan(
        scores,
        Budget(params=least + 1e-4, params_scope="model"),
        multiples=SMALL,
        minimums=SMALL,
    )


def test_full_budget_keeps_everything() -> None:
    made = plan(make_scores(make_structure()), Budget(flops=1.0), multiples=SMALL)
    assert all(mask.density == 1 for mask in made.weight_masks.values())
    assert made.flops_ratio == 1


def test_counts_are_met_exactly() -> None:
    scores = make_scores(make_structure())
    made = plan(scores, Budget(units={"heads": 4, "neurons": 10}))
    kept = made.kept_counts()
    assert sum(n for name, n in kept.items() if "heads" in name) == 4
    assert sum(n for name, n in kept.items() if "neurons" in name) == 10
    each = plan(scores, Budget(units={"heads": 2, "neurons": 5}, scope="per_layer")).kept_counts()
    assert set(each.values()) == {2, 5}


def test_ranking_follows_scores_and_reverses() -> None:
    scores = make_scores(make_structure(neurons=16))
    budget = Budget(units={"heads": 6, "neurons": 16})
    kept = plan(scores, budget).kept_counts()
    reverse = plan(scores.reversed(), budget).kept_counts()
    neurons = torch.cat([scores.values["layer.0.neurons"], scores.values["layer.1.neurons"]])
    top = neurons.argsort(descending=True)[:16]
    assert kept["layer.0.neurons"] == int((top < 16).sum())
    assert reverse["layer.0.neurons"] == 16 - kept["layer.0.neurons"]


def test_infeasible_budget_names_the_smallest() -> None:
    scores = make_scores(make_structure())
    with pytest.raises(UsageError, match=r"expected at least 0\.\d+ \(the smallest") as caught:
        plan(scores, Budget(flops=0.05), multiples=SMALL, minimums=SMALL)
    smallest = float(str(caught.value).split("at least ")[1].split(" ")[0])
    made = plan(scores, Budget(flops=smallest + 1e-4), multiples=SMALL, minimums=SMALL)
    assert set(made.kept_counts().values()) == {1, 2}


@pytest.mark.parametrize(
    "budget",
    [
        {"flops": 0.0},
        {"flops": -1.0},
        {"flops": 1.5},
        {"params": 0.0},
        {},
        {"units": {"heads": -1}},
        {"flops": 0.5, "params": 0.5},
        {"flops": 0.5, "scope": "per_tensor"},
        {"params": 0.5, "params_scope": "all"},
        {"flops": 0.5, "params_scope": "model"},
    ],
)
def test_bad_budgets(budget: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="budget"):
        Budget(**budget)  # type: ignore[arg-type]


def test_unknown_kinds() -> None:
    scores = make_scores(make_structure())
    with pytest.raises(UsageError, match="units"):
        plan(scores, Budget(units={"layers": 1}))
    with pytest.raises(UsageError, match="multiples"):
        plan(scores, Budget(flops=0.5), multiples={"layers": 1})
    with pytest.raises(UsageError, match="at most 6"):
        plan(scores, Budget(units={"heads": 7}))
