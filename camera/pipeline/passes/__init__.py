"""One file per kind of pass over the model."""
