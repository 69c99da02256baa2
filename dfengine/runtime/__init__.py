"""Running a model on the device at hand: batches of one size, memory, and when compiling pays."""
