"""Files for papers: LaTeX tables that compile, figures of their own with embedded TrueType fonts, and the dark page."""

import itertools
import re
import shutil
import subprocess

import pytest
from synthetic_records import SCRIPT, write_cell, write_grid

from bdl_bench.records.record import OwnMetric, RecordStore
from bdl_bench.report import Selection, write_report
from bdl_bench.report.figures.gallery import Gallery
from bdl_bench.report.figures.theme import themed
from bdl_bench.report.markdown import _cost
from bdl_bench.report.reference_agreement import CostRow
from estimators.errors import OptionError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report with tables and figures as files, of a task and a method with hostile names."""
    directory = tmp_path_factory.mktemp("files")
    write_grid(directory, methods=("map", SCRIPT), tasks={"a b": "regression"}, seeds=1, rows=20)
    write_grid(directory, methods=("map",), tasks={"a_b": "regression"}, seeds=1, rows=20)
    write_report(directory, figures="pdf", latex=True)
    return directory


def test_there_is_one_table_a_task_and_one_of_the_summary(written):
    assert {p.name for p in (written / "tables").iterdir()} == {"summary.tex", "a-b.tex", "a-b-2.tex", "tables.tex"}


def test_a_table_is_booktabs_with_a_cell_for_every_column(written):
    for path in (written / "tables").glob("[as]*.tex"):
        text = path.read_text(encoding="utf-8")
        (columns,) = re.findall(r"\\begin\{tabular\}\{(l r*)\}".replace(" ", ""), text)
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert len(rows) == (2 if path.stem == "a-b-2" else 3)
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns) - 1}
        assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        assert "<script>" not in text


def test_the_table_of_many_tasks_is_in_parts_that_are_legible(write_record, tmp_path):
    for task, method in itertools.product((f"t{i:02d}" for i in range(10)), ("map", "laplace")):
        write_record(task, method, 0)
    write_report(tmp_path, latex=True)
    text = (tmp_path / "tables" / "summary.tex").read_text(encoding="utf-8")
    heads = re.findall(r"\\toprule\n *(.*) \\\\\n", text)
    parts = ["t00 & t01 & t02", "t03 & t04 & t05", "t06 & t07 & t08 & t09"]
    assert heads == [
        f"Method & NLL $-$ map, mean of 10 tasks & {parts[0]} & time", f"Method & {parts[1]}", f"Method & {parts[2]}"
    ]  # fmt: skip
    assert r"All methods on all tasks, NLL $\downarrow$:" in text, "the metric that all columns have"


@pytest.mark.parametrize(("n_methods", "n_tables"), [(2, 1), (12, 2), (50, 3)])
def test_the_tables_of_many_methods_are_on_several_pages(write_record, tmp_path, n_methods, n_tables):
    for task, i in itertools.product((f"t{i:02d}" for i in range(10)), range(n_methods)):
        write_record(task, f"m{i:02d}" if i else "map", 0)
    write_report(tmp_path, latex=True)
    text = (tmp_path / "tables" / "summary.tex").read_text(encoding="utf-8")
    assert (text.count(r"\begin{table}"), text.count(r"\begin{tabular}")) == (n_tables, 3)
    assert len(set(re.findall(r"\\label\{(.*?)\}", text))) == n_tables


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX")
def test_the_tables_compile(written, tmp_path):
    for path in (written / "tables").iterdir():
        shutil.copy(path, tmp_path)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if "booktabs.sty' not found" in done.stdout:
        pytest.skip("LaTeX without booktabs")
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "tables.pdf").is_file()


def test_pdf_figures_have_truetype_fonts_and_names_without_hashes(written):
    files = list((written / "figures").rglob("*.pdf"))
    assert len(files) > 8
    names = [file.stem for file in files] + [folder.name for folder in (written / "figures").iterdir()]
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)
    assert not [name for name in names if re.search(r"-[0-9a-f]{8}$", name)]
    contents = [file.read_bytes() for file in files]
    assert all(b"/Type3" not in content for content in contents)
    assert all(b"/CIDFontType2" in content or b"/TrueType" in content for content in contents)


def test_names_that_differ_in_signs_alone_get_files_of_their_own(tmp_path):
    gallery = Gallery(tmp_path, "svg")
    names = [gallery._named("t", name) for name in ("a b", "a_b", "a b", "<<", ">>")]
    assert names == ["a-b", "a-b-2", "a-b", "figure", "figure-2"]


def test_colours_of_a_figure_are_variables_that_are_lighter_on_a_dark_page():
    shapes = "<path style='fill:#3b4350'/><text style='fill:#0072b2'>#3b4350</text>"
    svg = f"<svg><defs><style>*{{}}</style></defs>{shapes}</svg>"
    found = themed(svg)
    assert "<path style='fill:var(--c0)'/>" in found
    assert ">#3b4350</text>" in found, "a name is no colour"
    light, _, dark = found.partition("@media (prefers-color-scheme:dark)")
    assert "--c0:#3b4350;--c1:#0072b2" in light
    assert "--c0:#c8d0d9;--c1:#56b4f0" in dark
    assert "font-family:-apple-system" in found


def test_the_costs_in_markdown_are_in_the_columns_of_their_header():
    row = CostRow("map", 1.0, 300.0, 2**20, 0, peak_reset=True, device_peak_bytes=None, tuning_seconds=20.0, passes=7)
    assert _cost(row)[:5] == ("map", "1 s", "20 s", "5 min", "7")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A report with selected columns, of names that are options or markup where they are not escaped."""
    directory = tmp_path_factory.mktemp("hostile")
    store = RecordStore(directory)
    for method in ("map", "[mine]", "*x"):
        record = write_cell(store, "t", "regression", method, 0, rows=20)
        found = {
            "metrics": record.metrics | {"my/a|b": 1.0},
            "tuned": record.tuned | {"my/a|b": 1.0},
            "own_metrics": {"my/a|b": OwnMetric(label="E|x| <b>", reading="", better="lower")},
        }
        store.write(record.model_copy(update=found), store.arrays(record))
    write_report(directory, latex=True, selection=Selection(metrics=("E|x| <b>", "AUSE")))
    return directory


