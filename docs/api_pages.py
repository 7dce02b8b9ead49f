"""A hook of mkdocs: makes one reference page for each folder of the two packages."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGES = ("estimators", "bdl_bench")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the pages to the section Reference of the navigation."""
    (reference,) = (entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    for package in PACKAGES:
        reference.append({package: [{_title(folder): _page(folder)} for folder in _folders(package)]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to those that are written by hand."""
    for package in PACKAGES:
        for folder in _folders(package):
            files.append(File.generated(config, _page(folder), content=_content(folder)))
    return files


def _folders(package: str) -> list[Path]:
    """Folders of a package that have public names, the package itself first."""
    return [
        folder
        for folder in sorted({path.parent for path in (ROOT / package).rglob("*.py")})
        if any(_has_public_names(module) for module in _modules(folder))
    ]


def _modules(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.py")) if path.name not in ("__init__.py", "__main__.py")]


def _has_public_names(module: Path) -> bool:
    """Whether the module has a list `__all__` that is not empty."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        targets: list[Any] = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return bool(getattr(node.value, "elts", []))  # type: ignore[attr-defined]
    return False


def _title(folder: Path) -> str:
    return ".".join(folder.relative_to(ROOT).parts)


def _page(folder: Path) -> str:
    return f"reference/{'/'.join(folder.relative_to(ROOT).parts)}/index.md"


def _content(folder: Path) -> str:
    """The page: the docstring of the folder's `__init__`, and each module with public names."""
    init = folder / "__init__.py"  # which a folder of plain modules may lack
    docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) if init.exists() else None
    modules = [f"{_title(folder)}.{module.stem}" for module in _modules(folder) if _has_public_names(module)]
    return "\n\n".join([f"# {_title(folder)}", docstring or "", *(f"::: {module}" for module in modules)]) + "\n"
