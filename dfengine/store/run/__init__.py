"""A run folder: segments written by many processes, read, merged and exported as one run."""
