"""`python -m bdl_bench`: the same as `bdl-bench`."""

from bdl_bench.cli.commands import app

app(prog_name="bdl-bench")
