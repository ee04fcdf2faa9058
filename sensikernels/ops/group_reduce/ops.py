"""The op ``sensikernels::group_reduce``: defined once, one implementation per backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sensikernels._core import environment
from sensikernels._core.checks import require
from sensikernels.ops.common.columns import unwatched
from sensikernels.ops.group_reduce import checks, native
from sensikernels.ops.group_reduce.table import DTYPE_CODE, STATISTICS, GroupTable

_library = torch.library.Library("sensikernels", "FRAGMENT")
_library.define(
    "group_reduce(Tensor[] weights, Tensor[] grads, bool[] flat, Tensor chunks, Tensor starts, "
    "Tensor order, Tensor members, Tensor(a!) host_descriptors, Tensor(b!)? descriptors, "
    "Tensor(c!) partials, int statistics, Tensor(d!)? running, Tensor(e!)? ema, float decay, "
    "str backend) -> Tensor"
)


def native_refusal(device: str) -> str | None:
    """Why the compiled kernels cannot serve ``device``; None if they can."""
    return native.refusal(device)


def triton_refusal(device: str) -> str | None:
    """Why the Triton kernels cannot serve ``device``; None if they can."""
    if device != "cuda" and not environment.interpreting():
        return f"Triton runs on CUDA tensors, not on {device}"
    return None


def bind(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    flat: Sequence[bool],
    host: Tensor,
    device: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Descriptors of the tensors, uploaded only if one changed, and the copies they point into.

    A descriptor: weight and gradient address, their row strides, their ``DTYPE_CODE``.
    """
    columns = []
    copies: list[Tensor] = []
    for tensors in (weights, grads or weights):
        plain = [t.is_contiguous() for t in tensors]
        if not all(plain):
            tensors = list(tensors)
            for i in (i for i, fine in enumerate(plain) if not fine):
                if flat[i] or tensors[i].dim() != 2 or tensors[i].stride(1) != 1:
                    tensors[i] = tensors[i].contiguous()
                    copies.append(tensors[i])
        columns.append(
            (
                [t.data_ptr() for t in tensors],
                [0 if whole else t.stride(0) for t, whole in zip(tensors, flat, strict=True)],
                [DTYPE_CODE[t.dtype] for t in tensors],
            )
        )
    (w, w_ld, w_type), (g, g_ld, g_type) = columns
    rows = np.array([w, g, w_ld, g_ld, w_type, g_type], dtype=np.int64).reshape(6, -1)
    fresh = torch.from_numpy(np.ascontiguousarray(rows.T))
    if device is None:
        return fresh, copies
    if not torch.equal(fresh, host):
        host.copy_(fresh)
        device.copy_(host, non_blocking=True)
    return device, copies


def _check(
    weights: list[Tensor],
    grads: list[Tensor],
    flat: list[bool],
    chunks: Tensor,
    starts: Tensor,
    order: Tensor,
    members: Tensor,
    host_descriptors: Tensor,
    descriptors: Tensor | None,
    partials: Tensor,
    statistics: int,
    running: Tensor | None,
    ema: Tensor | None,
    decay: float,
    backend: str,
) -> None:
    checks.check_tensors(weights, grads, chunks.device)
    tables = (chunks, starts, order, members)
    checks.check_tables(weights, flat, *tables, host_descriptors, descriptors)
    states = (running, ema)
    checks.check_sums(chunks, starts, partials, statistics, states, decay, backend)
    checks.check_values(weights, flat, *tables, partials.shape[1])


def _checked(*arguments: Any) -> Tensor:
    _check(*arguments)
    refusals = {"native": native_refusal, "triton": triton_refusal}
    chunks, backend = arguments[3], arguments[-1]
    refused = refusals[backend](chunks.device.type)
    require(refused is None, "backend", "one that serves these tensors", refused)
    return _group_reduce(*arguments)


def _group_reduce(
    weights: list[Tensor],
    grads: list[Tensor],
    flat: list[bool],
    chunks: Tensor,
    starts: Tensor,
    order: Tensor,
    members: Tensor,
    host_descriptors: Tensor,
    descriptors: Tensor | None,
    partials: Tensor,
    statistics: int,
    running: Tensor | None,
    ema: Tensor | None,
    decay: float,
    backend: str,
) -> Tensor:
    bound, copies = bind(weights, grads, flat, host_descriptors, descriptors)
    out = chunks.new_empty(partials.size(0), starts.numel() - 1, dtype=torch.float32)
    kernels: Any
    if backend == "triton":
        from sensikernels.ops.group_reduce import triton as kernels
    else:
        kernels = native
    kernels.group_reduce(
        bound, chunks, starts, order, members, statistics, partials, out, running, ema, decay
    )
    del copies
    return out


def _fake(*arguments: Any) -> Tensor:
    _check(*arguments)
    chunks, starts, partials = arguments[3], arguments[4], arguments[9]
    return chunks.new_empty(partials.size(0), starts.numel() - 1, dtype=torch.float32)


_library.impl("group_reduce", _checked, "CPU")
_library.impl("group_reduce", _checked, "CUDA")
torch.library.register_fake("sensikernels::group_reduce", _fake, lib=_library)


def launch(
    backend: str,
    table: GroupTable,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    statistics: Sequence[str],
    running: Tensor | None,
    ema: Tensor | None,
    decay: float,
) -> Tensor:
    """Call the op with the table's buffers; ``[statistics, groups]`` float32.

    Past its checks where nothing watches operators: a ``GroupTable`` is right by construction.
    """
    bits = sum(1 << STATISTICS.index(name) for name in statistics)
    plain = unwatched(weights[0] if weights else table.chunks)
    run = _group_reduce if plain else torch.ops.sensikernels.group_reduce
    out: Tensor = run(
        list(weights),
        list(grads or ()),
        list(table.layout.flat),
        table.chunks,
        table.starts,
        table.order,
        table.members,
        table.host_descriptors,
        table.descriptors,
        table.partials(len(statistics)),
        bits,
        running,
        ema,
        decay,
        backend,
    )
    return out


def launch_bound(
    descriptors: Tensor,
    table: GroupTable,
    statistics: Sequence[str],
    running: Tensor | None,
    ema: Tensor | None,
    decay: float,
) -> Tensor:
    """The compiled kernels on descriptors ready-made; see ``launch``."""
    bits = sum(1 << STATISTICS.index(name) for name in statistics)
    out = torch.empty(len(statistics), table.layout.groups, device=table.device)
    native.group_reduce(
        descriptors,
        table.chunks,
        table.starts,
        table.order,
        table.members,
        bits,
        table.partials(len(statistics)),
        out,
        running,
        ema,
        decay,
    )
    return out
