"""The user's network: its derivatives by several routes, and the check that they agree with plain autograd."""
