"""The posterior precision as a dense matrix, in parameters or in the outputs of the training rows."""
