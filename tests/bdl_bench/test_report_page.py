"""A whole page of made-up records: structure, policy, escaping, and numbers that are those of the CSV."""

import base64
import csv
import hashlib
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from synthetic_records import LONG, PATH, QUOTES, SCRIPT

TASK = f"{PATH} {SCRIPT}"
SECTIONS = (
    "Summary", "What was run", "Test metrics", "Accuracy–cost trade-off", "Time and memory", "Calibration",
    "Selective prediction", "Predictive bands", "Out-of-distribution detection", "Distribution shift",
    "Agreement with linearized Laplace", "Disagreement between methods", "Tuning", "Pre-flight diagnostics",
    "Configuration", "Skipped and failed", "Environment and how to reproduce",
)  # fmt: skip


class Page(HTMLParser):
    """Headings, images, scripts, and tables as rows of (text, data-v)."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.images, self.scripts, self.tables, self.ids, self.anchors = [], [], [], [], [], []
        self.policy, self._open = "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self._open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        if tag == "img":
            self.images.append((found["src"], found["alt"]))
        if tag == "a":
            self.anchors.append(found["href"])
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append(["", found.get("data-v")])
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self._open:
            self.scripts[-1] += data
        elif {"h1", "h2", "h3"} & set(self._open):
            self.headings[-1] += data
        elif {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1][0] += data


@pytest.fixture(scope="module")
def page(rendered):
    return Page((rendered / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows(rendered):
    with (rendered / "report.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_section_has_its_heading_and_every_task_too(page):
    headings = {heading.strip() for heading in page.headings}
    assert {*SECTIONS, "between", "pictures", TASK} <= headings


def test_the_policy_admits_the_one_script_of_the_page_and_nothing_else(page):
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy
    assert "unsafe-eval" not in page.policy
    assert not re.search(r"eval|innerHTML|fetch|XMLHttpRequest|import\(", script)


def test_ids_are_unique_and_every_link_leads_to_one(page):
    assert len(set(page.ids)) == len(page.ids)
    assert {anchor.removeprefix("#") for anchor in page.anchors} <= set(page.ids)


def test_every_picture_is_an_svg_without_anything_that_runs_or_loads(page):
    assert len(page.images) > 80
    for address, description in page.images:
        head, _, body = address.partition(",")
        root = ElementTree.fromstring(unquote(body))
        assert head == "data:image/svg+xml"
        assert description
        names = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert not names & {"script", "foreignObject", "a", "animate"}
        values = [v for e in root.iter() for v in e.attrib.values()]
        assert all(v.count("url(") == v.count("url(#") for v in values)
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_names_in_pictures_are_text_and_not_mathematics(page):
    texts = {
        "".join(element.itertext())
        for address, _ in page.images
        for element in ElementTree.fromstring(unquote(address.partition(",")[2])).iter()
        if element.tag.endswith("}text")
    }
    assert any("<script>" in text for text in texts)
    assert any("$" in text and "^2" in text for text in texts)
    assert not any(LONG in text for text in texts), "long names are cut in figures"


def test_hostile_names_are_whole_in_the_tables(page):
    names = {row[0][0] for table in page.tables for row in table if row}
    assert {SCRIPT, QUOTES, LONG} <= names


def test_no_file_lies_outside_of_the_directory(rendered):
    assert {p.name for p in rendered.parent.iterdir() if p.is_dir()} >= {rendered.name}
    assert not (rendered.parent.parent / "x").exists()
    assert {p.name for p in rendered.iterdir()} == {
        "records", "report.html", "report.md", "report.csv", "report.parquet",
    }  # fmt: skip


@dataclass
class Tables:
    """Some tables of a page."""

    tables: list


def table_values(page, first_column):
    """`values[row name]` of the first table whose head begins so: the numbers behind the cells."""
    table = next(t for t in page.tables if [cell[0] for cell in t[0]][: len(first_column)] == first_column)
    head = [cell[0] for cell in table[0]]
    return {row[0][0]: dict(zip(head[1:], (cell[1] for cell in row[1:]), strict=True)) for row in table[1:]}


def csv_values(rows, task, quantity, variant):
    return {
        r["method"]: float(r["mean"])
        for r in rows
        if (r["task"], r["quantity"], r["variant"]) == (task, quantity, variant)
    }


@pytest.mark.parametrize("quantity", ["spearman", "mean_ratio", "relative_rmse"])
def test_agreement_in_the_page_is_that_of_the_csv(page, rows, quantity):
    column = {"spearman": "Spearman", "mean_ratio": "mean ratio", "relative_rmse": "relative RMSE"}[quantity]
    shown = table_values(page, ["method", "Spearmanrank correlation"])
    task = page_order(page)[0]
    expected = csv_values(rows, task, f"agreement/{quantity}", "untuned")
    found = {m: next(v for head, v in row.items() if head.startswith(column)) for m, row in shown.items()}
    assert {m: float(v) for m, v in found.items() if v is not None} == pytest.approx(expected)
    assert len(expected) >= 5


def page_order(page):
    """Tasks in the order of the page."""
    return [h.strip() for h in page.headings if h.strip() in (TASK, "between", "pictures")]


RANK = "average rankover 3 tasks"


def summary_values(page):
    """The table of all methods on all tasks."""
    return table_values(page, [cell[0] for cell in page.tables[0][0]])


def test_ranks_and_first_metrics_of_the_summary_are_those_of_the_csv(page, rows):
    shown = summary_values(page)
    ranks = csv_values(rows, "", "average rank", "")
    assert {m: float(row[RANK]) for m, row in shown.items() if row[RANK]} == pytest.approx(ranks)
    nll = csv_values(rows, "between", "reg/NLL", "tuned")
    column = next(head for head in shown["map"] if head.startswith("between"))
    assert {m: float(row[column]) for m, row in shown.items()} == pytest.approx(nll)


def test_out_of_distribution_numbers_are_those_of_the_csv_as_fitted_and_tuned(page, rows):
    tables = [t for t in page.tables if t[0][0][0] == "held-out"]
    found = []
    for table, variant in zip(tables, ("untuned", "tuned"), strict=True):
        shown = table_values(Tables([table]), ["held-out"])
        expected = csv_values(rows, "pictures", "ood/AUROC/held-out/entropy", variant)
        found.append({m: float(row["AUROC ↑by entropy"]) for m, row in shown.items()})
        assert found[-1] == pytest.approx(expected)
    assert found[0] != pytest.approx(found[1])
    assert "map" not in csv_values(rows, "pictures", "ood/AUROC/held-out/variance", "tuned"), "zero tells nothing"


def test_methods_that_miss_a_seed_or_a_task_have_no_rank(page):
    shown = summary_values(page)
    assert {m for m, row in shown.items() if row[RANK] is None} == {"ensemble", "dropout"}


def test_skipped_and_failed_cells_have_their_reasons(page):
    reasons = [row for table in page.tables for row in table if len(row) == 2 and "seed" in row[0][0]]
    text = " ".join(cell[0] for row in reasons for cell in row)
    assert "pictures · ensemble · seeds 0, 1" in text
    assert f"{TASK} · dropout · seed 1" in text
    assert "7 TiB" in text


def test_costs_that_were_not_exclusive_are_marked(page):
    rows = [
        row for table in page.tables for row in table if row and row[0][0].startswith("dropout") and "‡" in row[0][0]
    ]
    assert rows
