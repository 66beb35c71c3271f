"""The configurations that come with the package."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""The folder of shipped YAML files."""


def config_names() -> list[str]:
    """Every shipped configuration, as `folder/name.yaml`."""
    return sorted(str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.yaml"))


def summary(name: str) -> str:
    """The first line of a configuration, its comment."""
    return (CONFIGS / name).read_text().splitlines()[0].lstrip("# ")


def copy_config(name: str, to: Path) -> Path:
    """Copy a shipped configuration to a file or folder of one's own; the copy.

    Raises:
        ValueError: There is no such configuration, or a file is there already.
    """
    source = CONFIGS / name
    if name not in config_names():
        raise ValueError(f"no configuration {name!r}: `lightllm configs` lists them")
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise ValueError(f"{str(target)!r} exists already: name another file")
    shutil.copyfile(source, target)
    return target


def shipped_config(arguments: list[str]) -> list[str]:
    """The command line with shipped configurations for those `--config` files that do not exist here.

    `configs/finetune/lora.yaml` and `finetune/lora.yaml` both mean the shipped one, wherever the command is run.
    """
    resolved = list(arguments)
    for index, (flag, value) in enumerate(pairwise(arguments)):
        shipped = CONFIGS / value.removeprefix("configs/")
        if flag in ("-c", "--config") and not Path(value).exists() and shipped.is_file():
            resolved[index + 1] = str(shipped)
    return resolved
