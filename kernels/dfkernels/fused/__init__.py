"""The operations in Triton: same names, arguments and results as the reference. `dfkernels.dispatch` calls them."""

#: The modules that hold kernels, each with a `configurations()` of what is compiled ahead of time.
MODULES = ("blend", "erase", "similarity", "accumulate")
