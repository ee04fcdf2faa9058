"""Tolerances that come from data: as good as PyTorch in the same dtype, up to one rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_to_reference(
    got: Tensor, same_dtype: Tensor, exact: Tensor, *, factor: float = 2.0
) -> None:
    """Hold the error of ``got`` against that of PyTorch in the same dtype, both from ``exact``.

    With ``eps`` of ``got.dtype``, and errors measured in float64:

    - the largest error is at most ``factor * (largest error of same_dtype + eps * max|exact|)``;
    - the RMS error is at most ``factor * RMS error of same_dtype + eps * RMS of exact``.

    The first finds a wrong element, the second an error spread over all of them. NaN and infinity
    must stand at the same places as in ``exact``, so an unwritten (poisoned) element fails.

    Args:
        got: what is under test, any shape, a floating dtype.
        same_dtype: the reference computed by PyTorch, same shape and dtype as ``got``.
        exact: the reference computed in float64, same shape.
    """
    assert exact.dtype == torch.float64, f"exact: expected float64, got {exact.dtype}"
    assert got.dtype == same_dtype.dtype, f"dtype: expected {same_dtype.dtype}, got {got.dtype}"
    assert got.shape == same_dtype.shape == exact.shape, (
        f"shape: expected {tuple(exact.shape)}, got {tuple(got.shape)} "
        f"(same_dtype {tuple(same_dtype.shape)})"
    )
    if got.numel() == 0:
        return
    got, same, exact = (t.detach().double().cpu() for t in (got, same_dtype, exact))
    eps = torch.finfo(same_dtype.dtype).eps

    finite = exact.isfinite()
    odd = ~finite
    assert torch.equal(got[odd].nan_to_num(7.0), exact[odd].nan_to_num(7.0)), "NaN or inf differ"
    wrong = finite & ~got.isfinite()
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {got.numel()} elements are not finite, "
        f"first at {wrong.nonzero()[0].tolist()}"
    )
    if not finite.any():
        return
    got, same, exact = got[finite], same[finite], exact[finite]
    same = torch.where(same.isfinite(), same, exact)

    error, allowed = (got - exact).abs(), (same - exact).abs()
    bound = factor * (allowed.max() + eps * exact.abs().max())
    assert error.max() <= bound, (
        f"largest error {error.max():.3e} > {bound:.3e} "
        f"(PyTorch's own {allowed.max():.3e}, max|exact| {exact.abs().max():.3e})"
    )
    rms = factor * _rms(allowed) + eps * _rms(exact)
    assert _rms(error) <= rms, (
        f"RMS error {_rms(error):.3e} > {rms:.3e} "
        f"(PyTorch's own {_rms(allowed):.3e}, RMS of exact {_rms(exact):.3e})"
    )


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
