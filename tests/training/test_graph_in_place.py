"""Changes that a captured step follows: row-sparse words, and other kept entries in place.

Graphs are acted out on the CPU, and the update's CUDA kernels run there (``device_kernels``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sensikernels._core.bits import pack_bits
from sensikernels.ops.embed_norm import embed_norm
from sensikernels.optim import SubsetAdamW
from sensikernels.training.graph import GraphedStep, fingerprint
from tests.device_kernels import _library, device_kernels  # noqa: F401
from tests.graph_replay import acted_graphs  # noqa: F401

Batch = dict[str, Tensor]
WORDS, WIDE = 40, 136
pytestmark = pytest.mark.usefixtures("device_kernels", "acted_graphs")


class Words(nn.Module):
    """A row-sparse table, by torch's embedding or inside ``embed_norm``, and a head."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.table = nn.Embedding(WORDS, WIDE, sparse=True)
        self.places, self.types = nn.Embedding(16, WIDE), nn.Embedding(2, WIDE)
        self.norm, self.head = nn.LayerNorm(WIDE), nn.Linear(WIDE, 2)

    def forward(self, ids: Tensor) -> Tensor:
        if not self.fused:
            return self.head(self.norm(self.table(ids)).tanh())
        places = torch.arange(ids.shape[-1]).expand_as(ids)
        tables = (self.table.weight, self.places.weight, self.types.weight)
        hidden = embed_norm(
            ids, places, ids * 0, *tables, self.norm.weight, self.norm.bias, sparse=True
        )
        return self.head(hidden.tanh())


def loss_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda batch: nn.functional.cross_entropy(
        model(batch["ids"]).flatten(0, 1), batch["labels"].flatten()
    )