def test_a_latex_table_has_the_selected_columns_and_names_that_are_no_options(hostile):
    text = (hostile / "tables" / "t.tex").read_text()
    head, *rows = [line.strip() for line in text.splitlines() if line.endswith(r"\\")]
    assert [re.sub(r" *\$.*?\$", "", cell) for cell in head.removesuffix(r" \\").split(" & ")] == [
        "Method",
        r"E\textbar{}x\textbar{} \textless{}b\textgreater{}",
        "AUSE",
    ]
    assert [row.split(" & ")[0] for row in rows] == ["map", "{*x}", "{[mine]}"]
    summary = (hostile / "tables" / "summary.tex").read_text()
    assert not re.search(r"^ *[\[*]", summary + text, re.MULTILINE)


def test_a_markdown_table_has_as_many_columns_as_its_header_where_labels_have_bars(hostile):
    lines = (hostile / "report.md").read_text().splitlines()
    headers = [line for line in lines if "E\\|x\\|" in line and line.startswith("| method")]
    assert len(headers) == 3, "of the summary, and of the untuned and tuned columns"
    for header in headers:
        assert "E\\|x\\| &lt;b&gt;" in header
        rule = lines[lines.index(header) + 1]
        assert len(re.findall(r"(?<!\\)\|", header)) == rule.count("|")


def test_a_page_of_some_tasks_methods_and_columns(written, tmp_path):
    (tmp_path / "records").symlink_to(written / "records")
    page = write_report(tmp_path, selection=Selection(("a b",), ("map", SCRIPT), ("RMSE", "reg/nll"))).read_text()
    assert "a_b" not in page
    heads = re.findall(r'<th scope="col"[^>]*title="([^:]*):', page)
    assert heads[:2] == ["reg/RMSE", "reg/NLL"]
    assert set(heads) == {"reg/RMSE", "reg/NLL"}


@pytest.mark.parametrize(
    ("selection", "suggested"),
    [
        (Selection(tasks=("a c",)), "a b"),
        (Selection(methods=("mapp",)), "map"),
        (Selection(metrics=("RMSEE",)), "RMSE"),
    ],
)
def test_a_name_that_the_records_do_not_have_is_answered_with_a_similar_one(written, selection, suggested):
    with pytest.raises(OptionError, match=f"did you mean {suggested}"):
        write_report(written, selection=selection)


def test_every_table_has_a_caption_and_scopes_and_wide_ones_are_reached_by_the_keyboard(written):
    page = (written / "report.html").read_text()
    body = page[page.index("<body>") :]
    tables = re.findall(r"<table.*?</table>", body, re.DOTALL)
    assert tables
    for table in tables:
        assert re.match(r"<table[^>]*>\s*<caption>[^<]", table)
        assert not re.findall(r"<th(?![^>]*scope=)[ >]", table)
    assert body.count('class="wide"') == body.count('class="wide" tabindex="0" role="region" aria-label="')
    assert body.index('href="#content"') < body.index('<main id="content">')


def test_a_printed_page_keeps_its_tables(written):
    style = re.search(r"<style>(.*?)</style>", (written / "report.html").read_text(), re.DOTALL)[1]
    assert style.count("{") == style.count("}")
    printed = style[style.index("@media print") :]
    assert "position: absolute" not in printed
    assert re.search(r"tr, .advice, .findings \{ break-inside: avoid; \}", printed)
