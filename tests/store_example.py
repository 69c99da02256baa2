"""A small run for the store's tests, with known values everywhere."""

import dataclasses

import numpy as np

from dfengine import store

PLAN = store.Plan(
    items=(
        store.Item("k0", "a red circle", seed=1, tokens=("a", "red", "circle"), words=("red", "circle")),
        store.Item("k1", "ein Würfel", "blurry", seed=2**64 - 1, tokens=("ein", "Würfel"), words=("Würfel",)),
    ),
    methods=(
        store.Method("rise", {"keep_probability": 0.5, "kind": "gaussian"}, num_masks=7, has_error=True),
        store.Method("random", {"seed": 3}, has_word_error=True),
    ),
    num_steps=3,
    latent=(2, 5, 6),
    image=(10, 12),
    layers=(("down.0", (5, 6)), ("mid", (3, 3)), ("up.0", (5, 6))),
    previews=True,
    model="shapes",
    settings={"sampling": "early", "gamma": 60, "timesteps": [900, 500, 100]},
)
SMALL = store.Plan(
    items=(store.Item("k", "a red circle", tokens=("a",), words=("a",)),),
    methods=(store.Method("rise", num_masks=3, has_error=True),),
    num_steps=2,
    latent=(1, 4, 4),
    image=(4, 4),
    layers=(("mid", (2, 2)),),
)
#: Plans of various shapes, by name.
PLANS = {
    "small": SMALL,
    "two": PLAN,
    "latent64": store.Plan(
        items=(store.Item("k0", "a cat", tokens=("a", "cat"), words=("cat",)), store.Item("k1", "a dog", seed=7)),
        methods=(store.Method("rise", num_masks=500, has_error=True),),
        num_steps=4,
        latent=(4, 64, 64),
        image=(64, 64),
        layers=tuple((f"down.{n}", (64 >> n, 64 >> n)) for n in range(4)),
        mantissa_bits=10,
    ),
    "wide": store.Plan(
        items=tuple(store.Item(f"k{n}", f"prompt {n}", tokens=("one",), words=("one",)) for n in range(4)),
        methods=(store.Method("rise"), store.Method("lime", num_masks=5)),
        num_steps=2,
        latent=(3, 7, 40),
        image=(9, 31),
        previews=True,
    ),
}


def half(plan: store.Plan, item: int) -> store.Plan:
    """The plan of the first or second half of the items, whose values depend only on their keys."""
    middle = len(plan.items) // 2
    return dataclasses.replace(plan, items=plan.items[:middle] if item == 0 else plan.items[middle:])


def seed_of(plan: store.Plan, item: int) -> int:
    """The seed of an item's values, which is the same in every file."""
    return int(plan.items[item].key[1:] or 0)


def trajectory(plan: store.Plan, item: int) -> dict[str, np.ndarray]:
    steps, random = plan.num_steps, np.random.default_rng(seed_of(plan, item))
    images = random.integers(256, size=(steps + 1, *plan.image, 3), dtype=np.uint8)
    return {
        "timesteps": np.arange(steps, 0, -1) * 300,
        "signal": random.random(steps),
        "noise": random.random(steps),
        "latents": random.standard_normal((steps, *plan.latent)).astype(np.float32),
        "epsilon": random.standard_normal((steps, *plan.latent)).astype(np.float32),
        "image": images[0],
    } | ({"previews": images[1:]} if plan.previews else {})


def step(plan: store.Plan, item: int, place: int, step: int) -> dict[str, np.ndarray]:
    """One map; each step has one score fewer than the one before, as after an early stop."""
    method, random = plan.methods[place], np.random.default_rng((seed_of(plan, item), place, step))
    values = {"saliency": random.standard_normal(plan.latent[1:]).astype(np.float32)}
    if method.has_error:
        values["error"] = random.random(plan.latent[1:]).astype(np.float32)
    if method.num_masks:
        values["scores"] = random.standard_normal(method.num_masks - step).astype(np.float32)
    return values


