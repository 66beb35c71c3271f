"""The package as it is shipped: what is in the archives, and that it imports from anywhere as one set of classes."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from source_tree import ROOT, sources

PACKAGES = ("callbacks", "datamodules")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, the wheel built from it, and `tree/` with one built from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    for command in ([*build, str(folder)], [*build, str(folder / "tree"), "--wheel"]):
        subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    return folder


def modules_in(names: list[str]) -> set[str]:
    """Keep the Python files of the package, of paths in an archive."""
    return {name for name in names if name.startswith("lightllm/") and name.endswith(".py")}


def expected_modules() -> set[str]:
    """Name each source file by its place in the package."""
    paths = (source.path.relative_to(ROOT) for source in sources().values())
    return {(path if path.parts[0] == "lightllm" else Path("lightllm", path)).as_posix() for path in paths}


@pytest.mark.parametrize("wheel", ["lightllm-*.whl", "tree/lightllm-*.whl"], ids=["through sdist", "from checkout"])
def test_wheel_holds_every_module_and_configuration_once(archives: Path, wheel: str) -> None:
    (path,) = archives.glob(wheel)
    names = zipfile.ZipFile(path).namelist()
    assert modules_in(names) == expected_modules()
    configs = {f"lightllm/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "configs").rglob("*.yaml")}
    assert {"lightllm/py.typed"} | configs <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightllm"}
    assert len(names) == len(set(names))


def test_sdist_holds_every_module_once(archives: Path) -> None:
    (path,) = archives.glob("lightllm-*.tar.gz")
    with tarfile.open(path) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert modules_in(names) == expected_modules()
    assert len(names) == len(set(names))
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(names)


def test_metadata_says_what_is_needed(archives: Path) -> None:
    (path,) = archives.glob("lightllm-*.whl")
    (info,) = importlib.metadata.distributions(name="lightllm", path=[str(path)])
    assert info.version == importlib.import_module("lightllm").__version__
    assert info.metadata["Requires-Python"] == ">=3.10"
    assert set(info.metadata.get_all("Provides-Extra")) == {"demo", "deepspeed", "dev", "evaluate", "quantize"}
    lightning = [line for line in info.requires or () if line.startswith("lightning")]
    assert lightning == ["lightning!=2.6.2,!=2.6.3,>=2.6.4"]
    assert [entry.value for entry in info.entry_points] == ["lightllm.cli:main"]


def test_installed_wheel_imports_from_elsewhere(archives: Path, tmp_path: Path) -> None:
    (path,) = archives.glob("lightllm-*.whl")
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(path)], check=True, capture_output=True)
    code = "import lightllm.callbacks, lightllm.datamodules, lightllm; print(lightllm.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == str(target / "lightllm" / "__init__.py")


@pytest.mark.parametrize("name", [*PACKAGES, "configs"])
def test_folder_is_reached_by_a_relative_link(name: str) -> None:
    link = ROOT / "lightllm" / name
    if not link.is_symlink():
        pytest.fail(f"{link} is no symbolic link: on Windows, clone with `git clone -c core.symlinks=true`")
    assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("name", PACKAGES)
def test_classes_are_the_same_by_every_name(name: str) -> None:
    package = importlib.import_module(f"lightllm.{name}")
    for public in package.__all__:
        item = getattr(package, public)
        assert item.__module__.startswith(f"lightllm.{name}.")
        assert getattr(importlib.import_module(item.__module__), public) is item
    # Under its folder's own name the same file would be another module with other classes.
    assert name not in sys.modules
