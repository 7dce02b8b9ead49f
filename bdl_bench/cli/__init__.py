"""The command line."""

from bdl_bench.cli.commands import main
from bdl_bench.cli.report_command import app

__all__ = ["app", "main"]
