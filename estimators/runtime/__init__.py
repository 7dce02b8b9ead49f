"""The machine and the process: memory, random state, progress, passes through the network, units."""
