"""transformers' Auto classes learn of compact models when they are imported, not before.

``import sensikernels`` brings no transformers, and yet ``AutoModel….from_pretrained`` of a compact
checkpoint works after it, whichever came first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from threading import local
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"


def register_when_imported() -> None:
    """Register the compact classes now if transformers' registry is here, else once it comes."""
    if _CONFIGS in sys.modules:
        import_module("sensikernels.hf.families")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds transformers' modules as anybody would, and has something done after they ran."""

    def __init__(self) -> None:
        self.nested = local()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec


class _Then(Loader):
    """Loads a module, and registers when the outermost of transformers' imports is done.

    Not sooner: its modules import each other in circles.
    """

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The module, as the wrapped loader makes it."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Run the module; nothing of this loader stays on it."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        nested = self._finder.nested
        depth = vars(nested).setdefault("depth", 0)
        nested.depth = depth + 1
        try:
            self._loader.exec_module(module)
        finally:
            nested.depth = depth
        if depth == 0 and _CONFIGS in sys.modules and self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
            import_module("sensikernels.hf.families")
