"""Checks of one step's tensors, by hand or through ``subset_adamw``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sensikernels._core.checks import expected, require
from sensikernels._core.values import readable, require_within
from sensikernels.ops.common.checks import check_count, check_tensor, described
from sensikernels.ops.subset_adamw.engine import choice
from sensikernels.ops.subset_adamw.item import Scaling
from sensikernels.ops.subset_adamw.kept import KINDS, matrix_shape, unit_count


def check_lists(params: Sequence[Tensor], lists: Mapping[str, Sequence[object]]) -> None:
    """There is something to update, and one entry of everything for each parameter."""
    require(len(params) > 0, "params", "at least one tensor", 0)
    for name, values in lists.items():
        check_count(values, name, len(params))


class Lists(NamedTuple):
    """The operator's lists, an entry per parameter (``blocks``: two), and the rates."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    masters: list[Tensor]
    steps: list[Tensor]
    kept: list[Tensor]
    kinds: list[int]
    blocks: list[int]
    hyper: Tensor


def check_step(call: Lists, *, masked: bool, backend: str) -> None:
    """Each parameter beside its gradient, state, step and kept units."""
    params, grads, _, _, masters, steps, kept, kinds, blocks, _ = call
    states = {"exp_avgs": call.exp_avgs, "exp_avg_sqs": call.exp_avg_sqs, "masters": masters}
    lists = {"grads": grads, "steps": steps, "kept": kept, **states, "masters": masters or params}
    check_lists(params, {**lists, "kinds": kinds})
    check_count(blocks, "blocks", 2 * len(params))
    device = params[0].device
    for i, param in enumerate(params):
        check_tensor(param, f"params[{i}]", param.shape, None, device)
        if not param.is_contiguous() and _overlaps(param):
            raise expected(f"params[{i}]", "entries with memory of their own", "an expanded one")
        if grads[i].shape != param.shape or grads[i].layout != torch.strided:
            got = list(grads[i].shape) if grads[i].layout == torch.strided else grads[i].layout
            raise expected(f"grads[{i}]", f"dense {list(param.shape)}", got)
        check_tensor(grads[i], f"grads[{i}]", param.shape, None, device)
        own = {name: tensors[i] for name, tensors in states.items() if tensors}
        count = own["exp_avgs"].numel()
        block = (blocks[2 * i], blocks[2 * i + 1])
        shape = _kept_shape(param, i, kept[i], kinds[i], block, count)
        _check_state(param, i, tuple(param.shape) if masked else shape, own)
        step = steps[i]
        if step.dtype != torch.float32 or step.numel() != 1 or step.device != device:
            raise expected(f"steps[{i}]", f"a float32 scalar on {device}", described(step))
    if device.type != "meta":
        choice(backend, device, {param.dtype for param in params})


def check_numbers(hyper: Tensor, scaling: Scaling, device: torch.device) -> None:
    """The step's rates and its optional numbers, one each, where the parameters are."""
    if hyper.dim() != 2 or len(hyper) == 0:
        raise expected("hyper", "[groups, 5]", list(hyper.shape))
    check_tensor(hyper, "hyper", (hyper.shape[0], 5), torch.float64, device)
    max_grad_norm, grad_scale, found_inf = scaling
    ok = max_grad_norm is None or max_grad_norm > 0
    require(ok, "max_grad_norm", "None or a number above 0", max_grad_norm)
    for name, number in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if number is not None:
            fits = number.is_floating_point() and number.numel() == 1
            if not fits or number.device != device:
                raise expected(name, f"one floating number on {device}", described(number))


def _overlaps(t: Tensor) -> bool:
    return any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True))


def _check_state(
    param: Tensor, i: int, shape: tuple[int, ...], states: Mapping[str, Tensor]
) -> None:
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    for name, value in states.items():
        if name == "masters" and value.numel() == 0 and value.device == param.device:
            continue  # none
        fits = value.shape == shape and value.dtype == wide and value.is_contiguous()
        if not fits or value.device != param.device:
            want = f"contiguous {wide} {list(shape)} on {param.device}"
            raise expected(f"{name}[{i}]", want, described(value))


def _kept_shape(
    param: Tensor, i: int, index: Tensor, kind: int, block: tuple[int, int], count: int
) -> tuple[int, ...]:
    """Shape of the state of what ``index`` names; ``count``: entries the state has."""
    if not 0 <= kind < len(KINDS):
        raise expected(f"kinds[{i}]", f"a number below {len(KINDS)}", kind)
    name, (rows, columns) = KINDS[kind], matrix_shape(param.shape)
    if name == "all":
        return tuple(param.shape)
    if name == "elements":
        _check_bits(param, i, index)
        return (count,)
    if name == "columns":
        require(param.dim() > 1, f"kinds[{i}]", "rows or elements below 2-D", name)
    if name == "blocks":
        high, wide = block
        if min(block) <= 0 or rows % high or columns % wide:
            raise expected(f"blocks[{i}]", f"a block that divides {rows} x {columns}", block)
    check_tensor(index, f"kept[{i}]", (index.numel(),), torch.int32, param.device)
    units = unit_count(param.shape, name, block)
    require_within(index, f"kept[{i}]", units, ascending=True)
    taken = index.numel()
    if name == "rows":
        return (taken, *param.shape[1:])
    return (rows, taken) if name == "columns" else (taken, *block)


def _check_bits(param: Tensor, i: int, bits: Tensor) -> None:
    """Packed bits, those beyond the last entry zero."""
    numel = math.prod(param.shape)
    check_tensor(bits, f"kept[{i}]", (-(-numel // 8),), torch.uint8, param.device)
    spare = readable(bits) and bool(numel % 8 and int(bits[-1]) >> (numel % 8))
    require(not spare, f"kept[{i}]", "zeros in the spare bits of the last byte", "ones")


def check_counted(counts: Tensor, i: int, count: int) -> None:
    """Raise UsageError unless a state has an entry for each bit set, if they can be counted."""
    if readable(counts):
        kept = int(counts.sum())
        require(kept == count, f"exp_avgs[{i}]", f"{kept} entries, one for each bit", count)
