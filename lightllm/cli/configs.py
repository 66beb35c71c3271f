"""Configurations: those that come with the package, and those that a command line names."""

from __future__ import annotations

import shutil
from difflib import get_close_matches
from pathlib import Path

import yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""The folder of shipped YAML files."""


def config_names() -> list[str]:
    """Every shipped configuration, as `folder/name.yaml`."""
    return sorted(file.relative_to(CONFIGS).as_posix() for file in CONFIGS.rglob("*.yaml"))


def summary(name: str) -> str:
    """The first line of a configuration, its comment."""
    return (CONFIGS / name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def copy_config(name: str, to: Path) -> Path:
    """Copy a shipped configuration to a file or folder of one's own; the copy.

    Raises:
        ValueError: There is no such configuration, or a file is there already.
    """
    source = _shipped(name)
    if source is None:
        raise ValueError(f"no configuration {name!r}{_hint(name)}: `lightllm configs` lists them")
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise ValueError(f"{str(target)!r} exists already: name another file with --to")
    if not target.parent.is_dir():
        raise ValueError(f"no such folder: {str(target.parent)!r}")
    shutil.copyfile(source, target)
    return target


def found_configs(arguments: list[str]) -> list[str]:
    """The command line with the shipped configurations for those `--config` files that do not exist here.

    `configs/finetune/lora.yaml` and `finetune/lora.yaml` both mean the shipped one, wherever the command is run.

    Raises:
        ValueError: There is no such file, or it is no YAML that a configuration could be.
    """
    found: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if equals and flag == "--config":
            found += [flag, _checked(value)]
        elif found[-1:] in (["-c"], ["--config"]):
            found.append(_checked(argument))
        else:
            found.append(argument)
    return found


def _checked(name: str) -> str:
    file = Path(name) if Path(name).is_file() else _shipped(name)
    if file is None:
        raise ValueError(
            f"no configuration file {name!r}{_hint(name)}; `lightllm configs` lists those that come with lightllm"
        )
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no configuration: it has no fields, such as model: and data:")
    return str(file)


def _shipped(name: str) -> Path | None:
    inside = name.removeprefix("configs/")
    return CONFIGS / inside if inside in config_names() else None


def _hint(name: str) -> str:
    """The nearest existing name: a file in the same folder, or a shipped configuration."""
    folder = Path(name).parent
    beside = [str(file) for file in folder.glob("*.yaml")] if folder.is_dir() else []
    near = get_close_matches(name.removeprefix("configs/"), [*beside, *config_names()], n=1, cutoff=0.6)
    if not near:
        ends = [one for one in config_names() if Path(one).stem == Path(name).stem]
        near = ends[:1]
    return f" (did you mean {near[0]!r}?)" if near else ""
