"""Running a model on the available device: batches of a fixed size, memory limits and compiling."""
