"""`python -m bdl_bench`, which is equivalent to `bdl-bench`."""

from bdl_bench.cli import app

app(prog_name="bdl-bench")
