"""``torch.ops.sensikernels.subset_adamw``: one in-place step over lists of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sensikernels.ops.subset_adamw.checks import check_counted, check_numbers, check_step
from sensikernels.ops.subset_adamw.engine import Engine
from sensikernels.ops.subset_adamw.item import Item
from sensikernels.ops.subset_adamw.kept import KINDS, KeptLayout, popcounts

_LIBRARY: Any = torch.library.Library("sensikernels", "FRAGMENT")
_LIBRARY.define(
    "subset_adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, Tensor(e!)[] steps, Tensor[] kept, "
    "int[] kinds, int[] blocks, Tensor hyper, *, float? max_grad_norm=None, "
    'Tensor? grad_scale=None, Tensor? found_inf=None, bool masked=False, str backend="auto") '
    "-> Tensor"
)


def _layout(
    shape: torch.Size, kind: int, index: Tensor, block: list[int], count: int, place: int | None
) -> KeptLayout:
    """A layout of what ``check_step`` found sound; ``place``: whose state has ``count`` entries."""
    name, offsets = KINDS[kind], None
    if name == "elements":
        counts = popcounts(index, shape.numel())
        if place is not None:
            check_counted(counts, place, count)
        offsets = counts.cumsum(0) - counts
    units = index.numel() if name in ("rows", "columns", "blocks") else count
    return KeptLayout(
        kind=name,
        shape=shape,
        index=None if name == "all" else index.contiguous(),
        block_shape=(block[0], block[1]),
        offsets=offsets,
        count=count,
        units=units,
        room=units,
    )


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    kept: list[Tensor],
    kinds: list[int],
    blocks: list[int],
    hyper: Tensor,
    *,
    max_grad_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masked: bool = False,
    backend: str = "auto",
) -> Tensor:
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
    choices = (steps, kept, kinds, blocks)
    check_step(params, grads, states, *choices, masked=masked, backend=backend)
    check_numbers(hyper, max_grad_norm, grad_scale, found_inf, params[0].device)
    items = []
    for i, param in enumerate(params):
        dense = param if param.is_contiguous() else param.contiguous()
        items.append(
            Item(
                param=dense,
                home=None if dense is param else param,
                grad=grads[i],
                exp_avg=exp_avgs[i],
                exp_avg_sq=exp_avg_sqs[i],
                master=masters[i] if masters and masters[i].numel() else None,
                step=steps[i],
                layout=_layout(
                    param.shape,
                    kinds[i],
                    kept[i],
                    blocks[2 * i : 2 * i + 2],
                    exp_avgs[i].numel(),
                    None if masked else i,
                ),
                masked=masked and kinds[i] != 0,
            )
        )
    return Engine(backend).update(
        items,
        hyper.contiguous(),
        max_grad_norm=max_grad_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def _fake(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    steps: list[Tensor],
    kept: list[Tensor],
    kinds: list[int],
    blocks: list[int],
    hyper: Tensor,
    *,
    max_grad_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masked: bool = False,
    backend: str = "auto",
) -> Tensor:
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
    choices = (steps, kept, kinds, blocks)
    check_step(params, grads, states, *choices, masked=masked, backend=backend)
    check_numbers(hyper, max_grad_norm, grad_scale, found_inf, params[0].device)
    return hyper.new_empty((), dtype=torch.float32)


_LIBRARY.impl("subset_adamw", _step, "CPU")
_LIBRARY.impl("subset_adamw", _step, "CUDA")
torch.library.register_fake("sensikernels::subset_adamw", _fake, lib=_LIBRARY)
