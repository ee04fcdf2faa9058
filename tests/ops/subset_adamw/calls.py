"""Right calls of AdamW over kept entries, and a step of its optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels import SubsetAdamW
from sensikernels.ops.subset_adamw import subset_adamw
from tests.ops.calls import BACKENDS, Calls, RightCall, Step, function, launcher, operator
from tests.ops.inputs import IN, OUT, floats, ints

SCALES = [f"{name}:{how}" for name in ("grad_scale", "found_inf") for how in ("wider", "deeper")]
# kept: shape of the state, index, number of the kind, block shape
KINDS = {
    "all": ((4, 6), ints(dtype=torch.int32), 0, (0, 0)),
    "rows": ((2, 6), ints(0, 2, dtype=torch.int32), 1, (0, 0)),
    "columns": ((4, 3), ints(0, 2, 5, dtype=torch.int32), 2, (0, 0)),
    "blocks": ((2, 2, 3), ints(0, 3, dtype=torch.int32), 3, (2, 3)),
    "elements": ((5,), torch.tensor([0b1010001, 0b1, 0b1], dtype=torch.uint8), 4, (0, 0)),
}


def operators() -> Iterator[RightCall]:
    for name, (shape, index, kind, block) in KINDS.items():
        state = torch.zeros(shape)
        masters = ["masters:none", "masters:shorter", "masters:0-empty"]
        accepts = ["grads:0-wider", "hyper:longer", "steps:0-deeper", *masters, *SCALES]
        if kind == 0:
            accepts += ["kept", "kinds:0-huge"]
        if kind != 3:
            accepts += [f"blocks:{i}-{how}" for i in range(2) for how in ("negative", "huge")]
        of_index = {"indices": ["kept"], "ascending": ["kept"]} if kind in (1, 2, 3) else {}
        yield operator(
            "subset_adamw",
            f"subset_adamw/{name}",
            params=[floats(4, 6)],
            grads=[floats(4, 6)],
            exp_avgs=[state],
            exp_avg_sqs=[state],
            masters=[state.clone()],
            steps=[torch.tensor(0.0)],
            kept=[index],
            kinds=[kind],
            blocks=list(block),
            hyper=torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.01]], dtype=torch.float64),
            max_grad_norm=1.0,
            grad_scale=torch.tensor(2.0),
            found_inf=torch.tensor(0.0),
            masked=False,
            backend="native",
            accepts=accepts,
            **of_index,
        )


def functions() -> Iterator[RightCall]:
    def run(index: Tensor, backend: str, **named: Any) -> Tensor:
        lists = {k: [v] for k, v in named.items() if k.endswith("s") and isinstance(v, Tensor)}
        return subset_adamw(**{**named, **lists}, kept=[("rows", index)], backend=backend)

    for backend in BACKENDS:
        yield function(
            f"subset_adamw/{backend}",
            run,
            accepts=["grads:wider", "steps:deeper", "masters:empty", *SCALES],
            indices=["index"],
            ascending=["index"],
            index=ints(0, 2, dtype=torch.int32),
            params=floats(4, 6),
            grads=floats(4, 6),
            **{name: torch.zeros(2, 6) for name in ("exp_avgs", "exp_avg_sqs", "masters")},
            steps=torch.tensor(0.0),
            lr=1e-3,
            eps=1e-8,
            weight_decay=0.01,
            max_grad_norm=1.0,
            grad_scale=torch.tensor(2.0),
            found_inf=torch.tensor(0.0),
            mode="hard_freeze",
            backend=backend,
        )


def launchers() -> Iterator[RightCall]:
    yield launcher("subset_adamw_coalesce", rows=ints(0, 3, 1), values=floats(3, 4))


def step(backend: str, device: str) -> list[Tensor]:
    param = nn.Parameter(torch.randn(OUT, IN, device=device))
    optimizer = SubsetAdamW([param], lr=1e-2, backend=backend, max_grad_norm=1.0)
    optimizer.set_kept(param, ("rows", torch.tensor([0, 5, 90], dtype=torch.int32, device=device)))
    for _ in range(2):
        param.grad = torch.randn(OUT, IN, device=device)
        optimizer.step()
    return [param.detach()]


CALLS = Calls(
    operators=operators,
    functions=functions,
    launchers=launchers,
    by_address=("subset_adamw_step",),
    steps=(Step("subset_adamw", step, native=("cpu", "cuda"), triton=()),),
)
