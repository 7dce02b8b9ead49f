"""The cost of a fit with many classes: sampled labels beside the exact GGN."""
