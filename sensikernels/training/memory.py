"""Peak memory of one training step.

Counted, in MiB: what stays between steps (parameters, buffers, optimizer state, a kept prefix),
plus the most that one forward and backward of the run's largest batch allocates on top of it at any
moment (activations, gradients, temporaries). On a CPU these are the profiler's memory events: the
running sum of what torch's allocator hands out and takes back. On a GPU they are the caching
allocator's own peak. Not counted: the data set, the process itself, libraries' private scratch
(oneDNN's), and the temporaries of the optimizer's update. ``activation_mib``: the forward's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MIB = 2**20


def peak_mib(
    model: nn.Module, optimizer: Optimizer, batch: Mapping[str, Tensor], *, accumulate: int = 1
) -> float:
    """Peak memory of a step on ``batch``; gradients, mode and random state are not changed.

    Of a step that accumulates, the second backward has the gradients of the first beside it.
    """

    def work() -> None:
        for _ in range(min(accumulate, 2)):
            model(**batch).loss.backward()

    step = _peak(model, work)
    return (resident_bytes(model, optimizer) + step) / MIB


def activation_mib(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """The most a training forward on ``batch`` holds: what backward needs, and temporaries."""
    return _peak(model, lambda: model(**batch).loss) / MIB


def _peak(model: nn.Module, work: Callable[[], object]) -> int:
    """The most bytes ``work`` holds at a time; the model is as it was afterwards."""
    device = next(model.parameters()).device
    measure = _cuda_peak if device.type == "cuda" else _cpu_peak
    saved = [(p, p.grad) for p in model.parameters()]
    training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        for parameter, _ in saved:
            parameter.grad = None
        model.train()
        peak = measure(work)
    model.train(training)
    for parameter, grad in saved:
        parameter.grad = grad
    return peak


def resident_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of all that stays between steps, shared storage counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers(), *_tensors(optimizer.state)):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    caches = (getattr(module, "prefix_cache", None) for module in model.modules())
    return sum(storages.values()) + sum(cache.held for cache in caches if cache is not None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def _cpu_peak(work: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    results: Any = profiled.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def _cuda_peak(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
