"""Figures of the report, one a file: from plain data to SVG."""
