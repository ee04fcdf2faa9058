"""Several processes, one run: who takes which rows, what they average, what the first one does.

Every process sees the order of global batches that a single one would see and takes every
``size``-th row of each. Its mean loss is weighted by its number of rows, so that the average of
gradients is the global batch's, whatever the division leaves over.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sensikernels._core import environment
from sensikernels._core.checks import require
from sensikernels._core.errors import SensiError
from sensikernels._core.files import one_line
from sensikernels.data import Batches
from sensikernels.masks import Plan
from sensikernels.methods import Run
from sensikernels.optim import SubsetAdamW
from sensikernels.training.config import Settings

T = TypeVar("T")


class Share(NamedTuple):
    """What one process does of a global batch.

    ``weight``: its mean loss times this, averaged over processes, is the global mean loss.
    ``tokens``: real tokens of the whole batch.
    """

    batch: dict[str, Any]
    weight: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run, as one of them sees them; alone by default."""

    rank: int = 0
    size: int = 1
    parallel: str = "ddp"

    @classmethod
    def join(cls, settings: Settings) -> World:
        """Meet the other processes that ``torchrun`` or ``accelerate launch`` started, if any.

        They meet on the device that the run will use.

        Raises:
            UsageError: there are more processes than rows in a batch; the device is not there.
            SensiError: the processes do not meet, or not all of them.
        """
        from accelerate import PartialState

        started = environment.world_size()
        kind = device_kind(settings)
        try:
            state = PartialState(cpu=kind == "cpu")
        except (RuntimeError, ValueError, OSError) as error:
            raise SensiError(
                f"processes: the {started} started do not meet: {one_line(error)}"
            ) from error
        size = state.num_processes
        if started not in (1, size):
            raise SensiError(
                f"processes: expected {started} (WORLD_SIZE) to meet on {kind}, got {size}"
            )
        require(
            settings.batch_size >= size,
            "batch_size",
            f"a row for each of {size} processes",
            settings.batch_size,
        )
        return cls(rank=state.process_index, size=size, parallel=settings.parallel)

    @property
    def first(self) -> bool:
        """Whether this process writes and tells."""
        return self.rank == 0

    def shares(self, batches: Batches) -> Iterator[Share]:
        """This process's rows of every batch. Who is left without one takes a row of no weight."""
        lengths = batches.order.lengths
        orders = list(batches.order)
        mine = [rows[self.rank :: self.size] for rows in orders]
        taken = [own or rows[:1] for own, rows in zip(mine, orders, strict=True)]
        for batch, own, rows in zip(_loader(batches, taken), mine, orders, strict=True):
            yield Share(batch, len(own) * self.size / len(rows), int(lengths[rows].sum()))

    def turns(self, batches: Batches, *, even: bool = False) -> DataLoader[Any]:
        """Every ``size``-th batch, whole. ``even``: the same number for all, the last one again."""
        orders = list(batches.order)
        mine = orders[self.rank :: self.size]
        if even and len(mine) < -(-len(orders) // self.size):
            mine.append(orders[-1])
        return _loader(batches, mine)

    def interleave(self, own: Sequence[T], count: int) -> list[T]:
        """What all made of their even turns, in the order of the ``count`` batches."""
        return [one for turn in zip(*self.gather(own), strict=True) for one in turn][:count]

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank; plain objects and CPU tensors."""
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(every, value)
        return every

    def agree(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, or raises, on the first process: for all."""
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

    def require_same(self, plan: Plan | None) -> None:
        """Raise SensiError, everywhere, unless all processes hold this plan."""
        if self.size == 1 or plan is None:
            return
        digests = self.gather(_digest(plan))
        if len(set(digests)) > 1:
            raise SensiError(f"plan: expected the same on {self.size} processes, got {digests}")

    def wrap(self, run: Run, *, settled: bool) -> nn.Module:
        """``run.model`` with its gradients averaged in backward; itself if there is one process.

        A table with row-sparse gradients is left to ``average_rows``. With ``parallel`` "fsdp" the
        model and its optimizer are sharded once they are ``settled``: no layer will be swapped.
        """
        model = run.model
        if self.size == 1:
            return model
        if self.parallel == "fsdp" and settled:
            from sensikernels.training.sharded import shard

            assert isinstance(run.optimizer, SubsetAdamW)
            run.optimizer = shard(model, run.optimizer)
            return model
        return _averaging(model)

    def gradients(self, model: nn.Module) -> Callable[[Mapping[str, Any]], object]:
        """A function that takes the gradients of a batch of ``model``'s, averaged as DDP does."""
        together: Callable[..., Any] = model if self.size == 1 else _averaging(model)

        def backward(batch: Mapping[str, Any]) -> None:
            together(**batch).loss.backward()
            self.average_rows(model)

        return backward

    def follow(self, model: nn.Module) -> None:
        """Have the ``DistributedDataParallel`` around ``model`` average the parameters it has now.

        For a trainer that wrapped the model itself: the wrapper is built anew in place, so that
        who holds it need not know. Every process must call it. Nothing happens if there is one.

        Raises:
            UsageError: there is no such wrapper, or more than one.
        """
        if self.size == 1:
            return
        from torch.nn.parallel import DistributedDataParallel

        # A trainer tells its callbacks of the model alone; the collector knows who holds it.
        gc.collect()
        held = [o for o in gc.get_objects() if type(o) is DistributedDataParallel]
        around = [one for one in held if one.module is model]
        require(len(around) == 1, "model", "one DistributedDataParallel around it", len(around))
        (wrapper,) = around
        named = {name: getattr(wrapper, name) for name in _DDP_OPTIONS}
        renamed = "forward_sync_buffers"  # in torch 2.13
        buffers = renamed if hasattr(wrapper, renamed) else "broadcast_buffers"
        named[buffers] = getattr(wrapper, buffers)
        if not wrapper.bucket_bytes_cap_default:
            named["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
        hooks = list(wrapper._comm_hooks)
        # The old reducer takes its hooks off the parameters that stay.
        wrapper.reducer = wrapper.logger = None  # type: ignore[assignment]
        wrapper.__init__(model, **named)  # type: ignore[misc]
        for hook, state in hooks:
            wrapper.register_comm_hook(state, hook)

    def shards(self, model: nn.Module) -> bool:
        """Whether ``model`` is in shares now."""
        if self.parallel == "ddp" or self.size == 1:
            return False
        from sensikernels.training.sharded import is_sharded

        return is_sharded(model)

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict, not sharded."""
        values = model.state_dict()
        if not self.shards(model):
            return dict(values)
        from sensikernels.training.sharded import whole

        return whole(values)

    def average_rows(self, model: nn.Module) -> None:
        """Average row-sparse gradients: what was added to a row is added up, rows are joined."""
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


def device_kind(settings: Settings) -> str:
    """``cpu`` or ``cuda``: what ``auto`` stands for here. Raises UsageError if it is not there."""
    found = torch.cuda.is_available()
    if settings.device == "auto":
        return "cuda" if found else "cpu"
    there = settings.device == "cpu" or found
    require(there, "device", "one this machine has", settings.device)
    return settings.device


ALONE = World()
# What a wrapper remembers of how it was made.
_DDP_OPTIONS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
)


@contextmanager
def one_for_all(world: World) -> Iterator[None]:
    """Say in one line that another process ended, where a collective call finds out."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
        if world.size == 1 or not lost:
            raise
        why = one_line(error)[:160]
        where = f"process {world.rank} of {world.size}"
        raise SensiError(f"{where}: lost the others: {why}") from error


def leave() -> None:
    """Share from the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_sparse(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.sparse and module.weight.requires_grad


def _averaging(model: nn.Module) -> nn.Module:
    """``model`` in DDP, but for tables with row-sparse gradients."""
    from torch.nn.parallel import DistributedDataParallel

    # No buffer changes in training: nothing to send before each forward.
    ignored = [f"{n}.weight" for n, m in model.named_modules() if _is_sparse(m)]
    ignored += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DistributedDataParallel(model)


def _loader(batches: Batches, orders: list[list[int]]) -> DataLoader[Any]:
    # A generator of its own: without one, iterating draws from the global random state.
    return DataLoader(
        batches.dataset,
        batch_sampler=orders,
        collate_fn=batches.collate_fn,
        generator=torch.Generator(),
    )


def _digest(plan: Plan) -> str:
    digest = hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True, default=str).encode())
    for masks in (plan.weight_masks, plan.update_masks):
        for name in sorted(masks):
            digest.update(name.encode() + masks[name].grid.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
