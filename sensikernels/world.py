"""The processes of a run, as one of them sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sensikernels._core.errors import SensiError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """``size`` processes, this one ``rank`` among them; alone by default.

    ``parallel``: each holds a copy of the model (``ddp``) or a shard of it (``fsdp``).
    """

    rank: int = 0
    size: int = 1
    parallel: str = "ddp"

    @classmethod
    def here(cls) -> World:
        """The processes of ``torch.distributed``, if it runs."""
        found = torch.distributed
        if not found.is_available() or not found.is_initialized():
            return ALONE
        return cls(rank=found.get_rank(), size=found.get_world_size())

    @property
    def first(self) -> bool:
        """True if this process writes files and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank; plain objects and CPU tensors."""
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(every, value)
        return every

    def interleave(self, own: Sequence[T], count: int) -> list[T]:
        """The results of all processes in the order of ``count`` batches dealt out in turn."""
        return [one for turn in zip(*self.gather(own), strict=True) for one in turn][:count]

    def agree(self, make: Callable[[], T]) -> T:
        """The result of ``make`` on the first process, for all; its SensiError too."""
        if self.size == 1:
            return make()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = make()
            except SensiError as error:
                told[1] = error
        torch.distributed.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        result: T = told[0]
        return result

    def mean(self, value: Tensor) -> float:
        """The average of a number over processes."""
        if self.size == 1:
            return float(value.detach())
        total = value.detach().double()
        torch.distributed.all_reduce(total)
        return float(total) / self.size

    def sum_(self, values: dict[str, Tensor]) -> None:
        """Replace each tensor by its sum over processes, on the CPU; all hold the same names."""
        if self.size == 1:
            return
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        for name in sorted(values):
            total = values[name].to(device)
            torch.distributed.all_reduce(total)
            values[name] = total.cpu()

    def gradients(self, model: nn.Module) -> Callable[[Mapping[str, Any]], object]:
        """A function that takes the gradients of a batch, averaged over processes."""
        together: Callable[..., Any] = model if self.size == 1 else averaging(model)

        def backward(batch: Mapping[str, Any]) -> None:
            together(**batch).loss.backward()
            self.average_rows(model)

        return backward

    def average_rows(self, model: nn.Module) -> None:
        """Average row-sparse gradients: sums of a row are added up, rows are joined."""
        if self.size == 1:
            return
        from accelerate.utils import gather, pad_across_processes

        for table in filter(_is_sparse, model.modules()):
            weight: Any = table.weight
            if weight.grad is None:
                continue
            grad = weight.grad.coalesce()
            rows = gather(pad_across_processes(grad.indices()[0], pad_index=-1))
            values = gather(pad_across_processes(grad.values() / self.size))
            real = rows >= 0
            weight.grad = torch.sparse_coo_tensor(
                rows[real][None], values[real], weight.shape, check_invariants=False
            )


ALONE = World()


def averaging(model: nn.Module) -> nn.Module:
    """``model`` in DDP, but for tables with row-sparse gradients."""
    from torch.nn.parallel import DistributedDataParallel

    # No buffer changes in training: nothing to send before each forward.
    ignored = [f"{n}.weight" for n, m in model.named_modules() if _is_sparse(m)]
    ignored += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DistributedDataParallel(model)


def _is_sparse(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.sparse and module.weight.requires_grad
