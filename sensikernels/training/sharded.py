"""FSDP2: parameters, gradients and optimizer state in parts, one on each process.

Encoder layers and the rest are sharded along their first dimension, ``SubsetAdamW`` runs on the
local parts. A word table with row-sparse gradients stays whole, as these cannot be scattered.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from sensikernels.hf import encoder_layers, packing_of
from sensikernels.hf.packed.layer import run_layer
from sensikernels.optim import SubsetAdamW


def shard(model: nn.Module, optimizer: SubsetAdamW) -> ShardedAdamW:
    """Shard ``model`` in place; its optimizer from now on, with the state of ``optimizer``."""
    saved = optimizer.state_dict()
    names = {id(p): name for name, p in model.named_parameters()}
    order = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    mesh = init_device_mesh(next(model.parameters()).device.type, (_world_size(),))
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse)
    unsharded = {cast(nn.Parameter, table.weight) for table in tables}
    packing = packing_of(model)
    # A packed layer's output is a view that nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for layer in encoder_layers(model):
        module: Any = layer.module
        fully_shard(module, mesh=mesh)
        if packing is not None:
            # A packed model runs its layers by this name, not by their forward.
            module.packed_forward = partial(run_layer, packing.step.block, module)
            register_fsdp_forward_method(module, "packed_forward")
    fully_shard(model, mesh=mesh, ignored_params=unsharded)
    now = dict(model.named_parameters())
    groups = [
        {**group, "params": [now[name] for name in members]}
        for group, members in zip(optimizer.param_groups, order, strict=True)
    ]
    made = ShardedAdamW(groups, max_grad_norm=optimizer.max_grad_norm, backend=optimizer.backend)
    made.load_state_dict(saved)
    return made


def is_sharded(model: nn.Module) -> bool:
    """True if ``shard`` has changed ``model``."""
    return isinstance(model, FSDPModule)


def whole(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with sharded tensors put together; every process must ask for it."""
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in values.items()}


class ShardedAdamW(SubsetAdamW):
    """``SubsetAdamW`` on the local parts of sharded parameters, clipped by the norm of all.

    State dicts are those of the unsharded optimizer. Every process must make and load them.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, max_grad_norm: float | None, backend: str
    ) -> None:
        self._shards: list[tuple[Tensor, nn.Parameter]] = []
        local = [{**group, "params": [self._part(p) for p in group["params"]]} for group in groups]
        self._limit = max_grad_norm
        super().__init__(local, backend=backend)

    @torch.no_grad()
    def step(self, *arguments: Any, **named: Any) -> Any:
        """One update from the averaged gradients."""
        for param, part in self._shards:
            grad: Any = param.grad
            part.grad = grad.to_local() if isinstance(grad, DTensor) else grad
        self.grad_scale = None if self._limit is None else self._scale(self._limit)
        result = super().step(*arguments, **named)
        for _, part in self._shards:
            part.grad = None
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the sharded parameters."""
        for param, _ in self._shards:
            param.grad = None

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """That of the whole parameters."""
        saved = super().state_dict()
        for index, (param, _) in enumerate(self._shards):
            if index in saved["state"]:
                own = saved["state"][index]
                saved["state"][index] = {n: _gathered(v, param) for n, v in own.items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's part of the state of whole parameters."""
        state = dict(state_dict["state"])
        for index, (param, _) in enumerate(self._shards):
            if index in state:
                state[index] = {n: _scattered(v, param) for n, v in state[index].items()}
        super().load_state_dict({**state_dict, "state": state})

    def _part(self, param: Any) -> nn.Parameter:
        if isinstance(param, DTensor):
            local = cast(Any, param.detach()).to_local()
            part = nn.Parameter(local, requires_grad=param.requires_grad)
        else:
            part = param
        self._shards.append((param, part))
        return part

    def _scale(self, limit: float) -> Tensor:
        """The divisor of the gradients: max(1, (norm + 1e-6) / limit), float32 []."""
        device = self._shards[0][1].device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for param, part in self._shards:
            if part.grad is not None:
                grad = part.grad.coalesce().values() if part.grad.is_sparse else part.grad
                sums[int(isinstance(param, DTensor))] += grad.double().square().sum()
        torch.distributed.all_reduce(sums[1])
        return ((sums.sum().sqrt() + 1e-6) / limit).clamp(min=1.0).float()


def _is_part(value: Any, shape: torch.Size, param: Any) -> bool:
    return isinstance(param, DTensor) and isinstance(value, Tensor) and value.shape == shape


def _gathered(value: Any, param: Any) -> Any:
    if not _is_part(value, getattr(param, "_local_tensor", param).shape, param):
        return value
    whole = DTensor.from_local(
        value, param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
    )
    return whole.full_tensor()


def _scattered(value: Any, param: Any) -> Any:
    if not _is_part(value, param.shape, param):
        return value
    rank = torch.distributed.get_rank()
    parts = value.chunk(_world_size())
    return parts[rank] if rank < len(parts) else value[:0]


def _world_size() -> int:
    return torch.distributed.get_world_size()
