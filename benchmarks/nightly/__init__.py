"""A comparison on real data whose results are kept and compared from release to release."""
