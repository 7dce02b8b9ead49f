"""The template plugin of docs/guide/plugins.md, written into a folder: a method, a task, a metric and a section."""

import importlib
import os
import re
import sys
from pathlib import Path

NAME = "my_bdl_plugin"
PAGE = Path(__file__).parents[1] / "docs" / "guide" / "plugins.md"
FILE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def write_package(folder):
    """Write the files of the page into a folder and return it."""
    for name, text in FILE.findall(PAGE.read_text(encoding="utf-8")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def place_installed(site):
    """Write the package and its dist-info into a folder, as an installation does."""
    write_package(site)
    info = site / "my_bdl_plugin-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-bdl-plugin\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[bdl_bench.plugins]\nmy-bdl-plugin = {NAME}\n")
    return site


def edit(path, old, new):
    """Replace text in a module whose bytecode must not be taken again."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 10))


def forget():
    """Forget the imported modules, as a new process would."""
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]
    importlib.invalidate_caches()
