"""A kernel as one launch compiles it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel, the types of its arguments, its constants, and what its machine code must hold.

    Attributes:
        name: unique among all cases; the tables of results are read by it.
        kernel: the ``triton.jit`` function.
        signature: the type of each run-time argument: ``"*bf16"``, ``"i32"``,
            ``"tensordesc<bf16[64, 64]>"``.
        divisible: the arguments that a launch finds divisible by 16. Without them the report
            describes a kernel that nobody runs.
        constexprs: the value of each compile-time argument.
        num_warps, num_stages: as at the launch.
        gemm: the kernel must use the tensor cores and asynchronous copies. If False, only stack,
            spills and shared memory are checked.
        wgmma: False where the tile is too small for the target's matrix instruction.
        targets: the targets it is compiled for; empty: all of them.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    divisible: Sequence[str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    gemm: bool = False
    wgmma: bool = True
    targets: Sequence[str] = ()


def case(
    kernel: Any,
    types: Mapping[str, str],
    options: Mapping[str, Any],
    *,
    name: str = "",
    multiples: str = "",
    **limits: Any,
) -> Case:
    """The case of a launch ``kernel[grid](…, **options)``.

    Args:
        kernel: the ``triton.jit`` function.
        types: the type of the arguments named, separated by spaces, in each key.
        options: the keyword arguments: constants, ``num_warps`` and ``num_stages``.
        name: by default made of the kernel, the types of its pointers and its constants.
        multiples: the integers that a launch finds divisible by 16; pointers always are.
        limits: ``gemm``, ``wgmma`` and ``targets`` of ``Case``.
    """
    signature = {one: kind for names, kind in types.items() for one in names.split()}
    constexprs = dict(options)
    warps, stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
    pointers = [one for one, kind in signature.items() if kind.startswith("*")]
    kinds = dict.fromkeys(signature[one].removeprefix("*") for one in pointers)
    sizes = [f"{one}={value}" for one, value in constexprs.items()]
    return Case(
        name=name or "/".join([kernel.__name__, "-".join(kinds), *sizes]),
        kernel=kernel,
        signature=signature,
        divisible=(*pointers, *multiples.split()),
        constexprs=constexprs,
        num_warps=warps,
        num_stages=stages,
        **limits,
    )


def product_constants(dtype: str, form: str) -> dict[str, Any]:
    """The constants that kernels with a matrix product share, by the form of the launch."""
    return {
        "DESCRIPTORS": form.endswith("bulk"),
        "EVEN": not form.endswith("edges"),
        "PRECISION": "tf32" if dtype == "fp32" and form != "exact" else "ieee",
        "UPCAST": False,
    }
