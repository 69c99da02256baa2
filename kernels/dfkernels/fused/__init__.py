"""The operations in Triton, with the names, arguments and results of the reference; called by `dfkernels.dispatch`."""

#: The modules with kernels. `configurations()` of each lists how to compile its kernels ahead of time.
MODULES = ("apply_masks", "perturb", "similarity", "accumulate")
