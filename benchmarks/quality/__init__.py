"""Agreement of each method with the exact variance, against its cost."""
