"""Simulated comparisons of a method with itself: the levels of tests and the coverage of intervals in the report."""
