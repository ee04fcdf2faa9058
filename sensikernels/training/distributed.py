"""Several processes, one run: the rows each takes, the models they wrap, the plan they share.

Every process sees the order of global batches that a single one would see and takes every
``size``-th row of each. Its mean loss is weighted by its number of rows, so that the average of
gradients is the global batch's, whatever the division leaves over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
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
from sensikernels.world import World, averaging


class Share(NamedTuple):
    """The rows of a global batch that one process takes.

    ``weight``: its mean loss times this, averaged over processes, is the global mean loss.
    ``tokens``: real tokens of the whole batch; ``terms``: how many its loss is the mean of.
    """

    batch: dict[str, Any]
    weight: float
    tokens: int
    terms: int


def join(settings: Settings) -> World:
    """The processes that ``torchrun`` or ``accelerate launch`` started, met on the run's device.

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
    enough = settings.batch_size >= size
    wanted = f"a row for each of {size} processes"
    require(enough, "batch_size", wanted, settings.batch_size)
    return World(rank=state.process_index, size=size, parallel=settings.parallel)


def shares(world: World, batches: Batches) -> Iterator[Share]:
    """The rows of every batch for this process; where none is left, a row of no weight."""
    lengths = batches.order.lengths
    orders = list(batches.order)
    mine = [rows[world.rank :: world.size] for rows in orders]
    encoded: Any = batches.dataset
    weights = encoded.weights
    taken = [own or rows[:1] for own, rows in zip(mine, orders, strict=True)]
    for batch, own, rows in zip(_loader(batches, taken), mine, orders, strict=True):
        here, terms = len(own), len(rows)
        if weights is not None:
            here, terms = int(weights[own].sum()), int(weights[rows].sum())
        yield Share(batch, here * world.size / terms, int(lengths[rows].sum()), terms)


def of_a_step(parts: Sequence[Share]) -> tuple[Share, ...]:
    """The batches of one optimizer step, weighted so that their gradients are one big batch's."""
    total = sum(part.terms for part in parts)
    return tuple(
        part if part.terms == total else part._replace(weight=part.weight * part.terms / total)
        for part in parts
    )


@contextmanager
def alone(together: nn.Module | None) -> Iterator[None]:
    """Keep gradients of the block in this process: a later backward averages their sum.

    Shards are summed in every backward: whole gradients would not fit.
    """
    if not isinstance(together, DistributedDataParallel):
        yield
        return
    with together.no_sync():
        yield


def turns(world: World, batches: Batches, *, even: bool = False) -> DataLoader[Any]:
    """Every ``size``-th batch, whole. ``even``: the same number for all, the last one again."""
    orders = list(batches.order)
    mine = orders[world.rank :: world.size]
    if even and len(mine) < -(-len(orders) // world.size):
        mine.append(orders[-1])
    return _loader(batches, mine)


def require_same(world: World, plan: Plan | None) -> None:
    """Raise SensiError, everywhere, unless all processes hold this plan."""
    if world.size == 1 or plan is None:
        return
    digests = world.gather(_digest(plan))
    if len(set(digests)) > 1:
        raise SensiError(f"plan: expected the same on {world.size} processes, got {digests}")


def wrap(world: World, run: Run, *, settled: bool) -> nn.Module:
    """``run.model`` with its gradients averaged in backward; itself if there is one process.

    A table with row-sparse gradients is left to ``World.average_rows``. With ``parallel`` "fsdp"
    the model and its optimizer are sharded once they are ``settled``: no layer will be swapped.
    """
    model = run.model
    if world.size == 1:
        return model
    if world.parallel == "fsdp" and settled:
        from sensikernels.training.sharded import shard

        assert isinstance(run.optimizer, SubsetAdamW)
        run.optimizer = shard(model, run.optimizer)
        return model
    return averaging(model)


def shards(world: World, model: nn.Module) -> bool:
    """True if each process holds a shard of ``model`` now."""
    if world.parallel == "ddp" or world.size == 1:
        return False
    from sensikernels.training.sharded import is_sharded

    return is_sharded(model)


def whole(world: World, model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, not sharded."""
    values = model.state_dict()
    if not shards(world, model):
        return dict(values)
    from sensikernels.training.sharded import whole

    return whole(values)


def load_whole(world: World, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put a state dict that is not sharded into the model, whatever its form."""
    if not shards(world, model):
        model.load_state_dict(values)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(values), options=StateDictOptions(full_state_dict=True))


def wrap_anew(wrapper: Any) -> None:
    """Have a ``DistributedDataParallel`` average the parameters its module has now.

    It is built anew in place, so that its trainer need not know. Every process must call it.
    """
    named = {name: getattr(wrapper, name) for name in _DDP_OPTIONS}
    renamed = "forward_sync_buffers"  # in torch 2.13
    buffers = renamed if hasattr(wrapper, renamed) else "broadcast_buffers"
    named[buffers] = getattr(wrapper, buffers)
    if not wrapper.bucket_bytes_cap_default:
        named["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    hooks = list(wrapper._comm_hooks)
    # The old reducer takes its hooks off the parameters that stay.
    wrapper.reducer = wrapper.logger = None
    wrapper.__init__(wrapper.module, **named)
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)


def device_kind(settings: Settings) -> str:
    """``cpu`` or ``cuda``, as ``auto`` chooses here. Raises UsageError if it is not there."""
    found = torch.cuda.is_available()
    if settings.device == "auto":
        return "cuda" if found else "cpu"
    there = settings.device == "cpu" or found
    require(there, "device", "one this machine has", settings.device)
    return settings.device


# A wrapper remembers the options it was made with.
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
    """Part from the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
