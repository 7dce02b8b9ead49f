"""How soon the reference posterior is reached on the bundled tasks."""
