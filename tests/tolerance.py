"""How far an operation may deviate from its reference: one entry per operation, with the reason."""

TOLERANCES = {
    # Integers: any difference is a bug.
    "masks": {"rtol": 0.0, "atol": 0.0},
    # Two float32 interpolations of zeros and ones in another order: a few roundings of values up to 1.
    "masks_rise": {"rtol": 0.0, "atol": 5e-7},
    # One product, rounded once to the output's dtype: the same bits in any order.
    "apply_masks": {"rtol": 0.0, "atol": 0.0},
    # Box–Muller in float32: a logarithm, a root and a cosine, times a scale of at most 2.
    "normal": {"rtol": 0.0, "atol": 2e-5},
    # masks_rise times latents below 5; then rounding to the output's dtype may go the other way.
    "apply_masks_rise_float64": {"rtol": 0.0, "atol": 2.5e-6},
    "apply_masks_rise_float32": {"rtol": 2**-23, "atol": 2.5e-6},
    "apply_masks_rise_float16": {"rtol": 2**-10, "atol": 2.5e-6},
    "apply_masks_rise_bfloat16": {"rtol": 2**-7, "atol": 2.5e-6},
    # A selection between two values, rounded once.
    "perturb": {"rtol": 0.0, "atol": 0.0},
    # Eleven products per axis of values below 5, in float64 and in float32.
    "blur_float64": {"rtol": 0.0, "atol": 1e-12},
    "blur": {"rtol": 0.0, "atol": 2e-6},
    # float64: E[a²] − E[a]² keeps 1e-15 of values near 1; divided by C3 = 4.5e-4 at the worst.
    "similarity_float64": {"rtol": 0.0, "atol": 1e-10},
    # float32: the variances keep about 1e-7 of values near 1, against σ_a σ_b + C3 where the signal varies.
    "similarity": {"rtol": 0.0, "atol": 2e-5},
    # The same with offsets of 100: 100 ± 0.02 in float32 minus its mean, which is itself rounded.
    "similarity_offset": {"rtol": 0.0, "atol": 1e-4},
    # As "similarity": the same float32 statistics, with the window summed in another order.
    "similarity_fused": {"rtol": 0.0, "atol": 2e-5},
    # Per mask: sums of s and s² whose scores are off by "similarity_fused".
    "accumulate_fused": {"rtol": 0.0, "atol": 4e-5},
    # Per mask: sums with masks M and M² that are off by "masks_rise", and scores below 1.
    "add_rise_fused": {"rtol": 0.0, "atol": 1e-6},
    # float64 sums of at most some thousands of values near 1, in another order.
    "add": {"rtol": 1e-12, "atol": 1e-11},
    # float64 inside, returned in float32.
    "estimate": {"rtol": 1e-6, "atol": 1e-6},
    # A float64 solve of a system whose condition number is below 1e5, returned in float32.
    "ridge": {"rtol": 1e-6, "atol": 1e-7},
}


def tolerance(op: str) -> dict[str, float]:
    """The `rtol` and `atol` of an operation, for `torch.testing.assert_close` and `numpy.testing.assert_allclose`."""
    return dict(TOLERANCES[op])
