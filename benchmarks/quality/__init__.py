"""How near to the exact variance each method comes, by what it costs."""
