"""Who may import whom, read off the source with `ast`: imports in functions count, those for type checking apart."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from source_tree import ROOT, Source, relative, sources

EVERYTHING = ("",)
ALLOWED: dict[str, tuple[str, ...]] = {
    "": (),
    "__main__": ("cli",),
    "batch": (),
    "checkpoint_io": ("sharded_checkpoint",),
    "loggers": ("runs",),
    "runs": ("checkpoint_io",),
    "sharded_checkpoint": (),
    "losses": ("batch",),
    "masking": ("batch",),
    "models": ("batch",),
    "compression": (
        "batch",
        "losses",
        "models.anatomy",
        "models.hidden_states",
        "models.inference",
        "models.layer_removal",
        "models.lora_linear",
        "models.low_bit",
        "models.plain_tensors",
        "models.transformation",
    ),
    "parallel": ("batch", "flops", "losses", "models", "sharded_checkpoint"),
    "flops": ("batch", "models.anatomy"),
    "generate": ("batch", "compression", "losses", "models", "runs"),
    "teach": ("datamodules", "models", "modules", "teaching"),
    "teaching": ("batch", "losses", "models"),
    "evaluate": ("batch", "compression", "losses", "models", "runs"),
    "ledger_rows": ("batch", "compression", "evaluate", "export", "measure", "models"),
    "measure": ("batch", "evaluate", "models"),
    "plot": (),
    "export": ("batch", "compression", "losses", "models", "runs"),
    "modules": (
        "batch",
        "generate",
        "losses",
        "masking",
        "models",
        "parallel.data_ranks",
        "parallel.spreading",
        "runs",
        "teaching",
    ),
    "callbacks": (
        "batch",
        "checkpoint_io",
        "compression",
        "export",
        "flops",
        "generate",
        "ledger_rows",
        "loggers",
        "measure",
        "models.anatomy",
        "models.inference",
        "models.transformation",
        "parallel.clipping",
        "parallel.spreading",
        "runs",
    ),
    "datamodules": ("batch", "models.chat_template", "models.load"),
    "cli": EVERYTHING,
}
"""What each package or module (named within `lightllm`) may import, beside its own package and `lightllm` itself."""

TYPES_ONLY: dict[str, tuple[str, ...]] = {"callbacks": ("modules", "datamodules")}
"""What each may import under `if TYPE_CHECKING:` in addition."""

SHARED_WITHIN: dict[str, tuple[str, ...]] = {
    "modules": (
        "modules.agreement",
        "modules.base",
        "modules.build",
        "modules.cached_teacher",
        "modules.checkpointing",
        "modules.class_metrics",
        "modules.embedding_metrics",
        "modules.gathering",
        "modules.heap",
        "modules.inner_losses",
        "modules.on_policy",
        "modules.other_tokenizer",
        "modules.parameter_groups",
        "modules.run_length",
        "modules.scale_in_place",
        "modules.schedule",
        "modules.sentence_head",
        "modules.teacher_network",
        "modules.text_groups",
        "modules.token_metrics",
    ),
}
"""Packages whose modules import only these of each other, so that no objective knows another; in the other packages
everything goes that makes no cycle."""

ONLY_TORCH = ("batch", "losses", "masking")
"""Pure functions of tensors: beside the standard library they import torch alone."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "deepspeed": ("parallel.strategies",),
    "gguf": ("export.gguf", "models.load"),
    "lm_eval": ("evaluate",),
    "torchao": ("compression.quantize",),
}
"""Optional dependencies, and who imports each, inside the function that needs it: one module, two where files of its
format are both read and written."""


class Import(NamedTuple):
    """One imported name."""

    target: str
    """The dotted name: within the package for our own modules, as written for others."""
    ours: bool
    line: int
    types_only: bool
    in_function: bool


def is_type_checking(node: ast.AST) -> bool:
    """Tell `if TYPE_CHECKING:`, by either spelling."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(node: ast.AST, types_only: bool = False, in_function: bool = False) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Yield every node below, and whether it stands under `if TYPE_CHECKING:` and in a function."""
    for child in ast.iter_child_nodes(node):
        types = types_only or (is_type_checking(node) and child in node.body)  # type: ignore[attr-defined]
        yield child, types, in_function
        function = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from walk(child, types, function)


def imports(source: Source) -> Iterator[Import]:
    """Yield everything that a file imports, at its top, in functions and for type checking."""
    for node, types_only, in_function in walk(source.tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(source.path)}:{node.lineno}: a relative import"
            assert node.module is not None
            # `from package import name` imports a module or a name that the package defines.
            names = [
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}"[9:] in sources() else node.module
                for alias in node.names
            ]
        for name in dict.fromkeys(names):
            ours = name.split(".")[0] == "lightllm"
            yield Import(name[9:] if ours else name, ours, node.lineno, types_only, in_function)  # type: ignore[attr-defined]


def within(module: str, package: str) -> bool:
    """Tell whether a module is a package or lies in it; everything lies in the empty name."""
    return package in ("", module) or module.startswith(f"{package}.")


