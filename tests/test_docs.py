"""Every Python snippet of the documents runs, in the order of its page, in one namespace and an empty directory.

The pictures of a tutorial are what its snippets draw. They are written again by
`BDL_DOCS_PICTURES=1 pytest tests/test_docs.py -k tutorials`.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bdl_bench.cli import app
from bdl_bench.methods import METHODS
from bdl_bench.tasks import TASKS
from estimators.runtime.rng import preserved_random_state

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[[^\]]*\]\(images/([^)]+)\)")
METHODS_OPTION = re.compile(r"--methods[ =]+([\w,-]+)")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def snippets(page):
    """Each snippet, with as many empty lines before it as the page has, so that tracebacks name the page's lines."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in FENCE.finditer(text)]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory; registries, random state and threads put back. Small networks want one thread."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kept = [(registry, dict(registry)) for registry in (METHODS, TASKS)]
    with preserved_random_state():
        torch.random.manual_seed(0)
        yield tmp_path
    torch.set_num_threads(threads)
    for registry, entries in kept:
        registry.clear()
        registry.update(entries)


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_snippets_of_a_page_run(page, elsewhere, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace = {"__name__": "snippet"}
    for snippet in snippets(page):
        exec(compile(snippet, page, "exec"), namespace)
    if page.parent.name == "tutorials":
        pictures = PICTURE.findall(page.read_text(encoding="utf-8"))
        assert sorted(path.name for path in elsewhere.glob("*.png")) == sorted(pictures)
        for name in pictures if os.environ.get("BDL_DOCS_PICTURES") else []:
            shutil.copy(elsewhere / name, page.parent / "images" / name)


def test_every_tutorial_is_in_the_list_of_tutorials():
    listed = set(LINK.findall((ROOT / "docs/tutorials/index.md").read_text(encoding="utf-8")))
    assert {page.name for page in PAGES if page.parent.name == "tutorials"} - {"index.md"} == listed


def test_the_problem_of_the_readme_is_compared_by_the_command_that_it_names(elsewhere, monkeypatch):
    (source,) = (s for s in snippets(ROOT / "README.md") if "def make_problem" in s)
    (elsewhere / "readme_problem.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(elsewhere)
    arguments = [
        "compare",
        "--model",
        "readme_problem:make_problem",
        "--methods",
        "map,last-layer-laplace",
        "--seeds",
        "1",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert Path(result.output.splitlines()[-1]).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page):
    targets = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_methods_that_a_command_of_a_document_names_exist(page):
    """`a,b` stands for any names, and a page may define methods of its own by `@method` in a snippet."""
    text = page.read_text(encoding="utf-8")
    named = {name for names in METHODS_OPTION.findall(text) for name in names.split(",")}
    own = set(re.findall(r'(?:@method|Method|preset)\(\s*(?:name=)?"([\w-]+)"', text))
    assert named - own <= {*METHODS, "all", "a", "b"}


def test_some_document_names_methods():
    assert any(METHODS_OPTION.search(page.read_text(encoding="utf-8")) for page in PAGES)
