"""The sections of a task, one per file: each turns results into plain data and figures; its template has its name."""
