"""The command line."""

from bdl_bench.cli.commands import main
from bdl_bench.cli.report_command import app
from bdl_bench.cli.study_commands import reproduce, sbc  # registers both

__all__ = ["app", "main", "reproduce", "sbc"]
