"""The command line."""

from bdl_bench.cli.commands import app, main

__all__ = ["app", "main"]
