"""The sections of a task: each a file that turns results into plain data and pictures, with a template of its name."""