def batches(count: int, *lengths: int) -> list[Batch]:
    """Few words, most of them repeated, others never seen."""
    made = torch.Generator().manual_seed(4)
    return [
        {
            "ids": torch.randint(0, WORDS // 2, (3, n), generator=made) // 2 * 2,
            "labels": torch.randint(0, 2, (3, n), generator=made),
        }
        for _ in range(count)
        for n in lengths
    ]


def pair(model: nn.Module, **options: Any) -> list[tuple[nn.Module, SubsetAdamW, GraphedStep]]:
    """The model with captured steps, and a copy of it with eager ones by the definition."""
    made = []
    for net, backend in ((model, "native"), (copy.deepcopy(model), "reference")):
        optimizer = SubsetAdamW(net.parameters(), lr=1e-2, backend=backend, **options)
        made.append((net, optimizer, GraphedStep(net, optimizer, loss_of(net))))
    made[1][2].reason = "the comparison"
    return made


@pytest.mark.parametrize("fused", [True, False], ids=["embed_norm", "embedding"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_sparse_words_are_captured(fused: bool, clip: float | None):
    torch.manual_seed(0)
    options = {"max_grad_norm": clip, "weight_decay": 0.3}
    (model, optimizer, step), (twin, other, plain) = pair(Words(fused), **options)
    for turn, batch in enumerate(batches(10, 5, 9)):
        for own in (optimizer, other):
            own.param_groups[0]["lr"] = 1e-2 / (1 + turn)
        torch.testing.assert_close(step(batch), plain(batch), rtol=1e-5, atol=1e-6)
        assert model.table.weight.grad is None
    assert step.explain() == "step: CUDA graphs (2 batch shapes captured)"
    assert [made.tail.replays for made in step._graphs.values()] == [8, 8]
    for own in (optimizer, other):
        own.flush()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=2e-6)
    for name in ("exp_avg", "exp_avg_sq", "clock", "row_clock"):
        mine, its = optimizer.state[model.table.weight], other.state[twin.table.weight]
        torch.testing.assert_close(mine[name], its[name], rtol=1e-5, atol=1e-7)


def test_replays_of_sparse_words_repeat_to_the_bit():
    torch.manual_seed(0)
    model, ends = Words(True), []
    for _ in range(2):
        net = copy.deepcopy(model)
        optimizer = SubsetAdamW(net.parameters(), lr=1e-2, max_grad_norm=0.1, backend="native")
        step = GraphedStep(net, optimizer, loss_of(net))
        for batch in batches(5, 7):
            step(batch)
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(map(torch.equal, *ends))


def test_a_table_made_dense_is_captured_anew():
    model = Words(False)
    optimizer = SubsetAdamW(model.parameters(), backend="native")
    step = GraphedStep(model, optimizer, loss_of(model))
    for batch in batches(3, 5):
        step(batch)
    (before,) = step._graphs.values()
    model.table.sparse = False
    for batch in batches(3, 5):
        step(batch)
    (after,) = step._graphs.values()
    assert after is not before
    assert step.reason is None


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def choice(kind: str, seed: int, count: int) -> tuple[Any, ...]:
    """``count`` units of the first layer's weight, [32, 12]."""
    units = {"rows": 32, "columns": 12, "blocks": 24, "elements": 384}[kind]
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    kept = order[:count].sort().values.int()
    if kind == "elements":
        flags = torch.zeros(units, dtype=torch.bool)
        flags[kept.long()] = True
        return kind, pack_bits(flags)
    return (kind, kept, (4, 4)) if kind == "blocks" else (kind, kept)


def vectors(count: int) -> list[Batch]:
    made = torch.Generator().manual_seed(6)
    return [
        {
            "ids": torch.randn(1, 6, 12, generator=made),
            "labels": torch.randint(0, 2, (1, 6), generator=made),
        }
        for _ in range(count)
    ]


COUNTS = {
    "rows": (9, 9, 5, 9, 1, 8),
    "blocks": (7, 7, 3, 7, 0, 6),
    "columns": (5,) * 6,
    "elements": (100, 100, 31, 100, 0, 99),
}


@pytest.mark.parametrize("mode", ["hard_freeze", "as_published"])
@pytest.mark.parametrize(
    ("kind", "capacity"),
    [*((kind, False) for kind in COUNTS), *((kind, True) for kind in COUNTS if kind != "columns")],
)
def test_other_kept_entries_need_no_capture(kind: str, mode: str, capacity: bool):
    """Five changes, the first one included, the same count and fewer: one graph, the definition's
    numbers; with a capacity also more, and all."""
    torch.manual_seed(0)
    room = {"rows": 32, "blocks": 24, "elements": 384}[kind] if capacity else None
    (model, optimizer, step), (twin, other, plain) = pair(
        Plain(), mode=mode, max_grad_norm=0.5, weight_decay=0.3
    )
    weights = (model.first.weight, twin.first.weight)
    counts = (*COUNTS[kind], COUNTS[kind][0] + 5) if capacity else COUNTS[kind]
    seen: list[Any] = []
    for seed, count in enumerate(counts):
        for own, weight in zip((optimizer, other), weights, strict=True):
            first = room if seed == 0 else None
            own.set_kept(weight, choice(kind, seed, count), capacity=first)
        frozen = ~optimizer._layout(weights[0]).flags()
        before = weights[0].detach().clone()
        for batch in vectors(3):
            torch.testing.assert_close(step(batch), plain(batch), rtol=1e-5, atol=1e-6)
        if mode == "hard_freeze":
            assert torch.equal(weights[0][frozen], before[frozen])
        (captured,) = step._graphs.values()
        seen.append((fingerprint(model, optimizer), captured))
    assert all(found == seen[0] for found in seen)
    if capacity:
        for own, weight in zip((optimizer, other), weights, strict=True):
            own.set_kept(weight, None)
        torch.testing.assert_close(step(batch), plain(batch), rtol=1e-5, atol=1e-6)
        assert fingerprint(model, optimizer) == seen[0][0]
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", COUNTS)
def test_moments_are_those_of_an_optimizer_made_for_the_choice(kind: str):
    """Entries that stay keep their moments; those that join start from zero, corrected alone."""
    torch.manual_seed(0)
    model = Plain()
    optimizer = SubsetAdamW(model.parameters(), lr=1e-2, backend="native")
    weight, count = model.first.weight, COUNTS[kind][0]
    optimizer.set_kept(weight, choice(kind, 0, count))
    step = GraphedStep(model, optimizer, loss_of(model))
    for batch in vectors(4):
        step(batch)
    old = optimizer._layout(weight)
    kept = {n: torch.zeros(weight.shape) for n in ("exp_avg", "exp_avg_sq")}
    for name, full in kept.items():
        old.scatter_(full, old.live(optimizer.state[weight][name]))
    stayed = old.flags()
    optimizer.set_kept(weight, choice(kind, 1, count))

    twin = copy.deepcopy(model)
    fresh = SubsetAdamW(twin.parameters(), lr=1e-2, backend="reference")
    fresh.set_kept(twin.first.weight, choice(kind, 1, count))
    layout = fresh._layout(twin.first.weight)
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        held = {n: t.clone() for n, t in optimizer.state[mine].items() if isinstance(t, Tensor)}
        if mine is weight:
            held |= {name: layout.gather(full) for name, full in kept.items()}
            held["cohort"] = layout.gather(~stayed).to(torch.uint8)
            held["cohort_start"] = torch.tensor([0.0, 4.0])
            held["kept"] = fresh.state[its]["kept"]
        fresh.state[its].update(held)
    plain = GraphedStep(twin, fresh, loss_of(twin))
    plain.reason = "the comparison"
    for batch in vectors(6)[4:]:
        torch.testing.assert_close(step(batch), plain(batch), rtol=1e-5, atol=1e-6)
    (captured,) = step._graphs.values()
    assert captured.tail.replays == 4
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=2e-6)
