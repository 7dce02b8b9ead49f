"""An executor for tests of timeouts: it runs jobs in this process and compares stated seconds with the timeout."""

from bdl_bench.runner.executors import TimeLimitError, Workers
from bdl_bench.runner.executors.in_process import InProcess


class StubExecutor(InProcess):
    """`seconds(job)` are those that a job would need; one that needs more than its timeout is not run."""

    def __init__(self, seconds):
        super().__init__(Workers())
        self.seconds = seconds
        self.timeouts = []

    def run(self, work, queue):
        def run_or_end(job):
            timeout = queue.timeout(job)
            self.timeouts.append((job, timeout))
            if timeout is not None and self.seconds(job) > timeout:
                raise TimeLimitError(timeout)
            return work(job)

        return super().run(run_or_end, queue)
