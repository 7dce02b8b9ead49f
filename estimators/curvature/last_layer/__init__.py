"""The posterior precision of the last linear layer alone, from its input features."""
