"""Progress: a bar on a terminal, plain lines elsewhere, and names shown as they are."""

import io

import pytest
from rich.console import Console

from bdl_bench.grid import Event
from bdl_bench.progress import shown

EVENTS = [
    Event("[red]task[/red]", 0, None, "started"),
    Event("[red]task[/red]", 0, None, "trained", 1.5),
    Event("[red]task[/red]", 0, "laplace", "failed", reason="TypeError: [/] is no tag"),
]


def output(*, terminal):
    file = io.StringIO()
    with shown(Console(file=file, force_terminal=terminal, width=200), 2) as listen:
        for event in EVENTS:
            listen(event)
    return file.getvalue()


def test_elsewhere_there_is_one_plain_line_an_event():
    assert output(terminal=False).splitlines() == [
        "[1/2] [red]task[/red] seed 0 training: trained, 1.5 s",
        "[2/2] [red]task[/red] seed 0 laplace: failed, TypeError: [/] is no tag",
    ]


@pytest.mark.parametrize("words", ["trained", "2/2", "TypeError"])
def test_on_a_terminal_there_are_lines_and_a_bar(words):
    assert words in output(terminal=True)
