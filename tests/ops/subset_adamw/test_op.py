"""The functional op: schema, fake, errors; and the work table of sizes no test can allocate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sensikernels._core.errors import UsageError
from sensikernels.ops.subset_adamw import explain, native, subset_adamw
from sensikernels.ops.subset_adamw.kept import make_layout
from sensikernels.optim import SubsetAdamW
from tests.ops.subset_adamw.cases import BACKENDS, KINDS, kept_of, same_bits

SHAPES = ((6, 40), (33,), (24, 35))


def arguments(kind: str, mode: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    params = [torch.randn(s).to(dtype) for s in SHAPES]
    kept = [kept_of(kind, s, i) for i, s in enumerate(SHAPES)]
    layouts = [make_layout(p.shape, how, p) for p, how in zip(params, kept, strict=True)]
    state = [
        torch.zeros(p.shape if mode == "as_published" else at.state_shape)
        for p, at in zip(params, layouts, strict=True)
    ]
    return {
        "params": params,
        "grads": [torch.randn(s).to(dtype) for s in SHAPES],
        "exp_avgs": state,
        "exp_avg_sqs": [s.clone() for s in state],
        "steps": [torch.zeros(()) for _ in params],
        "kept": kept,
        "mode": mode,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["hard_freeze", "as_published"])
def test_the_op_is_the_optimizer_step(backend: str, kind: str, mode: str) -> None:
    given = arguments(kind, mode)
    params = [nn.Parameter(p.clone()) for p in given["params"]]
    optimizer = SubsetAdamW(params, lr=0.1, max_grad_norm=0.5, mode=mode, backend=backend)
    for param, grad, kept in zip(params, given["grads"], given["kept"], strict=True):
        optimizer.set_kept(param, kept)
        param.grad = grad
    for _ in range(2):
        optimizer.step()
        norm = subset_adamw(**given, lr=torch.tensor(0.1), max_grad_norm=0.5, backend=backend)
    assert optimizer.grad_norm is not None
    assert same_bits(norm, optimizer.grad_norm)
    for i, param in enumerate(params):
        state = optimizer.state[param]
        assert same_bits(param.detach(), given["params"][i])
        assert same_bits(state["exp_avg_sq"], given["exp_avg_sqs"][i])
        assert given["steps"][i] == 2


def raw_arguments() -> tuple[Any, ...]:
    given = arguments("rows", "hard_freeze", torch.bfloat16)
    kept = [how[1] for how in given["kept"]]
    masters = [p[k.long()].float() for p, k in zip(given["params"], kept, strict=True)]
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    hyper = torch.tensor([[0.1, 0.9, 0.999, 1e-8, 0.01]], dtype=torch.float64)
    lists = (given[name] for name in names)
    return (*lists, masters, given["steps"], kept, [1, 1, 1], [0] * 6, hyper)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "grad_scale": torch.ones(1)}])
def test_opcheck(options: dict[str, Any]) -> None:
    checks = ("test_schema", "test_faketensor")
    op = torch.ops.sensikernels.subset_adamw.default
    torch.library.opcheck(op, raw_arguments(), options, test_utils=checks)


def test_compiled_without_a_graph_break() -> None:
    def step(*args: Any) -> Tensor:
        norm: Tensor = torch.ops.sensikernels.subset_adamw(*args, max_grad_norm=0.5)
        return norm * 2

    eager, compiled = raw_arguments(), raw_arguments()
    expected = step(*eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(compiled[0], eager[0], strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"params": []}, "params: expected at least one tensor, got 0"),
        ({"grads": []}, "grads: expected 3 entries, got 0"),
        ({"mode": "soft"}, "mode: expected one of"),
        ({"backend": "triton"}, "backend: expected one of auto, native, reference"),
        ({"exp_avgs": [torch.zeros(1)] * 3}, r"exp_avgs\[0\]: expected contiguous torch.float32"),
        ({"steps": [torch.zeros((), dtype=torch.int64)] * 3}, r"steps\[0\]: expected a float32"),
        ({"grads": [torch.zeros(2)] * 3}, r"grads\[0\]: expected dense \[6, 40\], got \[2\]"),
        ({"kept": [("rows", torch.zeros(2))] * 3}, r"kept\[1\]: expected int32"),
    ],
)
def test_errors_come_before_any_change(change: dict[str, Any], words: str) -> None:
    given = arguments("rows", "hard_freeze")
    before = [p.clone() for p in given["params"]]
    with pytest.raises(UsageError, match=words):
        subset_adamw(**{**given, **change})
    assert all(map(same_bits, before, given["params"]))


def test_explain_names_the_backend_and_why() -> None:
    assert str(explain([torch.zeros(2)], backend="reference")) == "reference (asked for by name)"
    said = str(explain([torch.zeros(2, dtype=torch.float64)]))
    assert said.startswith("reference (native: parameters of torch.float64")


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("kind", range(7))
def test_chunks_cover_sizes_beyond_32_bits_once(kind: int, summed: bool) -> None:
    rows, columns, units = 3_000_000, 4096, 1_000_000
    table = np.zeros((2, len(native.FIELDS)), dtype=np.int64)
    facts = {
        "kind": kind,
        "rows": rows,
        "columns": columns,
        "units": units,
        "block_rows": 4,
        "block_columns": 64,
        "sum_abs": int(summed),
    }
    for name, value in facts.items():
        table[1, native.FIELDS.index(name)] = value
    chunks = native._chunks(table, 1 << 20)
    assert (chunks[:, 0] == 1).all()
    assert (chunks[1:, 1] == chunks[:-1, 2]).all()
    assert (chunks[:, 2] > chunks[:, 1]).all()
    bits, whole = kind in (4, 5), summed
    last = {0: rows if whole else rows * columns, 2: rows, 3: rows // 4 if whole else units}
    expected = (rows if whole else rows * columns // 4096) if bits else last.get(kind, units)
    assert chunks[0, 1] == 0
    assert chunks[-1, 2] == expected
