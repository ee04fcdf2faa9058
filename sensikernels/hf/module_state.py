"""Users' hooks, modes and attributes, kept while a module is replaced or changes class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature
from typing import Any

from torch import nn

HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
"""Where a module keeps hooks of every kind: forward, pre, backward, state dict."""

_PLAIN = frozenset(vars(nn.Linear(1, 1, device="meta")))


def added(module: nn.Module) -> dict[str, Any]:
    """Attributes that a plain ``nn.Linear`` does not have."""
    return {name: value for name, value in vars(module).items() if name not in _PLAIN}


def carry(old: nn.Module, new: nn.Module, attributes: dict[str, Any]) -> None:
    """Give ``new`` the hooks and mode of ``old``, and ``attributes``.

    The dictionaries of hooks are shared, so that handles made earlier still remove their hooks.
    """
    for name in HOOKS:
        vars(new)[name] = vars(old)[name]
    vars(new).update(attributes)
    new.training = old.training


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every submodule its own training mode back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Changed:
    """A mixin for instances whose class was changed in place; ``original`` is the class before.

    It is still that class to ``isinstance``, by name, in copies and in pickles.
    """

    original: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(2)
        mixin = type(self).__mro__[1]
        return _blank, (mixin, self.original), *reduced[2:]


class ChangedHead(Changed):
    """A ``Changed`` of a whole model, whose ``forward`` keeps the signature of the class before.

    transformers' Trainer reads there which columns a model takes.
    """

    def by_name(self, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of ``forward`` by the names that they have there."""
        return named if not given else dict(zip(_names(self.original), given, strict=False)) | named


def change_class(module: Any, mixin: type) -> None:
    """Put ``mixin`` (a ``Changed``) in front of ``module``'s class, in place."""
    kind: Any = type(module)
    module.__class__ = _changed(mixin, kind)


def class_of(module: nn.Module) -> type:
    """The class of ``module``, or the one it had before ``change_class``."""
    return module.original if isinstance(module, Changed) else type(module)


def change_back(module: Any) -> None:
    """Undo ``change_class``."""
    assert isinstance(module, Changed)
    module.__class__ = module.original


@cache
def _changed(mixin: type, original: type) -> type:
    names = ("__module__", "__qualname__", "__doc__")
    body = {name: getattr(original, name) for name in names} | {"original": original}
    if issubclass(mixin, ChangedHead):
        body["forward"] = _as_stock(mixin, original)
    return type(original.__name__, (mixin, original), body)


def _as_stock(mixin: Any, original: Any) -> Any:
    @wraps(original.forward)
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        return mixin.forward(self, *given, **named)

    return forward


@cache
def _names(kind: Any) -> tuple[str, ...]:
    """The names of the arguments of ``kind.forward`` after the instance."""
    return tuple(signature(kind.forward).parameters)[1:]


def _blank(mixin: type, original: type) -> Any:
    kind: Any = _changed(mixin, original)
    return kind.__new__(kind)
