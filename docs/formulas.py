"""What the API pages show beyond griffe's reading of a docstring.

formulas          paragraphs in columns, which two or more blanks part, stay as they stand
a class's file    its opening text, with the mathematics, stands under the class that the file is named after
named tuples      their fields, which have no docstrings of their own
packages          what they import `as` its own name, where they have no __all__
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

COLUMNS = re.compile(r"\S {2,}\S")


class Formulas(griffe.Extension):
    """Rewrites docstrings as griffe meets their objects, modules before their members."""

    def on_instance(self, *, obj: griffe.Object, **options: Any) -> None:
        if obj.docstring is None:
            return
        paragraphs = [preformatted(text) for text in re.split(r"\n[ ]*\n", obj.docstring.value)]
        file = obj.module
        if obj.is_class and file.docstring and not file.is_init_module and _plain(obj.name) == _plain(file.name):
            paragraphs[1:1] = file.docstring.value.split("\n\n")
        obj.docstring.value = "\n\n".join(paragraphs)

    def on_class_members(self, *, cls: griffe.Class, **options: Any) -> None:
        if cls.docstring and any(str(base) == "NamedTuple" for base in cls.bases):
            fields = (f"\n    {name}: {field.annotation}" for name, field in cls.attributes.items() if field.annotation)
            cls.docstring.value += "\n" + "".join(fields)

    def on_module_members(self, *, node: ast.AST | griffe.ObjectNode, mod: griffe.Module, **options: Any) -> None:
        if mod.exports is None and isinstance(node, ast.Module):
            imports = [name for line in node.body if isinstance(line, ast.ImportFrom) for name in line.names]
            mod.exports = [name.name for name in imports if name.name == name.asname] or None


def preformatted(paragraph: str) -> str:
    """The paragraph, indented if it is a formula at the margin; one that is indented is a code block already."""
    if paragraph.startswith(" ") or not COLUMNS.search(paragraph) or re.match(r"\w+:\n", paragraph):
        return paragraph
    return "\n".join("    " + line for line in paragraph.splitlines())


def _plain(name: str) -> str:
    return name.lower().replace("_", "")
