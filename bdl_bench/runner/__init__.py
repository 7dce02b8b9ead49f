"""The run of a comparison: train each network once, then evaluate every method on it."""
