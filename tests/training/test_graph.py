"""``GraphedStep``: the eager path, and what is captured when, with graphs acted out on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sensikernels import Mask, MaskedLinear
from sensikernels.optim import SubsetAdamW
from sensikernels.training import finetune
from sensikernels.training.graph import GraphedStep, fingerprint
from sensikernels.training.loop import prepare
from sensikernels.training.runner import Runner
from tests.graph_replay import acted_graphs  # noqa: F401

Batch = dict[str, Tensor]


def rows_of(*kept: int) -> Mask:
    return Mask.rows(torch.tensor([row in kept for row in range(8)]), (8, 6))


class Net(nn.Module):
    """Two layers, the first without two of its rows, and a mask in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.middle = MaskedLinear.from_linear(nn.Linear(6, 8), rows_of(0, 1, 3, 4, 5, 7))
        self.register_buffer("mask", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) + self.middle(x)) * self.mask)


def loss_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda batch: nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def batches(count: int, *sizes: int) -> list[Batch]:
    made = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(n, 6, generator=made), "y": torch.randint(0, 3, (n,), generator=made)}
        for _ in range(count)
        for n in sizes or (5,)
    ]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return SubsetAdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    loss = loss_of(model)(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def test_on_a_cpu_it_is_eager_and_says_why():
    model = Net()
    twin = copy.deepcopy(model)
    optimizer, other = adamw(model), adamw(twin)
    step = GraphedStep(model, optimizer, loss_of(model))
    assert step.explain() == "step: eager (CUDA graphs need a CUDA device, the model is on cpu)"
    for batch in batches(4):
        assert torch.equal(step(batch), plain(twin, other, batch))
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, its)
        assert mine.grad is None


@pytest.mark.usefixtures("acted_graphs")
def test_every_call_is_one_step_whatever_it_does_inside():
    """Two shapes, a rate that changes, a mask written in place: weights as of a plain loop."""
    model = Net()
    twin = copy.deepcopy(model)
    optimizer, other = adamw(model), adamw(twin)
    step = GraphedStep(model, optimizer, loss_of(model))
    for turn, batch in enumerate(batches(7, 5, 9)):
        for own in (optimizer, other):
            own.param_groups[0]["lr"] = 1e-2 / (1 + turn)
        if turn == 9:
            for net in (model, twin):
                net.mask[:3] = 0
        assert torch.allclose(step(batch), plain(twin, other, batch), atol=1e-6)
    assert step.explain() == "step: CUDA graphs (2 batch shapes captured)"
    assert [made.tail.replays for made in step._graphs.values()] == [5, 5]
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("acted_graphs")
@pytest.mark.parametrize("change", ["kept", "layer", "layout", "decay", "eval"])
def test_what_is_not_in_place_is_captured_anew(change: str):
    model = Net()
    optimizer = adamw(model)
    step = GraphedStep(model, optimizer, loss_of(model))
    for batch in batches(3):
        step(batch)
    (before,) = step._graphs.values()
    if change == "kept":
        kept = ("rows", torch.tensor([0, 2], dtype=torch.int32))
        optimizer.set_kept(model.first.weight, kept)
    elif change == "layer":
        model.mask = torch.zeros(8)
    elif change == "layout":
        other = MaskedLinear.from_linear(nn.Linear(6, 8), rows_of(0, 2, 3, 4, 5, 6))
        model.middle.mask, model.middle.layout = other.mask, other.layout
    elif change == "decay":
        optimizer.param_groups[0]["weight_decay"] = 0.5
    else:
        model.eval()
    frozen = model.first.weight[1].detach().clone()
    for batch in batches(3):
        step(batch)
    (after,) = step._graphs.values()
    assert after is not before
    assert before.tail.replays == 1
    assert torch.equal(model.first.weight[1], frozen) == (change == "kept")


@pytest.mark.usefixtures("acted_graphs")
@pytest.mark.parametrize("part", ["forward", "update"])
def test_a_failed_capture_loses_no_step(part: str, monkeypatch: pytest.MonkeyPatch):
    model = Net()
    twin = copy.deepcopy(model)
    optimizer, other = adamw(model), adamw(twin)
    step = GraphedStep(model, optimizer, loss_of(model))
    real, calls = torch.cuda.graph, []

    def graph(*words: object, **named: object) -> object:
        calls.append(words)
        if len(calls) == (1 if part == "forward" else 2):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return real(*words, **named)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    for batch in batches(5):
        assert torch.allclose(step(batch), plain(twin, other, batch), atol=1e-6)
    assert step.reason == "capture failed: operation not permitted when stream is capturing"
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("acted_graphs")
def test_shapes_beyond_the_limit_run_eagerly():
    model = Net()
    step = GraphedStep(model, adamw(model), loss_of(model), max_graphs=1)
    for batch in batches(4, 5, 9):
        step(batch)
    assert len(step._graphs) == 1


def test_writing_in_place_moves_nothing():
    model = Net()
    optimizer = adamw(model)
    plain(model, optimizer, batches(1)[0])
    before = fingerprint(model, optimizer)
    plain(model, optimizer, batches(1)[0])
    model.mask.zero_()
    assert fingerprint(model, optimizer) == before


@pytest.mark.usefixtures("acted_graphs")
@pytest.mark.parametrize("method", ["dense", "sensi-bert", "bitfit"])
def test_a_run_captures_its_steps(settings, still, tmp_path, monkeypatch, method):
    # One shape of batch: its third step is the first replay.
    common = {
        "model": str(still),
        "method": method,
        "embeddings": "dense",
        "epochs": 2,
        "packed": False,
        "pad_to_multiple": 32,
    }
    wanted = finetune(settings(**common, output=tmp_path / "eager"))
    made: list[GraphedStep] = []

    def graphs(runner: Runner) -> GraphedStep:
        made.append(GraphedStep(runner.run.model, runner.run.optimizer))
        return made[-1]

    monkeypatch.setattr(Runner, "_graphs", graphs)
    report = finetune(settings(**common, output=tmp_path / "captured"))
    assert len(made) == (2 if method == "sensi-bert" else 1)  # anew once the layers are cut
    assert made[-1].explain().startswith("step: CUDA graphs")
    assert sum(one.tail.replays for one in made[-1]._graphs.values()) > 0
    assert report["losses"]["planned"] == pytest.approx(wanted["losses"]["planned"], rel=1e-4)


def test_a_run_without_graphs_says_why(settings):
    def reason(method: str, **options: object) -> str | None:
        return prepare(settings(method=method, options=options)).runner._needs_eager()

    assert reason("bitfit") is reason("freeze", share=0.5) is None
    assert reason("dps") == "dps looks at the gradients"
    assert reason("freeze", cache=True) == "token ids are read for the kept prefix"
    compared = prepare(settings(compare_dense=True)).dense
    assert compared._needs_eager() == "AdamW is torch's, clipped outside"
