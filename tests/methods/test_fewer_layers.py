"""A smaller dense model: which layers stay, what they cost, and that nothing else changed."""

from __future__ import annotations

import pytest
import torch

from sensikernels._core.errors import UsageError
from sensikernels.hf import encoder_layers, structure_of
from sensikernels.hf.depth import keep_lowest
from sensikernels.masks import Budget, Geometry
from sensikernels.methods import METHODS, Run
from sensikernels.methods.fewer_layers import FewerLayers
from sensikernels.optim import SubsetAdamW
from tests.hf.conftest import make_batch, make_model
from tests.hf.families import DIFFERENCES, draw, make

LAYERS = 6


def make_run(budget: Budget, model: torch.nn.Module) -> Run:
    return Run(
        model=model,
        optimizer=SubsetAdamW(model.parameters(), lr=1e-2),
        max_steps=10,
        batches=lambda: [],
        geometry=Geometry.uniform(9),
        budget=budget,
    )


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("measure", ["flops", "params"])
def test_the_number_of_layers_is_nearest_to_the_budget(share: float, measure: str) -> None:
    run = make_run(Budget(**{measure: share}), make_model(num_hidden_layers=LAYERS))
    FewerLayers().begin(run)
    assert run.plan is not None
    kept = len(encoder_layers(run.model))
    others = {}
    for depth in range(1, LAYERS + 1):
        small = structure_of(make_model(num_hidden_layers=depth)).at(run.geometry)
        whole = structure_of(make_model(num_hidden_layers=LAYERS)).at(run.geometry)
        flops = small.flops(9) / whole.flops(9)
        others[depth] = flops if measure == "flops" else small.params() / whole.params()
    assert kept == min(others, key=lambda depth: abs(others[depth] - share))
    ratio = run.plan.flops_ratio if measure == "flops" else run.plan.params_ratio
    assert ratio == pytest.approx(others[kept], rel=1e-9)


@pytest.mark.parametrize("kind", sorted(DIFFERENCES))
def test_the_lowest_layers_alone_in_every_family(kind: str) -> None:
    model = make(kind, "ForSequenceClassification").eval()
    batch = draw("ForSequenceClassification", kind)
    root = encoder_layers(model)[0].prefix.rpartition(".")[0]
    wanted = {n: p.clone() for n, p in model.state_dict().items() if f"{root}.1." not in n}
    optimizer = SubsetAdamW(model.parameters(), lr=1e-2)
    keep_lowest(model, 1, optimizer=optimizer)
    now = model.state_dict()
    assert now.keys() == {n for n in wanted if not n.startswith(f"{root}.1.")} & now.keys()
    assert all(torch.equal(now[name], wanted[name]) for name in now)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    again = type(model)(model.config).eval()
    again.load_state_dict(now)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_training_goes_on_and_a_fixed_number_stays() -> None:
    run = make_run(Budget(flops=0.5), make_model(num_hidden_layers=3))
    FewerLayers(layers="2").begin(run)
    assert len(encoder_layers(run.model)) == 2
    before = [p.detach().clone() for p in run.model.parameters()]
    run.model(**make_batch()).loss.backward()
    run.optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="^layers: expected a number above 0, or nearest, got 0"):
        METHODS["fewer-layers"](layers="0")
    run = make_run(Budget(flops=0.5), make_model(num_hidden_layers=2))
    with pytest.raises(UsageError, match="^layers: expected at most 2, got 3"):
        FewerLayers(layers="3").begin(run)
    units = make_run(Budget(units={"heads": 1}), make_model())
    with pytest.raises(UsageError, match="^budget: expected one of FLOPs or parameters, got units"):
        FewerLayers().begin(units)
    with pytest.raises(UsageError, match="^depth: expected 1 to 2 layers, got 0"):
        keep_lowest(make_model(num_hidden_layers=2), 0)
