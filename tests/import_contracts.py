"""import-linter's contracts, with "module:function" strings and import_module("module") counted as imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from grimp import ImportGraph
from importlinter import ContractCheck
from importlinter.contracts.acyclic_siblings import AcyclicSiblingsContract
from importlinter.contracts.layers import LayersContract
from importlinter.contracts.protected import ProtectedContract

ROOT = Path(__file__).resolve().parents[1]
_FUNCTION = re.compile(r"([a-z]\w*(?:\.\w+)+):\w+")


class Layers(LayersContract):
    """Each layer imports only those below it."""

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        return super().check(with_strings(graph), verbose)


class NoCircles(AcyclicSiblingsContract):
    """No two modules import each other, directly or through others."""

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        return super().check(with_strings(graph), verbose)


class Protected(ProtectedContract):
    """Only the allowed importers import the protected modules."""

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        return super().check(with_strings(graph), verbose)


def with_strings(graph: ImportGraph) -> ImportGraph:
    """Add to a graph the imports that its modules spell as strings."""
    for importer in sorted(m for m in graph.modules if not graph.is_module_squashed(m)):
        for imported, line in strings(_source(importer)):
            if imported in graph.modules:
                graph.add_import(importer=importer, imported=imported, line_number=line, line_contents=imported)
    return graph


def strings(source: str) -> Iterator[tuple[str, int]]:
    """Modules that a source names in "module:function" strings and in import_module("module"), with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if match := _FUNCTION.fullmatch(node.value):
                yield match[1], node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield argument.value, node.lineno


def _source(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    # A folder without __init__.py has no source of its own.
    return next((file.read_text(encoding="utf-8") for file in files if file.exists()), "")
