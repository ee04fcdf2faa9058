"""Whether calling a module runs more than its class's forward."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# transformers leaves hooks behind that act only while outputs are being recorded.
_IDLE = "transformers.utils.output_capturing"


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` runs hooks, or a forward that somebody put on the instance."""
    state = vars(module)
    if "forward" in state:
        return True
    for name in _CALLED:
        if state[name] and any(_acts(hook) for hook in state[name].values()):
            return True
    return any(getattr(torch_module, f"_global{name}") for name in _CALLED)


def bare(module: Any, *kinds: type) -> bool:
    """Whether ``module`` is exactly one of ``kinds`` and calling it does nothing besides."""
    return type(module) in kinds and not hooked(module)


def _acts(hook: Any) -> bool:
    return getattr(hook, "__module__", None) != _IDLE
