"""A training step as CUDA graphs, a pair per batch shape; eager, with a reason, where it cannot be.

Forward and backward are one graph, clipping and update a second. The update must know where the
gradients lie, which the first capture decides: in between it runs once, and lays its tables out.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sensikernels._core.checks import require
from sensikernels.nn._layout import MaskedModule

Batch = Mapping[str, Any]


class GraphedStep:
    """Forward, backward, clipping and update of one batch, replayed from the third of a shape on.

    Every call is one training step, warm-up and capture included. Weights, masks and optimizer
    state may be written in place between calls: the next replay sees it. What cannot be in place
    (a swapped layer, more kept units than there is room for, train or eval) moves an address or a
    setting, and all is captured anew. Row-sparse gradients have one entry per token, so their size
    is that of the batch. ``reason`` says why steps are eager; None where they are captured.

    Args:
        model: what ``loss`` runs; its parameters, buffers and masks are watched for moves.
        optimizer: ``SubsetAdamW``, or torch's with ``capturable=True``. Its groups' ``lr`` become
            tensors [] on the device; numbers put there are taken over.
        loss: batch to loss []; ``model(**batch).loss`` by default. It must not wait for the device.
        max_grad_norm: clip with ``clip_grad_norm_``; None where the optimizer clips by itself.
        warmup, max_graphs: eager steps of a shape before its capture; shapes captured at most.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Callable[[Batch], Tensor] | None = None,
        *,
        max_grad_norm: float | None = None,
        warmup: int = 1,
        max_graphs: int = 64,
    ) -> None:
        require(warmup >= 1, "warmup", "1 or more", warmup)
        self.model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm
        self.warmup, self.max_graphs = warmup, max_graphs
        self.loss = loss or (lambda batch: model(**batch).loss)
        where = (group["params"][0].device for group in optimizer.param_groups)
        self._rates = [torch.zeros((), device=device) for device in where]
        self._side: torch.cuda.Stream | None = None
        self._known: Any = None
        self.forget()
        self.reason = self._refusal()

    def __call__(self, batch: Batch) -> Tensor:
        """One training step; its loss, [] on the device, not waited for."""
        if self.reason is not None:
            return self.eager(batch)
        self._place_rates()
        if fingerprint(self.model, self.optimizer) != self._known:
            self.forget()
        key = shape_of(batch)
        if key in self._graphs:
            return self._graphs[key].replay(batch)
        self._seen[key] = seen = self._seen.get(key, 0) + 1
        ready = seen > self.warmup and len(self._graphs) < self.max_graphs
        loss = self._capture(key, batch) if ready else self._on_the_side(batch)
        # After it: a first update allocates its state.
        self._known = fingerprint(self.model, self.optimizer)
        return loss

    def forget(self) -> None:
        """Drop all graphs: each shape is captured again."""
        self._graphs: dict[Any, _Captured] = {}
        self._seen: dict[Any, int] = {}
        self._pool: Any = None

    def explain(self) -> str:
        """One line: what runs, and why."""
        graphs = f"CUDA graphs ({len(self._graphs)} batch shapes captured)"
        return f"step: {graphs if self.reason is None else f'eager ({self.reason})'}"

    def eager(self, batch: Batch) -> Tensor:
        """The step without graphs."""
        loss = self.loss(batch)
        loss.backward()
        self.update(self.optimizer)
        return loss.detach()

    def update(self, optimizer: Optimizer) -> None:
        """Clip, update, and drop the gradients."""
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def _refusal(self) -> str | None:
        kind = next(self.model.parameters()).device.type
        return None if kind == "cuda" else f"CUDA graphs need a CUDA device, the model is on {kind}"

    def _place_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate

    def _on_the_side(self, batch: Batch) -> Tensor:
        """An eager step on another stream, as a capture wants its warm-up."""
        self._side = side = self._side or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = self.eager(batch)
        torch.cuda.current_stream().wait_stream(side)
        loss.record_stream(torch.cuda.current_stream())
        return loss

    def _capture(self, key: Any, batch: Batch) -> Tensor:
        """Capture this shape in one training step; eager for good if that fails."""
        made = _Captured(self, batch)
        try:
            made.capture(self._pool)
        except Exception as error:  # whatever a capture dislikes, training goes on
            torch.cuda.synchronize()
            why = (str(error) or repr(error)).splitlines()[0]
            self.reason = f"capture failed: {why}{_suspect(self.model)}"
            logging.getLogger("sensikernels").warning("slower path: %s", self.explain())
            self.forget()
            self.model.zero_grad(set_to_none=True)
            return made.loss.clone() if made.stepped else self.eager(batch)
        self._graphs[key], self._pool = made, made.forward.pool()
        return made.loss.clone()


class _Captured:
    """One batch shape's graphs and inputs; in the pool all shapes share, only losses outlive it."""

    def __init__(self, step: GraphedStep, batch: Batch) -> None:
        self.step, self.stepped, self.loss = step, False, torch.empty(())
        self.inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
        # A copy shares parameters, groups and state, and has descriptor tables of its own.
        self.optimizer = copy.copy(step.optimizer)

    def capture(self, pool: Any) -> None:
        """Forward and backward; then the update, once for real and once recorded."""
        step, mode = self.step, "thread_local"
        step.model.zero_grad(set_to_none=True)
        self.forward, self.tail = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=pool, capture_error_mode=mode):
            loss = step.loss(self.inputs)
            loss.backward()
        self.loss = loss.detach()
        grads = [(p, p.grad) for p in step.model.parameters()]
        self.forward.replay()
        step.update(self.optimizer)
        self.stepped = True
        for param, grad in grads:
            param.grad = grad
        with torch.cuda.graph(self.tail, pool=self.forward.pool(), capture_error_mode=mode):
            step.update(self.optimizer)

    def replay(self, batch: Batch) -> Tensor:
        """One step on ``batch``; its loss, copied out of the graph's memory."""
        for name, held in self.inputs.items():
            if isinstance(held, Tensor):
                held.copy_(batch[name], non_blocking=True)
        self.forward.replay()
        self.tail.replay()
        return self.loss.clone()


def shape_of(batch: Batch) -> Any:
    """The key of a graph's batches: names, shapes, and values that are no tensors."""
    items = sorted(batch.items())
    return tuple((n, v.shape, v.dtype) if isinstance(v, Tensor) else (n, v) for n, v in items)


def _suspect(model: nn.Module) -> str:
    """Names a table whose gradient leaves out padding: torch waits to see how much there is."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.sparse and module.padding_idx is not None:
            return f" ({name} is sparse with a padding_idx: only packed tokens have a fixed size)"
    return ""


def fingerprint(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Addresses and settings a captured step depends on; writing in place changes none of them."""
    found: list[Any] = [torch.is_autocast_enabled("cuda")]
    leaves: list[Any] = []
    for module in model.modules():
        found += (module.training, getattr(module, "sparse", None))
        leaves += (*module._parameters.values(), *module._buffers.values())
        leaves += vars(module.layout).values() if isinstance(module, MaskedModule) else ()
    for group in optimizer.param_groups:
        found += [value for name, value in group.items() if name not in ("params", "lr")]
        for param in group["params"]:
            own = optimizer.state.get(param, {})
            leaves += (*own.values(), *own.get("kept", {}).values())
    for t in (leaf for leaf in leaves if isinstance(leaf, Tensor)):
        found += (t.data_ptr(), t.numel(), t.requires_grad)
    return found
