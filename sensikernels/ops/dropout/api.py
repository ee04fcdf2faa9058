"""``dropout``: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from sensikernels import _settings
from sensikernels._checks import require, require_one_of
from sensikernels._compile import constant_when_traced
from sensikernels.errors import UsageError
from sensikernels.ops.dropout import native
from sensikernels.ops.dropout.autograd import Dropout
from sensikernels.ops.dropout.reference import DRAWS


def dropout(
    x: Tensor,
    p: float = 0.5,
    *,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by 1 / (1 - p).

    The keep probability is rounded to a multiple of 2⁻¹⁶ and the scale is that multiple's own
    inverse, so the mean is exact. Dropped elements are 0 even where ``x`` is not finite. The mask
    depends on ``seed`` and the element's position alone: not on dtype, device, threads or backend.

    Args:
        x: any shape, a floating dtype.
        p: probability in [0, 1].
        training: False returns ``x`` itself.
        seed: int64 ``[]`` on x's device; drawn from torch's generator of that device if absent.
        backend: "auto", "reference", "native" or "triton".

    Raises:
        UsageError: p outside [0, 1], an integer ``x``, a seed of another kind, a backend that
            cannot serve.
    """
    require(0.0 <= p <= 1.0, "p", "a probability in [0, 1]", p)
    require(x.is_floating_point(), "x", "a floating dtype", x.dtype)
    if not training or p == 0.0:
        return x
    if seed is None:
        seed = torch.randint(1 << 62, (), device=x.device)
    ok = seed.dtype == torch.int64 and seed.dim() == 0 and seed.device == x.device
    require(ok, "seed", f"int64 [] on {x.device}", f"{seed.dtype} {list(seed.shape)}")
    threshold = round((1.0 - p) * DRAWS)
    chosen, _ = choose(x, backend)
    out: Tensor = Dropout.apply(x, seed, threshold, chosen)  # type: ignore[no-untyped-call]
    return out


def choose(x: Tensor, backend: str = "auto") -> tuple[str, str]:
    """The backend that serves ``x`` and why. Raises UsageError for a named one that cannot."""
    require_one_of(backend, "backend", _settings.BACKENDS)
    return _choose(x.device.type, x.dtype, backend)


@constant_when_traced
def _choose(device: str, dtype: torch.dtype, backend: str) -> tuple[str, str]:
    asked = _settings.backend() if backend == "auto" else backend
    refusals = {
        "reference": None,
        "native": native.refusal(device, dtype),
        "triton": _triton_refusal(device, dtype),
    }
    if asked != "auto":
        if refusals[asked]:
            raise UsageError(f"backend: {asked} cannot serve this call: {refusals[asked]}")
        return asked, "asked for by name"
    for name in ("native", "triton"):
        if refusals[name] is None and not (name == "triton" and device == "cpu"):
            return name, f"the fastest for {device}"
    return "reference", "; ".join(f"{name}: {why}" for name, why in refusals.items() if why)


def _triton_refusal(device: str, dtype: torch.dtype) -> str | None:
    if device == "cpu" and not _settings.interpreting():
        return "x is on the CPU"
    return None if dtype != torch.float64 else "it serves 16 and 32 bit floats"


def explain(x: Tensor, backend: str = "auto") -> str:
    """One line: which backend serves ``x``, and why."""
    name, why = choose(x, backend)
    return f"dropout: {name} ({why})"
