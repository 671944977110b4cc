"""Changes modules of a process under test as they are imported. Imports the standard library alone."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def after_import(changes: Mapping[str, Callable[[ModuleType], None]]) -> None:
    """Call, for each module that is named, its change once the module has run. Modules that are imported already stay as they are."""
    sys.meta_path.insert(0, _AfterImport(changes))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds what Python would find."""

    def __init__(self, changes: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._changes = changes

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self._changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self._changes[name](module)

            loader.exec_module = exec_module
        return spec
