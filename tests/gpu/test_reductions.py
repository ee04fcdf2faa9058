"""Batched reductions and selections on a GPU: right, repeatable, captured, never waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sensikernels.ops.group_reduce import STATISTICS, GroupTable, group_reduce
from sensikernels.ops.group_reduce import explain as explain_sums
from sensikernels.ops.select_kept import select_elements, select_kept
from sensikernels.ops.select_kept.elements import NEEDS_GRAD, SCORES, explain
from tests.gpu.captures import captured, no_waiting
from tests.ops.group_reduce.cases import assert_sums, every_group
from tests.ops.select_kept.cases import entries

pytestmark = pytest.mark.gpu
SHAPES = [(768, 768), (768,), (3072, 768), (1,), (30, 1001), (200_003,)]
UNITS = 24 * (16 + 4096)


def named(backend: str, explained: Callable[..., Any], *arguments: Any) -> None:
    """Skip where a backend cannot serve on this machine, with its own reason."""
    try:
        explained(*arguments, backend)
    except ValueError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("kind", ["float32", "mixed", "sliced", "transposed", "special"])
def test_every_group_against_float64(kind: str, backend: str):
    weights, grads, groups = every_group(((96, 640), (33, 70), (3, 20_000)), kind)
    weights, grads = ([t.cuda() for t in tensors] for tensors in (weights, grads))
    named(backend, explain_sums, weights, grads)
    got = group_reduce(weights, grads, STATISTICS, groups=groups, backend=backend)
    assert_sums(got.arena, weights, grads, groups)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_reductions_repeat_replay_and_do_not_wait(backend: str):
    weights, grads = ([torch.randn(s, device="cuda") for s in SHAPES] for _ in range(2))
    named(backend, explain_sums, weights, grads)
    table = GroupTable(weights, grads, groups="row")

    def run() -> list[Tensor]:
        return [group_reduce(weights, grads, STATISTICS, table=table, backend=backend).arena]

    first = run()[0].clone()
    with no_waiting():
        again = run()[0]
    assert torch.equal(first, again)
    graph, (out,) = captured(run)
    for grad in grads:
        grad.normal_()
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, run()[0])


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
def test_elements_equal_the_sort(score: str, dtype: torch.dtype, backend: str):
    tensors = [t.cuda() for t in entries(SHAPES, dtype)]
    grads = [t.cuda() for t in entries(SHAPES, torch.float32)] if score in NEEDS_GRAD else None
    named(backend, explain, tensors)
    total = sum(t.numel() for t in tensors)
    each = [t.numel() // 10 for t in tensors]
    for k in (0, 1, total // 10, total - 1, total, each):
        arguments: dict[str, Any] = {"k": k, "score": score}
        arguments["scope"] = "global" if isinstance(k, int) else "per_tensor"
        got = select_elements(tensors, grads, backend=backend, **arguments)
        want = select_elements(tensors, grads, backend="reference", **arguments)
        assert torch.equal(got.arena, want.arena)
        assert torch.equal(got.counts, want.counts)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_elements_replay_with_another_mask_and_do_not_wait(backend: str):
    tensors = [torch.randn(s, device="cuda") for s in SHAPES]
    named(backend, explain, tensors)
    total = sum(t.numel() for t in tensors)

    def run() -> list[Tensor]:
        kept = select_elements(tensors, k=total // 10, score="abs_value", backend=backend)
        return [kept.arena, kept.threshold, kept.counts]

    before = [t.clone() for t in run()]
    with no_waiting():
        assert_equal = run()
    assert all(map(torch.equal, before, assert_equal))
    graph, out = captured(run)
    for t in tensors:
        t.normal_()
    graph.replay()
    assert all(map(torch.equal, out, run()))
    assert not torch.equal(out[0], before[0])


def problem(form: str) -> tuple[Tensor, dict[str, Any]]:
    """Units of a large BERT: 16 heads and 4096 neurons a layer."""
    torch.manual_seed(0)
    sizes = torch.tensor([16, 4096] * 24)
    kinds = (torch.arange(48) % 2).repeat_interleave(sizes)
    segments = torch.arange(48).repeat_interleave(sizes)
    costs = torch.where(kinds == 0, 64 * (8 * 1024 + 512), 4 * 1024).double()
    scores = (torch.rand(UNITS) * 1000).round() / 1000
    arguments: dict[str, Any] = {"segments": segments, "n_segments": 48}
    if form == "count":
        arguments |= {"k": UNITS // 3, "minimum": 2}
    elif form == "multiples":
        arguments |= {"k": UNITS // 3, "multiple": 16}
    elif form == "per segment":
        arguments |= {"k": sizes // 2, "scope": "per_segment"}
    elif form == "two kinds":
        arguments |= {
            "costs": costs,
            "budget": 0.5 * float(costs.sum()),
            "kinds": kinds,
            "minimum": 1,
            "multiple": {0: 1, 1: 16},
        }
    else:
        costs = torch.randint(1, 5000, (48,))[segments].double()
        arguments |= {"costs": costs, "budget": (0.4 * float(costs.sum())) // 1, "multiple": 8}
    return scores, arguments


FORMS = ("count", "multiples", "per segment", "two kinds", "greedy")


@pytest.mark.parametrize("form", FORMS)
def test_units_equal_the_host_replay_and_do_not_wait(form: str):
    scores, arguments = problem(form)
    want = select_kept(scores, **arguments)
    given = {
        name: value.cuda() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    on_device = scores.cuda()

    def run() -> list[Tensor]:
        kept = select_kept(on_device, **given)
        return [kept.bits, kept.indices, kept.counts]

    run()
    with no_waiting():
        got = run()
    for mine, theirs in zip(got, (want.bits, want.indices, want.counts), strict=True):
        assert torch.equal(mine.cpu(), theirs)
    graph, out = captured(run)
    on_device.copy_(scores.flip(0))
    graph.replay()
    other = select_kept(scores.flip(0), **arguments)
    for mine, theirs in zip(out, (other.bits, other.indices, other.counts), strict=True):
        assert torch.equal(mine.cpu(), theirs)
