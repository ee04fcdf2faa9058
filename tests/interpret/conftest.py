"""Fixtures of tests in a process that imports Triton with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def interpreted() -> None:
    """Skip where the kernels were decorated for a GPU: they cannot run on this process's CPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs its own process, TRITON_INTERPRET=1 before triton is imported")
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.zeros, (triton.JITFunction, InterpretedFunction)):
        pytest.fail("triton.language is not what this version of the tests knows")
    if not isinstance(tl.zeros, InterpretedFunction):
        pytest.skip("triton was imported before TRITON_INTERPRET=1 was set")


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def descriptors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to address memory, the second as on Hopper."""
    from sensikernels.ops.common import triton_launch

    device = triton_launch.INTERPRETED._replace(descriptors=request.param)
    monkeypatch.setattr(triton_launch, "INTERPRETED", device)
