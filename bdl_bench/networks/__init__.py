"""Architectures that tasks and measurements share, one family a file."""