def rule_of(module: str) -> str:
    """Find the entry of `ALLOWED` that speaks of a module: its own, or its package's."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    found = [name for name in names if name in ALLOWED]
    assert found, f"lightllm.{module} is in no line of ALLOWED: say there what it may import"
    return found[0]


def forbidden(source: Source, imported: Import) -> bool:
    """Tell whether an import within the package breaks the table."""
    module, target = source.module, imported.target
    if target == "":
        return False
    package = module.split(".")[0]
    if within(target, package):
        shared = SHARED_WITHIN.get(package)
        return shared is not None and module != package and not any(within(target, name) for name in shared)
    names = ALLOWED[rule_of(module)] if module else ()
    if imported.types_only:
        names += TYPES_ONLY.get(package, ())
    return not any(within(target, name) for name in names)


def test_imports_follow_the_table() -> None:
    broken = [
        f"{relative(source.path)}:{imported.line} imports lightllm.{imported.target}"
        for source in sources().values()
        for imported in imports(source)
        if imported.ours and forbidden(source, imported)
    ]
    assert not broken, "not in ALLOWED:\n" + "\n".join(broken)


def test_every_module_has_a_line_in_the_table() -> None:
    for module in sources():
        rule_of(module) if module else None
    unknown = {name for names in ALLOWED.values() for name in names if name} - set(ALLOWED)
    assert all(rule_of(name) for name in unknown)


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return one cycle of a graph, its first node again at the end, or nothing."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for following in sorted(edges[node]):
            cycle = visit(following, [*trail, node])
            if cycle:
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(edges) if (cycle := visit(node, []))), [])


def test_what_an_import_statement_is_counted_as() -> None:
    code = """
import torch.nn
from lightllm import batch
if TYPE_CHECKING:
    from lightllm.models.load import load_tokenizer
def function():
    import gguf
"""
    found = list(imports(Source(ROOT, "example", code, ast.parse(code))))
    assert found == [
        Import("torch.nn", ours=False, line=2, types_only=False, in_function=False),
        Import("batch", ours=True, line=3, types_only=False, in_function=False),
        Import("models.load", ours=True, line=5, types_only=True, in_function=False),
        Import("gguf", ours=False, line=7, types_only=False, in_function=True),
    ]


def test_what_the_table_forbids() -> None:
    def is_forbidden(module: str, target: str, types_only: bool = False) -> bool:
        imported = Import(target, ours=True, line=1, types_only=types_only, in_function=False)
        return forbidden(Source(ROOT, module, "", ast.parse("")), imported)

    assert is_forbidden("losses.cross_entropy", "models.load")
    assert is_forbidden("callbacks.throughput", "modules.base")
    assert is_forbidden("modules.causal", "modules.masked")
    assert is_forbidden("export", "cli")
    assert not is_forbidden("losses.cross_entropy", "batch")
    assert not is_forbidden("callbacks.throughput", "modules.base", types_only=True)
    assert not is_forbidden("modules.causal", "modules.base")
    assert not is_forbidden("cli.training", "modules.causal")


def test_no_import_cycle_between_files_or_packages() -> None:
    files: dict[str, set[str]] = defaultdict(set)
    packages: dict[str, set[str]] = defaultdict(set)
    for source in sources().values():
        for imported in imports(source):
            if imported.ours and not imported.types_only:
                files[source.module].add(imported.target)
                ends = source.module.split(".")[0], imported.target.split(".")[0]
                packages[ends[0]].update({ends[1]} - {ends[0]})
    assert find_cycle(defaultdict(set, {"a": {"b"}, "b": {"a"}})) == ["a", "b", "a"]
    assert find_cycle(files) == []
    assert find_cycle(packages) == []


def test_other_packages_are_declared_and_optional_ones_stay_with_their_owner() -> None:
    required = [line for line in importlib.metadata.requires("lightllm") or () if "extra ==" not in line]
    declared = {
        file.parts[0].removesuffix(".py")
        for line in required
        for file in importlib.metadata.files(re.split(r"[^\w.-]", line)[0]) or ()
    }
    broken = []
    for source in sources().values():
        for imported in imports(source):
            top = imported.target.split(".")[0]
            if imported.ours or top in sys.stdlib_module_names:
                continue
            place = f"{relative(source.path)}:{imported.line} imports {top}"
            if top in OPTIONAL:
                if not imported.types_only and not (source.module in OPTIONAL[top] and imported.in_function):
                    broken.append(f"{place}: only {OPTIONAL[top]} may, inside a function")
            elif top not in declared:
                broken.append(f"{place}, which pyproject.toml does not name")
            if source.module.split(".")[0] in ONLY_TORCH and top not in ("torch", "typing_extensions"):
                broken.append(f"{place}: {source.module} is pure torch")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("module", ["lightllm", "lightllm.cli"])
def test_importing_the_front_door_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*{{'torch', 'lightning', 'transformers', 'peft'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
