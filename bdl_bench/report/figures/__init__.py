"""Figures of the report, one per file: from plain data to SVG."""
