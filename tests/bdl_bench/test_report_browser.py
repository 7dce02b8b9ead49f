"""The page in a browser: the console stays silent, no name runs, tables sort. Skipped where there is no Chromium."""

import base64
import hashlib
import re
import shutil
import subprocess

import pytest
from synthetic_records import LONG, SCRIPT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
SORT = 'document.querySelector("table.sortable").tHead.rows[0].cells[{column}].querySelector("button").click();'


def loaded(path, profile):
    """The DOM after loading, and what the console said."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={profile}", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def html(rendered):
    return (rendered / "report.html").read_text(encoding="utf-8")


def first_column(dom):
    table = re.search(r'<table class="sortable.*?</table>', dom, re.DOTALL)[0]
    return re.findall(r'<tr[^>]*><th scope="row">(.*?)(?:<small|</th>)', table)[0:]


def test_the_console_is_silent_and_no_name_becomes_an_element(rendered, tmp_path):
    dom, said = loaded(rendered / "report.html", tmp_path)
    assert said == []
    assert dom.count("<script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in dom


def test_a_script_that_slipped_in_would_not_run(html, tmp_path):
    path = tmp_path / "attacked.html"
    attack = '<script>document.title = "taken"</script><img src="x" onerror="document.title = \'taken\'">'
    path.write_text(html.replace('<main id="content">', f'<main id="content">{attack}', 1), encoding="utf-8")
    dom, said = loaded(path, tmp_path / "profile")
    assert "<title>Comparison of predictive uncertainty</title>" in dom
    assert any("Content Security Policy" in line for line in said)


@pytest.mark.parametrize(("column", "clicks"), [(0, 1), (2, 1), (2, 2)])
def test_a_click_on_a_head_sorts_the_table(html, tmp_path, column, clicks):
    script = SORT.format(column=column) * clicks
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    copy = html.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    path = tmp_path / "clicked.html"
    path.write_text(copy.replace("</body>", f"<script>{script}</script></body>", 1), encoding="utf-8")
    dom, said = loaded(path, tmp_path / "profile")
    assert said == []
    table = re.search(r'<table class="sortable.*?</table>', dom, re.DOTALL)[0]
    body = table.partition("<tbody>")[2]
    if column == 0:
        names = re.findall(r'<tr[^>]*><th scope="row">(.*?)</th>', body)
        assert names == sorted(names, key=lambda name: name.replace("&lt;", "<").lower())
        assert {LONG, SCRIPT.replace("<", "&lt;").replace(">", "&gt;")} <= set(names)
    else:
        cells = [re.findall(r"<td[^>]*>", row)[column - 1] for row in body.split("</tr>")[:-1]]
        values = [float(re.search(r'data-v="([^"]*)"', cell)[1]) for cell in cells]
        assert values == sorted(values, reverse=clicks == 2)
        assert len(set(values)) > 2
