"""The operator ``group_reduce``: defined once, one implementation per backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sensikernels._core.checks import require
from sensikernels.ops.common.columns import unwatched
from sensikernels.ops.common.lists import native_refusal, triton_refusal
from sensikernels.ops.common.register import register
from sensikernels.ops.group_reduce import checks, native
from sensikernels.ops.group_reduce.table import DTYPE_CODE, STATISTICS, GroupTable


class Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    weights: list[Tensor]
    grads: list[Tensor]
    flat: list[bool]
    chunks: Tensor
    starts: Tensor
    order: Tensor
    members: Tensor
    host_descriptors: Tensor
    descriptors: Tensor | None
    partials: Tensor
    statistics: int
    running: Tensor | None
    ema: Tensor | None
    decay: float
    backend: str

    def sums(self) -> Tensor:
        """A new ``[statistics, groups]`` float32."""
        shape = self.partials.size(0), self.starts.numel() - 1
        return self.chunks.new_empty(shape, dtype=torch.float32)


def bind(call: Arguments) -> tuple[Tensor, list[Tensor]]:
    """Descriptors of the tensors, uploaded only if one changed, and the copies they point into.

    A descriptor: weight and gradient address, their row strides, their ``DTYPE_CODE``.
    """
    flat, device = call.flat, call.descriptors
    columns = []
    copies: list[Tensor] = []
    for tensors in (call.weights, call.grads or call.weights):
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
    if not torch.equal(fresh, call.host_descriptors):
        call.host_descriptors.copy_(fresh)
        device.copy_(call.host_descriptors, non_blocking=True)
    return device, copies


def _checked(*arguments: Any) -> tuple[Arguments]:
    call = Arguments(*arguments)
    checks.check_tensors(call.weights, call.grads, call.chunks.device)
    tables = checks.Tables(call.chunks, call.starts, call.order, call.members)
    flat, states = call.flat, (call.running, call.ema)
    checks.check_tables(call.weights, flat, tables, call.host_descriptors, call.descriptors)
    checks.check_sums(tables, call.partials, call.statistics, states, call.decay, call.backend)
    checks.check_values(call.weights, flat, tables, call.partials.shape[1])
    return (call,)


def _group_reduce(call: Arguments) -> Tensor:
    device = call.chunks.device.type
    compiled = call.backend == "native"
    refused = native_refusal("group_reduce", device) if compiled else triton_refusal(device)
    require(refused is None, "backend", "one that serves these tensors", refused)
    return _run(call)


def _run(call: Arguments) -> Tensor:
    bound, copies = bind(call)
    out = call.sums()
    kernels: Any = native
    if call.backend == "triton":
        from sensikernels.ops.group_reduce import triton as kernels
    tables, states = call[3:7], call[11:14]
    kernels.group_reduce(bound, *tables, call.statistics, call.partials, out, *states)
    del copies
    return out


register(
    "group_reduce(Tensor[] weights, Tensor[] grads, bool[] flat, Tensor chunks, Tensor starts, "
    "Tensor order, Tensor members, Tensor(a!) host_descriptors, Tensor(b!)? descriptors, "
    "Tensor(c!) partials, int statistics, Tensor(d!)? running, Tensor(e!)? ema, float decay, "
    "str backend) -> Tensor",
    _checked,
    _group_reduce,
    Arguments.sums,
)


class States(NamedTuple):
    """The arenas that a call updates, ``[statistics, groups]``, and how fast ``ema`` forgets."""

    running: Tensor | None
    ema: Tensor | None
    decay: float


def launch(
    backend: str,
    table: GroupTable,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    statistics: Sequence[str],
    states: States,
) -> Tensor:
    """Call the op with the table's buffers; ``[statistics, groups]`` float32.

    Its checks are passed over where nothing watches operators: a ``GroupTable`` is right by
    construction.
    """
    call = Arguments(
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
        _bits(statistics),
        *states,
        backend,
    )
    if unwatched(weights[0] if weights else table.chunks):
        return _run(call)
    out: Tensor = torch.ops.sensikernels.group_reduce(*call)
    return out


def launch_bound(
    descriptors: Tensor, table: GroupTable, statistics: Sequence[str], states: States
) -> Tensor:
    """The compiled kernels on descriptors ready-made; see ``launch``."""
    out = torch.empty(len(statistics), table.layout.groups, device=table.device)
    tables = table.chunks, table.starts, table.order, table.members
    partials = table.partials(len(statistics))
    native.group_reduce(descriptors, *tables, _bits(statistics), partials, out, *states)
    return out


def _bits(statistics: Sequence[str]) -> int:
    return sum(1 << STATISTICS.index(name) for name in statistics)
