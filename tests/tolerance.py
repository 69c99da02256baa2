"""How far an operation may be from its reference, one entry an operation, each with the reason."""

TOLERANCES = {
    # Integers: any difference is a bug.
    "masks": {"rtol": 0.0, "atol": 0.0},
    # Two float32 interpolations of zeros and ones in another order: a few roundings of values up to 1.
    "masks_rise": {"rtol": 0.0, "atol": 5e-7},
    # One product and one rounding to the output's dtype, both exact to the same bits in any order.
    "blend": {"rtol": 0.0, "atol": 0.0},
    # masks_rise times latents below 5; then the one rounding to the output's dtype may go the other way.
    "blend_rise_float64": {"rtol": 0.0, "atol": 2.5e-6},
    "blend_rise_float32": {"rtol": 2**-23, "atol": 2.5e-6},
    "blend_rise_float16": {"rtol": 2**-10, "atol": 2.5e-6},
    "blend_rise_bfloat16": {"rtol": 2**-7, "atol": 2.5e-6},
    # One value or another, rounded once.
    "erase": {"rtol": 0.0, "atol": 0.0},
    # Eleven products of each axis, in float64 and in float32, of values below 5.
    "blur_float64": {"rtol": 0.0, "atol": 1e-12},
    "blur": {"rtol": 0.0, "atol": 2e-6},
    # float64: E[a²] − E[a]² keeps 1e-15 of values near 1; divided by C3 = 4.5e-4 at the worst.
    "similarity_float64": {"rtol": 0.0, "atol": 1e-10},
    # float32: the variances keep about 1e-7 of values near 1, against σ_a σ_b + C3 where the signal varies.
    "similarity": {"rtol": 0.0, "atol": 2e-5},
    # The same with offsets of 100: what float32 leaves of 100 ± 0.02 after the mean, itself rounded, is taken away.
    "similarity_offset": {"rtol": 0.0, "atol": 1e-4},
    # As "similarity": the same float32 statistics, the window's sums in another order.
    "similarity_fused": {"rtol": 0.0, "atol": 2e-5},
    # Sums over the number of masks: s and s² of scores as far off as "similarity_fused" says.
    "accumulate_fused": {"rtol": 0.0, "atol": 4e-5},
    # The same of masks as far off as "masks_rise" says, M and M², and scores below 1.
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
