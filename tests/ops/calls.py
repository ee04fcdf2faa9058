"""A right call and a step of an operator, as each op writes them down in its own ``calls.py``.

``tests/ops/<op>/calls.py`` holds one ``CALLS``; ``gather`` finds them all. The calls are damaged by
``tests/ops/malformed``, the steps taken by ``.ci/installed.py``, which has torch and the package
alone: no ``calls.py`` imports anything else, but for this file, ``inputs.py`` and each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from inspect import isfunction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sensikernels
from sensikernels._core import extension

BACKENDS = ("native", "reference")
"""What a call runs by here; Triton's kernels need a device or the interpreter."""


@dataclass(frozen=True, kw_only=True)
class RightCall:
    """A call that is right, and which damages leave it so.

    ``accepts``: ``argument`` or ``argument:damage``; what is no index has any values.
    ``indices``: arguments whose values name places, and whether they ascend.
    """

    name: str
    call: Callable[..., Any]
    arguments: dict[str, Any]
    accepts: frozenset[str] = frozenset()
    indices: tuple[str, ...] = ()
    ascending: tuple[str, ...] = ()

    def run(self, **damaged: Any) -> Any:
        """The call, with ``damaged`` in place of some arguments; what is written to is a copy."""
        return self.call(**{k: _copied(v) for k, v in {**self.arguments, **damaged}.items()})


@dataclass(frozen=True)
class Step:
    """Forward and backward of a public op, and the devices that its kernels serve.

    ``run(backend, device)`` gives outputs, then gradients, of inputs drawn at random.
    """

    name: str
    run: Callable[[str, str], list[Tensor]]
    native: tuple[str, ...] = ("cpu",)
    triton: tuple[str, ...] = ("cpu", "cuda")

    def serves(self, backend: str, device: str) -> bool:
        """Whether it runs there; the reference does anywhere."""
        return backend == "reference" or device in getattr(self, backend)


def _none() -> Iterable[RightCall]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Calls:
    """All that an op brings: right calls of three kinds, and its steps.

    ``by_address``: launchers whose tables hold addresses, which none can look behind.
    """

    operators: Callable[[], Iterable[RightCall]] = _none
    functions: Callable[[], Iterable[RightCall]] = _none
    launchers: Callable[[], Iterable[RightCall]] = _none
    by_address: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()


def gather() -> dict[str, Calls]:
    """The ``CALLS`` of every folder beside this file that has a ``calls.py``."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/calls.py"))
    return {folder: import_module(f"tests.ops.{folder}.calls").CALLS for folder in folders}


def public_functions() -> set[str]:
    """The ops that ``sensikernels`` itself exports."""
    found = {name: getattr(sensikernels, name) for name in sensikernels.__all__}
    home = "sensikernels.ops."
    return {n for n, f in found.items() if isfunction(f) and f.__module__.startswith(home)}


def operator(name: str, base: str = "", **arguments: Any) -> RightCall:
    """A call of an operator by the names of its schema; ``base`` tells several of one apart."""
    return function(base or name, getattr(torch.ops.sensikernels, name), **arguments)


def function(name: str, call: Callable[..., Any], /, **arguments: Any) -> RightCall:
    """A call of a public function; ``accepts``, ``indices`` and ``ascending`` are RightCall's."""
    accepts = frozenset(arguments.pop("accepts", ()))
    rest = {k: tuple(arguments.pop(k, ())) for k in ("indices", "ascending")}
    return RightCall(name=name, call=call, arguments=arguments, accepts=accepts, **rest)


def launcher(name: str, **arguments: Any) -> RightCall:
    """A call of a private launcher; all its tensors and lists are damaged in their values too."""
    indices = tuple(
        k
        for k, v in arguments.items()
        if isinstance(v, Tensor | list) and k not in ("seed", "minimum", "multiple")
    )
    call = getattr(extension.ops(), name)
    return RightCall(name=name, call=call, arguments=arguments, indices=indices, ascending=indices)


def _copied(value: Any) -> Any:
    """Tensors of its own, so that no call finds what another has left."""
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return value.clone() if isinstance(value, Tensor) else value
