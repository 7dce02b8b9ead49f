"""A process that imports each test module once and forks a new process for each call, so that a test can kill many.

It reads a request a line: a JSON list of calls, each with the module, its file, a function of it, the arguments, the
working directory and additional environment variables. It answers with a line of process ids, and with a line of exit
codes when all have ended.
"""

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import traceback


class ForkServer:
    """The test's end of it. The server hashes strings with another seed than the process that starts it."""

    def __init__(self):
        self.is_pending = False
        code = f"import sys; sys.path[:0] = {sys.path!r}; import fork_server; fork_server.serve()"
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        )

    def start(self, *calls):
        """Start a process for each call; return their ids."""
        if self.is_pending:  # a test failed before it waited
            self.wait()
        self.is_pending = True
        self.process.stdin.write(json.dumps(calls) + "\n")
        self.process.stdin.flush()
        return self._answer("pids")

    def wait(self):
        """Return the exit codes, −N for signal N; 1 is an exception, whose traceback is on stderr."""
        self.is_pending = False
        return self._answer("exit codes")

    def _answer(self, name):
        line = self.process.stdout.readline()
        assert line, "the server has ended: see stderr"
        return json.loads(line)[name]

    def run(self, function, *arguments):
        """Call a function in a process of its own; return the exit code."""
        self.start(call(function, *arguments))
        (code,) = self.wait()
        return code

    def close(self):
        self.process.kill()
        self.process.communicate()


def call(function, *arguments, cwd=None, env=None, imports=()):
    """Return the call of a function of a module, with arguments that JSON can hold, as `ForkServer.start` takes it.

    `imports` are modules that the server imports too, once, since the function needs them.
    """
    where = {"module": function.__module__, "file": inspect.getsourcefile(function), "function": function.__name__}
    return {**where, "arguments": arguments, "cwd": cwd, "env": env or {}, "imports": list(imports)}


def serve():
    for line in sys.stdin:
        pids = [_forked(request) for request in json.loads(line)]
        print(json.dumps({"pids": pids}), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"exit codes": codes}), flush=True)


def _forked(request):
    function = getattr(_module(request["module"], request["file"]), request["function"])
    for name in request["imports"]:
        importlib.import_module(name)
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(2, 1)  # what is printed is no answer
        os.environ.update(request["env"])
        os.chdir(request["cwd"] or ".")
        function(*request["arguments"])
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _module(name, file):
    """The module under the name that it has in the test's process."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
