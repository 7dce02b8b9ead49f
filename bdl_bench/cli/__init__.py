"""The command line."""

from bdl_bench.cli import report_command, study_commands  # noqa: F401  each adds its commands to the application
from bdl_bench.cli.application import app
from bdl_bench.cli.commands import main

__all__ = ["app", "main"]
