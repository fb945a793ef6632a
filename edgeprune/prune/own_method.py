"""Pruning methods in a user's own Python files."""

import importlib.util
import inspect
import sys
from pathlib import Path

from edgeprune.errors import PruningError
from edgeprune.prune.method import PruningMethod
from edgeprune.prune.registry import METHODS, register_method


def names_a_file(name: str) -> bool:
    """Whether a method is named as ``path/to/file.py:Class``."""
    return ".py:" in name


def load_own_method(name: str) -> type[PruningMethod]:
    """Import ``path/to/file.py:Class`` and register the class under its ``name``. The file is executed.

    Raises:
        PruningError: No such file or class, the file fails, or the class is no method.
    """
    path_text, _, class_name = name.rpartition(":")
    path = Path(path_text).resolve()
    if not path.is_file():
        raise PruningError(f"{path_text} does not exist: name a method of your own as path/to/file.py:Class")
    module_name = f"edgeprune_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PruningError(f"{path_text} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Loaded again, the file replaces what it brought before.
    for known in [name for name, method in METHODS.items() if method.__module__ == module_name]:
        del METHODS[known]
    # Dataclasses look their module up while they are made.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise PruningError(f"{path_text} cannot be imported ({type(error).__name__}: {error})") from error
    method = getattr(module, class_name, None)
    if not (inspect.isclass(method) and issubclass(method, PruningMethod)) or inspect.isabstract(method):
        found = [
            key
            for key, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, PruningMethod) and not inspect.isabstract(value)
        ]
        raise PruningError(
            f"{path_text} has no pruning method '{class_name}', it has: {', '.join(found) or 'none'}; "
            "a method is a frozen dataclass derived from PruningMethod"
        )
    # The file may have registered it itself.
    return method if METHODS.get(method.name) is method else register_method(method)
