"""Progress: live on a terminal, plain lines elsewhere, names shown as they are, and the time left."""

import io

import pytest
from rich.console import Console

from bdl_bench.cli.progress import show_progress
from bdl_bench.runner.eta import TimeEstimate
from bdl_bench.runner.events import Event

EVENTS = [
    Event("[red]task[/red]", 0, None, "planned"),
    Event("[red]task[/red]", 0, "laplace", "planned"),
    Event("[red]task[/red]", 0, None, "started"),
    Event("[red]task[/red]", 0, None, "trained", 1.5),
    Event("[red]task[/red]", 0, "laplace", "waiting"),
    Event("[red]task[/red]", 0, "laplace", "failed", reason="TypeError: [/] is no tag"),
]


class Clock:
    """A clock that the test advances."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def output(events, *, terminal, clock=None, n_jobs=2):
    file, clock = io.StringIO(), clock or Clock()
    with show_progress(Console(file=file, force_terminal=terminal, width=200), n_jobs, clock=clock) as listen:
        for event in events:
            if isinstance(event, float):
                clock.now += event
            else:
                listen(event)
    return file.getvalue()


def test_without_a_terminal_there_is_one_plain_line_per_event():
    assert output(EVENTS, terminal=False).splitlines() == [
        "[1/2] [red]task[/red] seed 0 training: trained, 1.5 s",
        "[red]task[/red] seed 0 laplace: locked by another run",
        "[2/2] [red]task[/red] seed 0 laplace: failed, TypeError: [/] is no tag",
    ]


def test_a_summary_is_printed_from_time_to_time():
    steps = [("digits", seed, "laplace") for seed in range(4)]
    events = [Event(*step, "planned") for step in steps]
    events += [Event(*steps[0], "started"), 40.0, Event(*steps[0], "ok"), Event(*steps[1], "started")]
    events += [5.0, Event(*steps[2], "failed")]  # too soon for another one
    lines = output(events, terminal=False, n_jobs=4).splitlines()
    assert lines[1] == "1 of 4 done; about 2 min left"
    assert len(lines) == 3


@pytest.mark.parametrize("words", ["trained", "2 of 2 done", "1 failed", "TypeError"])
def test_on_a_terminal_there_are_lines_and_a_bar(words):
    assert words in output(EVENTS, terminal=True)


def test_on_a_terminal_running_jobs_are_shown_with_their_times():
    events = [Event("digits", seed, "map", "started") for seed in range(20)]
    shown_last = output([*events, 7.0], terminal=True, n_jobs=20)
    assert "digits seed 0 map (7 s)" in shown_last
    assert "digits seed 11 map (7 s)" in shown_last
    assert "0 of 20 done, 20 running, 7 s" in shown_last
    assert "digits seed 12 map" not in shown_last


def heard(*events, clock):
    estimate = TimeEstimate(0, clock)
    for event in events:
        if isinstance(event, float):
            clock.now += event
        else:
            estimate.update(event)
    return estimate


def planned(*steps):
    return [Event(*step, "planned") for step in steps]


def run(step, seconds, status="ok"):
    return [Event(*step, "started"), seconds, Event(*step, status)]


def test_nothing_is_foretold_before_anything_was_measured():
    step = ("a", 0, "map")
    assert heard(*planned(step), Event(*step, "started"), 3.0, clock=Clock()).seconds_left() is None


def test_a_step_is_expected_to_take_what_its_method_took_on_its_task_or_else_on_another_one():
    steps = [("a", 0, "map"), ("a", 0, "slow"), ("a", 1, "map"), ("a", 1, "slow"), ("b", 0, "slow")]
    estimate = heard(*planned(*steps), *run(steps[0], 2.0), *run(steps[1], 10.0), clock=Clock())
    assert estimate.seconds_left() == 2 + 10 + 10


def test_a_method_that_is_new_on_a_task_is_scaled_by_what_the_others_take_there():
    steps = [("a", 0, "map"), ("a", 0, "tuned"), ("b", 0, "map"), ("b", 0, "tuned"), ("b", 0, "new")]
    ended = [*run(steps[0], 2.0), *run(steps[1], 30.0), *run(steps[2], 6.0)]
    estimate = heard(*planned(*steps), *ended, clock=Clock())
    assert estimate.seconds_left() == 30 * (6 / 2) + (2 + 30 + 6) / 3


def test_a_training_says_nothing_on_how_long_an_evaluation_takes():
    steps = [("a", 0, None), ("b", 0, None), ("a", 0, "map"), ("b", 0, "map")]
    clock = Clock()
    estimate = heard(*planned(*steps), *run(steps[0], 50.0, "trained"), clock=clock)
    assert estimate.seconds_left() is None
    for event in run(steps[2], 0.0, "ok"):
        clock.now += event if isinstance(event, float) else 0.0
        if not isinstance(event, float):
            estimate.update(event)
    assert estimate.seconds_left() == 50.0


def test_what_has_run_of_a_step_is_subtracted_and_never_more_than_it_was_expected_to_take():
    steps = [("a", seed, "map") for seed in range(3)]
    clock = Clock()
    estimate = heard(*planned(*steps), *run(steps[0], 10.0), Event(*steps[1], "started"), 4.0, clock=clock)
    assert estimate.seconds_left() == 6 + 10
    clock.now += 100
    assert estimate.seconds_left() == 10


def test_steps_that_run_at_a_time_share_what_is_left_but_none_ends_before_its_own_time():
    steps = [("a", seed, "map") for seed in range(5)]
    beside = [Event(*steps[0], "started"), Event(*steps[1], "started"), 8.0]
    ended = [Event(*steps[0], "ok"), Event(*steps[1], "ok")]
    estimate = heard(*planned(*steps), *beside, *ended, clock=Clock())
    assert estimate.seconds_left() == 3 * 8 / 2
    for event in (Event(*steps[2], "cached"), Event(*steps[3], "cached"), Event(*steps[4], "started")):
        estimate.update(event)
    assert estimate.seconds_left() == 8


def test_what_was_cached_says_nothing_of_how_long_a_step_takes():
    steps = [("a", seed, "map") for seed in range(3)]
    cached = Event(*steps[0], "cached", seconds=500.0)
    estimate = heard(*planned(*steps), cached, *run(steps[1], 3.0), clock=Clock())
    assert estimate.seconds_left() == 3
    assert (estimate.n_ended, dict(estimate.counts)) == (2, {"cached": 1, "ok": 1})
