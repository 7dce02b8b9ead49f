"""What RegVar itself costs: a training step, an inference, memory, and how they grow."""