def cam(plan: store.Plan, item: int, step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng((seed_of(plan, item), 100, step))
    return {name: random.random(size).astype(np.float32) for name, size in plan.layers}


def curves(plan: store.Plan, item: int, step: int) -> dict[str, np.ndarray]:
    random, planned = np.random.default_rng((seed_of(plan, item), 200, step)), plan.items[item]
    arrays = {
        "relevance": random.random(len(planned.tokens)).astype(np.float32),
        "word_maps": random.random((len(planned.words), *plan.latent[1:])).astype(np.float32),
    }
    if any(method.has_word_error for method in plan.methods):
        arrays["word_errors"] = random.random(arrays["word_maps"].shape).astype(np.float32)
    return {name: values for name, values in arrays.items() if len(values)}


def rounded(plan: store.Plan, values: np.ndarray) -> np.ndarray:
    """Rounded values as a file stores them, with the plan's number of bits after the leading one."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * 2 ** (plan.mantissa_bits + 1)) / 2 ** (plan.mantissa_bits + 1), exponent)


def fill(writer: store.Writer) -> None:
    """Write everything that is not stored yet, in the engine's order."""
    plan, done = writer.plan, writer.done
    for item in range(len(plan.items)):
        if not writer.has_trajectory(item):
            writer.trajectory(item, **trajectory(plan, item))
        for place, method in enumerate(plan.methods):
            for at in np.flatnonzero(~done[item, place]).tolist():
                writer.step(item, method.name, at, **step(plan, item, place, at))
        for at in range(plan.num_steps):
            if plan.layers and not writer.has_cam(item, at):
                writer.cam(item, at, cam(plan, item, at))
            values, stored = (
                curves(plan, item, at),
                {
                    "relevance": writer.has_relevance,
                    "word_maps": writer.has_word_maps,
                    "word_errors": writer.has_word_maps,
                },
            )
            writer.curves(item, at, **{name: values[name] for name in values if not stored[name](item, at)})
        writer.finish(item, 1.5 + item)


def check(run: store.Run) -> int:
    """Assert that all marked values of a run are correct; returns the number of marks."""
    equal, plan, marks = np.testing.assert_array_equal, run.plan, 0
    for index, item in enumerate(run):
        if item.has_trajectory:
            marks += 1
            expected = trajectory(plan, index)
            for name in expected:
                equal(getattr(item, name)[...], expected[name], name)
        for place, method in enumerate(plan.methods):
            for at in np.flatnonzero(item.done[method.name]).tolist():
                marks += 1
                expected = step(plan, index, place, at)
                equal(item.maps[method.name][at], expected["saliency"])
                if "error" in expected:
                    equal(item.errors[method.name][at], rounded(plan, expected["error"]))
                if "scores" in expected:
                    equal(item.scores[method.name][at], np.append(expected["scores"], [np.nan] * at).astype(np.float32))
        for at in np.flatnonzero(run.marks("cam_done")[index]).tolist():
            marks += 1
            for name, values in cam(plan, index, at).items():
                equal(item.cam[name][at], rounded(plan, values))
        for name, marker in (("relevance", "relevance_done"), ("word_maps", "heat_done")):
            for at in np.flatnonzero(run.marks(marker)[index]).tolist():
                marks += 1
                expected = curves(plan, index, at)
                equal(
                    getattr(item, name)[:, at], rounded(plan, expected[name]) if name == "word_maps" else expected[name]
                )
                if name == "word_maps" and "word_errors" in expected:
                    equal(item.word_errors[:, at], rounded(plan, expected["word_errors"]))
    return marks


def total(plan: store.Plan) -> int:
    """The number of marks of a complete run."""
    curves = sum(bool(item.tokens) + bool(item.words) for item in plan.items)
    return len(plan.items) * (1 + plan.num_steps * (len(plan.methods) + bool(plan.layers))) + plan.num_steps * curves
