"""The networks that are measured, one architecture a file."""
