"""Hidden states of a frozen prefix, computed once for each sentence and kept across epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sensikernels._core.checks import require
from sensikernels._core.hooks import hooked
from sensikernels.hf.packed.tokens import Tokens

MIB = 2**20


class FrozenPrefixCache:
    """Outputs of the lowest ``depth`` layers for each sentence, by its token ids.

    Right only while nothing there trains and no dropout is active there: both are checked at
    every use. Kept states belong to the values of the frozen weights, however they were written,
    and to the dtypes and modes they were computed in: at any change the cache is emptied. Beyond
    ``limit_mib`` nothing more is kept and sentences are computed again. A use reads the weights
    once, of the words those that occur, which a copy of the table is held for, and waits for the
    device. Made by ``cache_frozen_prefix``.
    """

    def __init__(self, depth: int, *, limit_mib: float) -> None:
        self.depth, self._limit = depth, limit_mib * MIB
        self._kept: dict[bytes, Tensor] = {}
        self.held = 0
        self._made_of: bytes | None = None
        self._words = torch.empty(0)
        self.hits = self.misses = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model computes its own prefix: it may train what this one holds frozen."""
        return

    def __reduce__(self) -> Any:
        """Pickle the cache empty."""
        return _empty, (self.depth, self._limit / MIB)

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tokens,
        compute: Callable[[Tokens], Tensor],
        prefix: Sequence[nn.Module],
        words: Tensor,
    ) -> Tensor:
        """Hidden states ``[tokens, hidden]`` after ``prefix``; ``compute`` makes absent ones.

        ``words``: the table in ``prefix`` that ``tokens.input_ids`` are the rows of.
        """
        self._check(prefix)
        self._renew(prefix, words, tokens.input_ids)
        keys, bounds = _keys(tokens)
        absent = list({key: i for i, key in enumerate(keys) if key not in self._kept}.values())
        made: dict[bytes, Tensor] = {}
        if absent:
            part, ends = _chosen(tokens, [bounds[i] for i in absent])
            hidden = compute(part)
            pieces = [hidden[a:b] for a, b in ends]
            made = {keys[i]: piece for i, piece in zip(absent, pieces, strict=True)}
            self._keep(made)
        self.misses += len(absent)
        self.hits += len(keys) - len(absent)
        rows = [made[key] if key in made else self._kept[key] for key in keys]
        filling = len(tokens.input_ids) - bounds[-1][1]
        return torch.cat([*rows, rows[0].new_zeros(filling, rows[0].shape[-1])])

    def _keep(self, made: dict[bytes, Tensor]) -> None:
        for key, piece in made.items():
            size = piece.numel() * piece.element_size()
            if self.held + size <= self._limit:
                self._kept[key] = piece.clone()
                self.held += size

    def _check(self, prefix: Sequence[nn.Module]) -> None:
        trained = [p for module in prefix for p in module.parameters() if p.requires_grad]
        require(not trained, "model", "a frozen prefix", f"{len(trained)} trained parameters in it")
        rates = (getattr(owner, name) for owner, name in dropouts(prefix) if owner.training)
        rate = max(rates, default=0.0)
        require(rate == 0, "model", "no dropout in the frozen prefix", f"p={rate}")
        called = [type(m).__name__ for module in prefix for m in module.modules() if hooked(m)]
        require(not called, "model", "no hooks in the kept prefix", f"hooks on {called[:3]}")

    def _renew(self, prefix: Sequence[nn.Module], words: Tensor, ids: Tensor) -> None:
        """Empty the cache if what it was made of has changed; of words those of ``ids`` count."""
        made_of = _state_of(prefix, words)
        if made_of != self._made_of or not torch.equal(words[ids], self._words[ids]):
            self._kept.clear()
            self.held, self._made_of = 0, made_of
            self._words = words.detach().clone()


def _empty(depth: int, limit_mib: float) -> FrozenPrefixCache:
    return FrozenPrefixCache(depth, limit_mib=limit_mib)


def _state_of(prefix: Sequence[nn.Module], words: Tensor) -> bytes:
    """All weights but ``words``, by a random projection of each row, and what else decides."""
    every = [t for m in prefix for t in (*m.parameters(), *m.buffers())]
    tensors = [t.detach() for t in every if t is not words]
    device = words.device.type
    modes = [
        *((t.dtype, tuple(t.shape), str(t.device)) for t in every),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.get_float32_matmul_precision(),
    ]
    with torch.autocast(device, enabled=False):
        rows = torch.cat([_projected(t) for t in tensors])
    return repr(modes).encode() + rows.cpu().numpy().tobytes()


def _projected(tensor: Tensor) -> Tensor:
    """float64 ``[rows]``: products with one random vector.

    A change of the tensor is missed only if it is orthogonal to that vector in every row.
    """
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    wide = matrix if matrix.element_size() >= 4 else matrix.float()
    return torch.mv(wide, _direction(wide.shape[1], wide.dtype, wide.device)).double()


@cache
def _direction(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(width, generator=generator).to(device, dtype)


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Compute a kept prefix as if it were not, inside the block."""
    held = [(m, m.prefix_cache) for m in model.modules() if getattr(m, "prefix_cache", None)]
    for module, _ in held:
        module.prefix_cache = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, cache in held:
            module.prefix_cache = cache


def frozen_depth(below: Sequence[nn.Module], layers: Sequence[nn.Module]) -> int:
    """The number of lowest layers that train nothing; 0 if a module below them trains."""
    if any(p.requires_grad for module in below for p in module.parameters()):
        return 0
    trained = (any(p.requires_grad for p in layer.parameters()) for layer in layers)
    return next((i for i, trains in enumerate(trained) if trains), len(layers))


def _keys(tokens: Tokens) -> tuple[list[bytes], list[tuple[int, int]]]:
    every = (tokens.input_ids, tokens.position_ids, tokens.token_type_ids)
    table = torch.stack(every, 1).cpu().numpy()
    ends = tokens.cu_seqlens.tolist()
    bounds = list(zip(ends[:-1], ends[1:], strict=True))
    return [table[a:b].tobytes() for a, b in bounds], bounds


def _chosen(
    tokens: Tokens, bounds: Sequence[tuple[int, int]]
) -> tuple[Tokens, list[tuple[int, int]]]:
    """The tokens of the given sequences alone, and the bounds of each among them."""
    device = tokens.input_ids.device
    rows = torch.cat([torch.arange(a, b) for a, b in bounds]).to(device)
    ends = [0]
    for a, b in bounds:
        ends.append(ends[-1] + b - a)
    part = Tokens(
        input_ids=tokens.input_ids[rows],
        position_ids=tokens.position_ids[rows],
        token_type_ids=tokens.token_type_ids[rows],
        cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device),
        max_length=tokens.max_length,
        places=rows,
        shape=(len(bounds), tokens.max_length),
    )
    return part, list(zip(ends[:-1], ends[1:], strict=True))


def dropouts(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Owner and attribute of every rate of dropout in ``modules``.

    That of dropout modules, and the numbers that attentions without such a module read.
    """
    for module in (inner for outer in modules for inner in outer.modules()):
        if isinstance(module, nn.Dropout):
            yield module, "p"
        elif isinstance(getattr(module, _ATTENTION, None), float):
            yield module, _ATTENTION


_ATTENTION = "attention_dropout"
