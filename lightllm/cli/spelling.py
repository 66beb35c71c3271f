"""Names that a configuration may use, and the nearest of them to one that it may not."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_args, get_type_hints

PACKAGES = (
    "lightllm.modules",
    "lightllm.models",
    "lightllm.datamodules",
    "lightllm.callbacks",
    "torch.optim",
    "lightning.pytorch.callbacks",
)
"""Where the classes that configurations name come from."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The most similar of the `known` names, whatever the case of its letters; None if none is similar."""
    by_lower = {one.lower(): one for one in reversed(list(known))}
    near = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None


def class_paths() -> dict[str, str]:
    """Class paths by the name of the class."""
    paths: dict[str, str] = {}
    for package in PACKAGES:
        module = import_module(package)
        for name in vars(module).get("__all__") or vars(module):
            if isinstance(vars(module).get(name), type):
                paths.setdefault(name, f"{package}.{name}")
    return paths


def fields_of(class_path: str) -> dict[str, str | None]:
    """The fields of a class, inherited ones too, and the class path of those that have fields themselves."""
    package, _, name = class_path.rpartition(".")
    try:
        owner = getattr(import_module(package), name)
    except (ImportError, AttributeError):
        return {}
    fields: dict[str, str | None] = {}
    for parent in owner.__mro__[:-1] if isinstance(owner, type) else [owner]:
        make = vars(parent).get("__init__", parent) if isinstance(parent, type) else parent
        for parameter in inspect.signature(make).parameters.values():
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and parameter.name != "self":
                hint = _hints(make).get(parameter.name, _hints(parent).get(parameter.name))
                fields.setdefault(parameter.name, _own_class(hint))
    return fields


def _hints(owner: Any) -> dict[str, Any]:
    """The types of a function's parameters, or of a dataclass's fields."""
    try:
        return get_type_hints(owner)
    except (NameError, TypeError):
        return {}  # one names something that is imported for type checking alone, or that a parent class imports


def _own_class(hint: Any) -> str | None:
    """The class path of this project's class that a type allows, if there is one."""
    for one in (hint, *get_args(hint)):
        if isinstance(one, type) and one.__module__.startswith("lightllm."):
            return f"{one.__module__}.{one.__qualname__}"
    return None
