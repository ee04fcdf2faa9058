"""``SubsetAdamW``: AdamW whose state and work are those of the kept entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from sensikernels._core.checks import expected, require
from sensikernels.ops.common.choice import Choice
from sensikernels.ops.subset_adamw.engine import Engine, choice
from sensikernels.ops.subset_adamw.item import Item, Scaling
from sensikernels.ops.subset_adamw.kept import KeptLayout, make_layout
from sensikernels.optim import state, waiting
from sensikernels.optim.items import Ready, Sums, is_sparse, item_of
from sensikernels.optim.options import check_options

_NOTHING = {
    dtype: torch.empty(0, dtype=dtype)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_KNOBS = ("backend", "grad_norm", "max_grad_norm")


class SubsetAdamW(Optimizer):
    """AdamW over the kept entries of each parameter (Loshchilov & Hutter 2019).

    Equal to ``torch.optim.AdamW`` to rounding while everything is kept. After
    :meth:`set_kept`, in mode ``hard_freeze`` frozen entries stay bit-equal (no decay, no momentum)
    and state is allocated for kept entries only; in mode ``as_published`` the gradient is masked
    and nothing else, so moments and decay of frozen entries drift (DPS, Child-Tuning).

    Args:
        params: parameters or groups, floating point, on one device.
        lr: a float, or a tensor [] that a captured CUDA graph reads anew at each replay.
        max_grad_norm: scale gradients so that their joint norm over kept entries of all
            parameters is at most this, as ``clip_grad_norm_`` does; ``grad_norm`` holds the norm
            before, float32 [] on the device.
        master_weights: "auto" (float32 copies for bfloat16 and float16 parameters, the parameter
            being their rounding), or False. After writing to such a parameter by hand,
            call :meth:`refresh_master`.
        mode: ``hard_freeze`` or ``as_published``, an option of each group.
        backend: "auto", "reference" or "native".

    A sparse gradient (``nn.Embedding(sparse=True)``) updates only the rows it names; see
    :meth:`flush`. Raises ``UsageError`` for a bad argument.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        max_grad_norm: float | None = None,
        master_weights: str | bool = "auto",
        mode: str = "hard_freeze",
        backend: str = "auto",
    ) -> None:
        clip = max_grad_norm is None or max_grad_norm > 0
        require(clip, "max_grad_norm", "None or a positive number", max_grad_norm)
        self.backend = backend
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self.params_changed()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "mode": mode,
            "master_weights": master_weights,
        }
        super().__init__(cast(Any, params), defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in _KNOBS}}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        super().__setstate__(saved)
        self.params_changed()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim.Optimizer`` does; checks its options."""
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        bad = next((p for p in param_group["params"] if not p.is_floating_point()), None)
        devices = {p.device for group in self.param_groups for p in group["params"]}
        if bad is not None or len(devices) > 1:
            self.param_groups.pop()
            require(bad is None, "params", "floating point", None if bad is None else bad.dtype)
            raise expected("params", "one device", sorted(map(str, devices)))
        self.params_changed()

    def set_kept(
        self, param: Tensor, kept: tuple[Any, ...] | None, *, capacity: int | None = None
    ) -> None:
        """Say which entries of ``param`` are updated from now on.

        ``kept``: None (all) | ("rows", index) | ("columns", index) | ("blocks", index, (h, w)),
        index into the row-major grid of blocks | ("elements", bits). Indices: int32, ascending;
        entries equal to the number of units are padding. Bits: uint8, one per entry of the
        row-major parameter, lowest bit first, spare bits zero. A parameter counts as [shape[0],
        everything else]. Entries that stay keep their state; in mode ``hard_freeze`` entries that
        join start from zero moments, with their own bias correction.

        A later choice of the same kind that has no more units (columns: as many) is written in
        place: no address and no shape changes, and a captured CUDA graph stays valid. ``capacity``
        makes room for that many units (rows, blocks, elements), whatever is kept now; None, all,
        then means all units of this kind. Mode ``as_published`` makes every choice one of elements.
        Raises ``UsageError`` before anything is changed.
        """
        group = self._group(param)
        own = self.state[param]
        require("clock" not in own, "param", "one with dense gradients", "a table updated by rows")
        old, frozen = self._layout(param), group["mode"] == "hard_freeze"
        if kept is None and old.lasting:
            kept = old.everything()
        named = kept is not None or capacity is None
        require(named, "capacity", "None, as no kind of unit is named", capacity)
        layout = make_layout(param.shape, kept, param, capacity or 0)
        if not frozen:
            layout = layout.by_elements().with_room(param.numel(), lasting=False)
        elif capacity is None:
            layout = layout.in_room_of(old)
        layout = replace(layout, lasting=capacity is not None or old.lasts_as(layout))
        if "step" in own and frozen:
            state.change_kept(param, own, old, layout)
        if layout.kind == "all":
            own.pop("kept", None)
        elif "kept" not in own or not layout.write_to(own["kept"]):
            own["kept"] = layout.to_state()
        self.params_changed()

    def slice_state(
        self,
        old_param: Tensor,
        new_param: Tensor,
        index: Tensor | Sequence[Tensor],
        dim: int | Sequence[int],
    ) -> None:
        """Replace ``old_param`` by ``new_param``, which is it with ``index`` taken along ``dim``.

        Moments, master weights, kept entries and row clocks are sliced alike. ``index``: integer
        positions, one tensor or one per entry of ``dim``. Raises ``UsageError``.
        """
        indices = [index] if isinstance(index, Tensor) else list(index)
        dims = [dim] if isinstance(dim, int) else list(dim)
        require(len(indices) == len(dims), "index", f"{len(dims)} tensors", len(indices))
        axes = old_param.dim()
        known = all(-axes <= along < axes for along in dims)
        require(known, "dim", f"axes of a {axes}-D parameter", dim)
        dims = [along % axes for along in dims]
        group = self._group(old_param)
        shape = list(old_param.shape)
        for along, positions in zip(dims, indices, strict=True):
            shape[along] = positions.numel()
        require(list(new_param.shape) == shape, "new_param", f"shape {shape}", new_param.shape)

        def cut(full: Tensor) -> Tensor:
            return state.select(full, indices, dims)

        own = self.moved_state(old_param, new_param, cut)
        if "row_clock" in own and 0 in dims:
            rows = [indices[dims.index(0)]]
            own["row_clock"] = state.select(self.state[old_param]["row_clock"], rows, [0])
        group["params"][:] = [new_param if p is old_param else p for p in group["params"]]
        if self.state.pop(old_param, None) is not None:
            self.state[new_param] = own
        self.params_changed()

    def moved_state(
        self, old_param: Tensor, new_param: Tensor, entries: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        """The state of ``new_param`` were it in the place of ``old_param``; changes nothing.

        ``entries`` takes a tensor of ``old_param``'s shape to one of ``new_param``'s; what it
        leaves out is lost, what it adds is kept, with no moments and the parameter's own value as
        master weight. Raises ``UsageError``.
        """
        same = new_param.dtype == old_param.dtype and new_param.device == old_param.device
        require(same, "new_param", f"{old_param.dtype} on {old_param.device}", new_param.dtype)
        full = self._group(old_param)["mode"] == "as_published"
        own, old = self.state.get(old_param, {}), self._layout(old_param)
        return state.moved(own, old, new_param, entries, full=full)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        fused_statistics: Mapping[Tensor, Sums] | None = None,
    ) -> Any:
        """One update from the gradients present.

        ``fused_statistics``: {param: (a, b)}, float32 [rows], contiguous, either may be None;
        ``a += Σ|w·g|`` and ``b += Σg²`` over the kept entries of each row, from the weight before
        and the gradient before clipping (after unscaling), in the pass that updates.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._straighten()
        items = self._items(fused_statistics or {})
        if items:
            loss_scale = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
            scaling = Scaling(self.max_grad_norm, *loss_scale)
            norm = self._engine.update(items, self._fill_hyper(items[0].param.device), scaling)
            self.grad_norm = None if self.max_grad_norm is None else norm
            for item in items:  # keep no gradient alive
                item.grad = _NOTHING[item.grad.dtype]
                item.entries = None
        return loss

    @torch.no_grad()
    def flush(self) -> None:
        """Bring rows of sparsely updated tables up to date, as a dense AdamW would have them.

        Between two gradients that name it a row is not touched. What the steps that it missed would
        have done is made up for when it is next named: decay of its weight and moments, and what
        its momentum would have moved it by. Call before reading or saving the weights.
        """
        for group in self.param_groups:
            waiting.catch_up(group, self.state)

    finalize = flush

    @torch.no_grad()
    def refresh_master(self) -> None:
        """Take master weights from the parameters again, after these were written by hand."""
        for group in self.param_groups:
            for param in group["params"]:
                own = self.state.get(param, {})
                if "master" not in own:
                    continue
                weight, layout = param.detach().contiguous(), self._layout(param)
                if group["mode"] == "as_published":
                    own["master"].copy_(weight)
                else:
                    layout.live(own["master"]).copy_(layout.gather(weight))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state as ``torch.optim.Optimizer`` does, but every tensor keeps its dtype: float32
        state of a bfloat16 parameter comes back bit-equal.

        State of ``torch.optim.AdamW`` and ``Adam`` is taken over. Raises ``UsageError`` for that of
        another optimizer, before anything is changed.
        """
        groups, saved = state_dict["param_groups"], state_dict["state"]
        sizes = [len(group["params"]) for group in groups]
        mine = [len(group["params"]) for group in self.param_groups]
        require(sizes == mine, "state_dict", f"groups of {mine} parameters", sizes)
        options = [
            {**now, **group, "params": now["params"]}
            for now, group in zip(self.param_groups, groups, strict=True)
        ]
        made: dict[Tensor, dict[str, Any]] = {}
        for group, given in zip(options, groups, strict=True):
            for param, key in zip(group["params"], given["params"], strict=True):
                if key in saved:
                    made[param] = state.loaded(param, saved[key], group)
            check_options(group)
        super().load_state_dict({**state_dict, "state": {}})
        for group, known in zip(self.param_groups, options, strict=True):
            group.update({name: value for name, value in known.items() if name not in group})
        self.state.update(made)
        self.params_changed()

    def explain(self) -> Choice:
        """The backend that a step runs, and why."""
        params = [p for group in self.param_groups for p in group["params"]]
        return choice(self.backend, params[0].device, {p.dtype for p in params})

    def _group(self, param: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(p is param for p in group["params"]):
                return group
        raise expected("param", "a parameter of this optimizer", list(param.shape))

    def _layout(self, param: Tensor) -> KeptLayout:
        if param not in self._layouts:
            self._layouts[param] = state.layout_of(param, self.state.get(param, {}))
        return self._layouts[param]

    def params_changed(self) -> None:
        """Drop what is derived from parameters, state and groups, after a write from outside."""
        self._engine = Engine(self.backend)
        self._layouts: dict[Tensor, KeptLayout] = {}
        self._hyper: Tensor | None = None
        self._hyper_values: list[list[float]] = []
        self._ready: list[Ready] = []
        self._modes: list[tuple[str, Any]] = []
        self._listed: list[Item] = []
        self._sums: Mapping[Tensor, Sums] = {}

    def _fill_hyper(self, device: torch.device) -> Tensor:
        rows, tensors = [], []
        for place, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                tensors.append((place, lr))
                lr = 0.0
            rows.append([lr, *group["betas"], group["eps"], group["weight_decay"]])
        if self._hyper is None or self._hyper_values != rows:
            values = torch.tensor(rows, dtype=torch.float64)
            if self._hyper is None or self._hyper.shape != values.shape:
                self._hyper = values.to(device)
            else:
                pinned = values.pin_memory() if device.type == "cuda" else values
                self._hyper.copy_(pinned, non_blocking=True)
            self._hyper_values = rows
        for place, lr in tensors:
            self._hyper[place, 0].copy_(lr.squeeze())
        return self._hyper

    def _straighten(self) -> None:
        """Bring waiting rows up to date before what they wait through changes its course."""
        if self._ready:
            tables = [one.param for one in self._ready if one.item and one.item.clock]
        else:
            every = (p for group in self.param_groups for p in group["params"])
            tables = [p for p in every if "clock" in self.state.get(p, ()) or is_sparse(p.grad)]
        if tables:
            for group in self.param_groups:
                waiting.straighten(group, tables, self.state)

    def _items(self, sums: Mapping[Tensor, Sums]) -> list[Item]:
        """The step's items: last step's with new gradients if nothing else has changed."""
        modes = [(group["mode"], group["master_weights"]) for group in self.param_groups]
        if modes != self._modes or not self._same(sums) or not self._again():
            self._sums, self._modes, self._layouts = dict(sums), modes, {}
            self._ready = [
                self._make(param, group, place)
                for place, group in enumerate(self.param_groups)
                for param in group["params"]
            ]
            self._listed = [one.item for one in self._ready if one.item is not None]
        return self._listed

    def _make(self, param: Tensor, group: dict[str, Any], place: int) -> Ready:
        own = self.state[param]
        return Ready(param, own, item_of(param, own, group, place, self._layout(param), self._sums))

    def _again(self) -> bool:
        """True if every parameter is where it was, with the state that it had."""
        now = [param for group in self.param_groups for param in group["params"]]
        states, ready = self.state, self._ready
        return len(now) == len(ready) and all(
            one.again(param, states.get(param)) for one, param in zip(ready, now, strict=True)
        )

    def _same(self, sums: Mapping[Tensor, Sums]) -> bool:
        mine = self._sums
        return len(sums) == len(mine) and all(
            param in mine and all(a is b for a, b in zip(pair, mine[param], strict=True))
            for param, pair in sums.items()
        )
