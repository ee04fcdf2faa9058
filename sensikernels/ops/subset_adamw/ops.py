"""The operator ``subset_adamw``: one in-place step over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sensikernels.ops.subset_adamw.checks import Lists, check_counted, check_numbers, check_step
from sensikernels.ops.subset_adamw.engine import Engine
from sensikernels.ops.subset_adamw.item import Item, Scaling
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


class _Options(NamedTuple):
    """The operator's keyword arguments."""

    max_grad_norm: float | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    masked: bool = False
    backend: str = "auto"


def _checked(*lists: Any, **options: Any) -> tuple[Lists, Scaling, _Options]:
    call, given = Lists(*lists), _Options(**options)
    scaling = Scaling(*given[:3])
    check_step(call, masked=given.masked, backend=given.backend)
    check_numbers(call.hyper, scaling, call.params[0].device)
    return call, scaling, given


def _step(*lists: Any, **options: Any) -> Tensor:
    call, scaling, given = _checked(*lists, **options)
    masters: Sequence[Tensor | None] = call.masters or [None] * len(call.params)
    items = []
    for i, (param, master) in enumerate(zip(call.params, masters, strict=True)):
        dense = param if param.is_contiguous() else param.contiguous()
        kind, block, count = call.kinds[i], call.blocks[2 * i : 2 * i + 2], call.exp_avgs[i].numel()
        place = None if given.masked else i
        items.append(
            Item(
                param=dense,
                home=None if dense is param else param,
                grad=call.grads[i],
                exp_avg=call.exp_avgs[i],
                exp_avg_sq=call.exp_avg_sqs[i],
                master=None if master is None or not master.numel() else master,
                step=call.steps[i],
                layout=_layout(param.shape, kind, call.kept[i], block, count, place),
                masked=given.masked and kind != 0,
            )
        )
    return Engine(given.backend).update(items, call.hyper.contiguous(), scaling)


def _fake(*lists: Any, **options: Any) -> Tensor:
    call, _, _ = _checked(*lists, **options)
    return call.hyper.new_empty((), dtype=torch.float32)


_LIBRARY.impl("subset_adamw", _step, "CPU")
_LIBRARY.impl("subset_adamw", _step, "CUDA")
torch.library.register_fake("sensikernels::subset_adamw", _fake, lib=_LIBRARY)
