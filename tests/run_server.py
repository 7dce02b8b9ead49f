"""A process that has imported everything once and forks runs of grids, so that a test can kill many of them.

It reads a line of JSON a request: a list of runs, each with `arguments` of Grid, a `cwd`, and `die_at_write`, the
number of the write in the middle of which to be killed (0: none). It answers with a line of process ids, and one of
exit codes when all have ended.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import bdl_bench.runner.warm_up  # noqa: F401
from bdl_bench.runner.grid import Grid
from estimators.persistence import atomic


class RunServer:
    """The test's end of it."""

    def __init__(self):
        here = Path(__file__)
        paths = [str(here.parent), str(here.parents[1])]
        code = f"import sys; sys.path[:0] = {paths!r}; import run_server as s; s.serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *runs):
        """Process ids of the runs."""
        self.process.stdin.write(json.dumps(runs) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait(self):
        """Exit codes of the runs, −N for signal N; a code of 1 is an exception, shown on stderr."""
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.kill()
        self.process.communicate()


def serve():
    for line in sys.stdin:
        pids = [_forked(run) for run in json.loads(line)]
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


def _forked(run):
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(run["cwd"])
        _die_at_write(run.get("die_at_write", 0))
        arguments = run["arguments"]
        Grid(**{**arguments, "directory": Path(arguments["directory"])}).run(lambda event: None)  # noqa: ARG005
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _die_at_write(number):
    """The file is written, and not yet under its name."""
    replace, n_calls = os.replace, []

    def replacing(*args):
        n_calls.append(args)
        if len(n_calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    atomic.os.replace = replacing
