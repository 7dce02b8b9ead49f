"""A comparison on real data in under an hour, whose results are kept and compared from release to release."""
