"""The project's habits, held by tests: small typed files, telling names, a test file each, a README that is true."""

from __future__ import annotations

import ast
import re
import subprocess

import pytest
from source_tree import ROOT, relative, sources

UNTESTED_ALONE = {"__main__": "three lines around cli.main"}
"""Modules without a test file of their own name, beside each `__init__.py`, and why."""

VAGUE_NAMES = {"common", "helper", "helpers", "manager", "misc", "util", "utils"}


def test_files_and_functions_stay_small_and_typed() -> None:
    broken = []
    for source in sources().values():
        if source.text.count("\n") > 300:
            broken.append(f"{relative(source.path)}: {source.text.count(chr(10))} lines; 300 is the most")
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                place = f"{relative(source.path)}:{node.lineno} {node.name}"
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    broken.append(f"{place}: {length} lines; 60 is the most")
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [argument.arg for argument in arguments if argument.annotation is None]
                if node.returns is None or set(bare) - {"self", "cls"}:
                    broken.append(f"{place}: not annotated throughout")
    assert not broken, "\n".join(broken)


def test_names_say_something() -> None:
    vague = [relative(source.path) for source in sources().values() if source.path.stem.strip("_") in VAGUE_NAMES]
    assert not vague


def test_some_things_are_never_used() -> None:
    broken = []
    for source in sources().values():
        for node in ast.walk(source.tree):
            place = f"{relative(source.path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Name) and node.id == "hasattr":
                broken.append(f"{place}: hasattr; check the type, or declare the attribute")
            # Reading it makes Lightning build a data loader whose restored position is then lost.
            if "estimated_stepping_batches" in (getattr(node, "attr", None), getattr(node, "value", None)):
                broken.append(f"{place}: estimated_stepping_batches")
    assert not broken, "\n".join(broken)


def test_every_source_file_has_its_test_file() -> None:
    missing = []
    for source in sources().values():
        inside = source.path.relative_to(ROOT)
        parts = inside.parts[1:] if inside.parts[0] == "lightllm" else inside.parts
        test = ROOT.joinpath("tests", *parts[:-1], f"test_{source.path.name.lstrip('_')}")
        if source.path.name != "__init__.py" and source.module not in UNTESTED_ALONE and not test.is_file():
            missing.append(f"{relative(source.path)} has no {relative(test)}")
    assert not missing, "\n".join(missing)
    assert set(UNTESTED_ALONE) <= set(sources())


def test_readme_tree_is_the_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL) if block.startswith("lightllm/")]
    assert len(blocks) == 1, "README.md shows the tree once, in a block that begins with lightllm/"
    listed, folders = set(), [""]
    for line in blocks[0].splitlines():
        match = re.fullmatch(r"(?P<indent>(?:  )*)(?P<name>[\w.-]+/?) +(?P<comment>\S.*)", line)
        assert match, f"not `name  comment` in the README's tree: {line!r}"
        depth = len(match["indent"]) // 2
        folders[depth + 1 :] = [folders[depth] + match["name"]]
        listed.add(folders[-1])
    absent = {name for name in listed if not (ROOT / name).exists()}
    files = {relative(source.path) for source in sources().values() if source.path.name != "__init__.py"}
    assert not absent, "in the README's tree, but no such file"
    assert files - listed == set(), "not in the README's tree"


def test_no_path_of_one_machine_in_the_repository() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"(?<![\w.~$}])/(?:home|root|Users|work|opt|mnt|media)/[\w.-]+")
    found = []
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if path.is_symlink() or not path.is_file() or b"\0" in path.read_bytes()[:4096]:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{name}:{number}: {match}" for match in pattern.findall(line)]
    assert not found, "\n".join(found)
