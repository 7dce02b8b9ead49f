"""The posterior precision from Jacobian factors of each layer: blocks, Kronecker factors, the dual form."""
