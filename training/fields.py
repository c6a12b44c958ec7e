"""The fields of a class, read from its source.

To import a configuration or `TrainingArguments` takes seconds, because PyTorch is loaded with it. A
mistyped key of a recipe should not wait for that.
"""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def fields_of(path: Path, name: str) -> dict[str, str]:
    """The fields of a dataclass, those of its bases included, with their types as they are written.

    Args:
        path: A Python file that defines or imports the class.
        name: The name of the class there.

    Raises:
        LookupError: If the file neither defines nor imports the class.
    """
    path, node = find_class(path, name)
    fields: dict[str, str] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            fields |= fields_of(path, base.id)
    own = {ast.unparse(each.target): ast.unparse(each.annotation) for each in node.body if isinstance(each, ast.AnnAssign)}
    return fields | {name: kind for name, kind in own.items() if "ClassVar" not in kind}


def parameters_of(path: Path, name: str) -> list[str]:
    """The names of the parameters of a class's `__init__`, without `self` and those that collect
    others."""
    _, node = find_class(path, name)
    (init,) = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    return [each.arg for each in (*init.args.args[1:], *init.args.kwonlyargs)]


def value_of(node: ast.ClassDef, name: str) -> str:
    """The source of the value that a class gives to one of its attributes."""
    for each in node.body:
        targets = [each.target] if isinstance(each, ast.AnnAssign) else each.targets if isinstance(each, ast.Assign) else []
        if isinstance(each, ast.AnnAssign | ast.Assign) and each.value is not None and name in map(ast.unparse, targets):
            return ast.unparse(each.value)
    raise LookupError(f"{node.name} has no {name}")


def find_class(path: Path, name: str) -> tuple[Path, ast.ClassDef]:
    """The file that defines a class, and its definition; imports are followed."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find_class(_file_of(path, node), alias.name)
    raise LookupError(f"{path} neither defines nor imports {name}")


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def source_of(package: str) -> Path:
    """The file of a package, which is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise LookupError(f"there is no package {package}")
    return Path(spec.origin)


def _file_of(path: Path, node: ast.ImportFrom) -> Path:
    """The file of the module that a file imports from."""
    parts = node.module.split(".") if node.module else []
    folder = path.parents[node.level - 1] if node.level else source_of(parts.pop(0)).parent
    place = folder.joinpath(*parts)
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
