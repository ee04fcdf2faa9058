"""Hooks of modules: code that runs beside a class's own forward."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks that change nothing: transformers' act while outputs are recorded, torch's note names.
_IDLE = ("transformers.utils.output_capturing", "torch.utils.module_tracker")


def hooked(module: nn.Module) -> bool:
    """True if a call of ``module`` runs hooks, or a forward set on the instance."""
    state = vars(module)
    if "forward" in state:
        return True
    for name in _CALLED:
        if state[name] and any(map(_acts, state[name].values())):
            return True
    return False


def bare(module: Any, *kinds: type) -> bool:
    """True if ``module`` is exactly one of ``kinds`` and a call does nothing besides."""
    return type(module) in kinds and not hooked(module) and not hooked_everywhere()


def hooked_everywhere() -> bool:
    """True if hooks are registered for the calls of all modules."""
    for name in _CALLED:
        hooks = getattr(torch_module, f"_global{name}")
        if hooks and any(map(_acts, hooks.values())):
            return True
    return False


def _acts(hook: Any) -> bool:
    return getattr(hook, "__module__", None) not in _IDLE
