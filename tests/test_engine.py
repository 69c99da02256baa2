"""The engine end to end on the embedded model: stored results, interruptions and invalid input."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import Analytic

import dfengine
from dfengine import Engine, Rise, StepMap
from dfengine.events import Event, Finished, Generated
from dfengine.explain import describe, rebuild
from dfengine.plan import item_key

CAPTION = "a red circle above a blue square on a gray background"


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(tiny_folder, device="cpu", batch_size=8)


@pytest.mark.slow
def test_stored_results_equal_returned_ones(engine: Engine, tmp_path: Path) -> None:
    explainers = [Rise(12), Rise(5, score="global", estimator="sum", name="printed")]
    result = engine.explain(CAPTION, explainers, num_steps=3, seed=4, out=tmp_path / "run.h5")
    assert {path.name for path in tmp_path.iterdir()} == {"run.h5"}
    with dfengine.open(tmp_path / "run.h5") as run:
        (item,) = run
        assert (item.prompt, item.seed, item.model) == (CAPTION, 4, engine.denoiser.name)
        np.testing.assert_array_equal(item.image, result.image)
        np.testing.assert_array_equal(item.timesteps, result.timesteps)
        np.testing.assert_array_equal(item.latents, result.latents)
        np.testing.assert_array_equal(item.epsilon, result.epsilon)
        np.testing.assert_array_equal(item.previews, result.previews)
        for name in ("rise", "printed"):
            np.testing.assert_array_equal(item.maps[name], result.maps[name])
            np.testing.assert_array_equal(item.errors[name], result.errors[name])
            np.testing.assert_array_equal(item.scores[name], result.scores[name])
            np.testing.assert_array_equal(item.heatmap(name, 2), result.heatmap(name, 2))
            assert item.done[name].all()
        assert run.plan.methods[0].settings == describe(explainers[0])
    assert result.maps["rise"].shape == (3, 8, 8)
    assert result.previews is not None
    assert result.previews.shape == (3, 16, 16, 3)
    assert np.isfinite(result.maps["rise"]).all()


@pytest.mark.slow
def test_a_result_is_reproduced_from_its_file(engine: Engine, tmp_path: Path) -> None:
    rises = [
        Rise(6, keep_probability=0.3, mask_kind="rise", grid=4, window=7),
        Rise(4, estimator="contrast", name="other"),
    ]
    picture = np.full((16, 16, 3), 200, np.uint8)
    settings = {"num_steps": 2, "seed": 5, "guidance": 3.5, "negative_prompt": "a blue square on a gray background"}
    for image in (None, picture):
        first = engine.explain(CAPTION, rises, **settings, image=image, out=tmp_path / "run.h5", overwrite=True)
        with dfengine.open(tmp_path / "run.h5") as run:
            assert list(run[0].settings.values()) == rises
            job = run[0].job
            events = engine.stream([job], list(run[0].settings.values()))
            maps = {(event.method, event.step): event for event in events if isinstance(event, StepMap)}
        assert (job.seed, job.guidance, job.negative_prompt) == (5, 3.5, settings["negative_prompt"])
        assert (job.image is None) == (image is None)
        for (method, step), repeated in maps.items():
            np.testing.assert_array_equal(repeated.saliency, first.maps[method][step])
        assert len(maps) == 4


@pytest.mark.slow
def test_functions_are_stored_by_name(engine: Engine, tmp_path: Path) -> None:
    rise = Rise(4, similarity=torch.nn.functional.mse_loss, score="global", estimator="sum")
    restored = rebuild(json.loads(json.dumps(describe(rise))))
    assert restored == dataclasses.replace(rise, similarity=restored.similarity)
    with pytest.raises(ValueError, match=r"torch.nn.functional.mse_loss is not in the file.*dataclasses.replace"):
        engine.explain(CAPTION, restored, num_steps=1)
    assert describe(restored) == describe(rise)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "explainer None is not known: expected one of .*Rise"),
        ({"explainer": "Lemon"}, "explainer 'Lemon' is not known"),
        ({"explainer": "Rise", "num_masks": 3, "flavour": 1}, "Rise has no flavour here: read the file with a newer"),
    ],
)
def test_settings_of_a_newer_dfengine_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rebuild(settings)


def test_a_generation_that_fails_leaves_no_file(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs out of range"):
        engine.explain(CAPTION, Rise(2), num_steps=2, guidance=1e300, out=tmp_path / "run.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stream_yields_events_in_order(engine: Engine) -> None:
    jobs = [engine.job(CAPTION, seed=seed, num_steps=2) for seed in range(5)]
    jobs.append(engine.job("a green star on a white background", num_steps=3))
    events: list[Event] = list(engine.stream(jobs, Rise(3)))
    for item, job in enumerate(jobs):
        item_events = [event for event in events if event.item == item]
        assert isinstance(item_events[0], Generated)
        assert item_events[0].trajectory.job is job
        assert isinstance(item_events[-1], Finished)
        assert [event.step for event in item_events if isinstance(event, StepMap)] == list(range(len(job.timesteps)))
    # With a batch of 8, four guided trajectories are sampled together.
    assert [type(event) for event in events[:5]] == [Generated] * 4 + [StepMap]


@pytest.mark.slow
def test_maps_do_not_depend_on_the_other_items_of_a_stream(engine: Engine) -> None:
    jobs = [engine.job(CAPTION, seed=seed, num_steps=2) for seed in range(3)]
    together = {(e.item, e.step): e for e in engine.stream(jobs, Rise(10)) if isinstance(e, StepMap)}
    (single,) = [e for e in engine.stream(jobs[2:], Rise(10)) if isinstance(e, StepMap) and e.step == 1]
    torch.testing.assert_close(together[2, 1].saliency, single.saliency, rtol=1e-3, atol=1e-4)


def test_exponential_and_explicit_time_steps(engine: Engine) -> None:
    early = engine.job(CAPTION, num_steps=4, sampling="early", gamma=10)
    assert list(early.timesteps) == dfengine.exponential_timesteps(4, 10, "early")
    assert engine.job(CAPTION, sampling=[900, 500, 20]).timesteps == (900, 500, 20)


@pytest.mark.slow
def test_a_given_image_replaces_the_generation() -> None:
    engine = Engine.from_pretrained("shapes", device="cpu")
    generated = engine.explain(CAPTION, Rise(2), num_steps=8, seed=1)
    result = engine.explain(CAPTION, Rise(2), image=generated.image, num_steps=3)
    np.testing.assert_array_equal(result.image, generated.image)
    # The last step has hardly any noise, so the latent decodes to the image.
    last = engine.denoiser.decode(torch.from_numpy(result.latents[-1:]))[0].permute(1, 2, 0).numpy()
    assert np.abs(last - generated.image / 255).mean() < 0.03


@pytest.mark.slow
def test_progress_is_reported(engine: Engine) -> None:
    events: list[Event] = []
    engine.explain(CAPTION, Rise(2), num_steps=2, on_event=events.append)
    assert [type(event).__name__ for event in events] == ["Generated", "StepMap", "StepMap", "Finished"]


@pytest.mark.slow
def test_a_custom_pipeline_is_wrapped(engine: Engine) -> None:
    wrapped = Engine(engine.denoiser.pipeline, batch_size=4)
    assert wrapped.denoiser.batch_size == 4
    actual = wrapped.explain(CAPTION, Rise(8), num_steps=1, guidance=engine.guidance)
    expected = engine.explain(CAPTION, Rise(8), num_steps=1)
    np.testing.assert_allclose(actual.maps["rise"], expected.maps["rise"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_integer_and_float_guidance_give_the_same_job(engine: Engine) -> None:
    with_int, with_float = (Engine(engine.denoiser.pipeline, guidance=scale) for scale in (2, 2.0))  # type: ignore[attr-defined]
    jobs = [one.job(CAPTION, num_steps=2) for one in (with_int, with_float)]
    assert item_key(with_int.denoiser, "", jobs[0], {}) == item_key(with_float.denoiser, "", jobs[1], {})
    assert with_int.explain(CAPTION, Rise(4, target="guided"), num_steps=1).maps["rise"].shape == (1, 8, 8)


def test_a_custom_denoiser_is_explained() -> None:
    engine = Engine(Analytic(lambda x_t, _: x_t, shape=(1, 4, 4)))
    result = engine.explain("1", Rise(3, estimator="sum"), num_steps=2)
    assert result.maps["rise"].shape == (2, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "a red dog"}, "does not know 'dog'; its words are: a above an"),
        ({"prompt": "a red circle on " + "a " * 20}, "would be cut"),
        ({"num_steps": 0}, "num_steps 0 .* at least 1"),
        ({"num_steps": 1001}, "1001 steps are more than the 1000"),
        ({"sampling": "middle"}, "sampling 'middle'"),
        ({"sampling": [5, 7]}, "decrease strictly"),
        ({"sampling": "early", "gamma": -1}, "gamma -1"),
        ({"seed": -1}, "seed -1"),
        ({"negative_prompt": "ugly"}, "does not know 'ugly'"),
        ({"image": np.zeros((3, 3, 3), np.uint8)}, "resize it"),
        ({"explainers": []}, "no explainer"),
        ({"explainers": [Rise(1), Rise(2)]}, "share a name"),
    ],
)
def test_invalid_input_is_rejected_before_anything_is_written(
    engine: Engine, tmp_path: Path, changes: dict, message: str
) -> None:
    options = {"prompt": CAPTION, "explainers": Rise(2), "num_steps": 2} | changes
    with pytest.raises(ValueError, match=message):
        engine.explain(**options, out=tmp_path / "run.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_existing_file_is_overwritten_only_on_request(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    first = engine.explain(CAPTION, Rise(2), num_steps=1, out=out)
    with pytest.raises(ValueError, match="--overwrite"):
        engine.explain(CAPTION, Rise(3), num_steps=1, out=out)
    with dfengine.open(out) as run:
        np.testing.assert_array_equal(run[0].maps["rise"], first.maps["rise"])
    engine.explain(CAPTION, Rise(3), num_steps=1, out=out, overwrite=True)
    with dfengine.open(out) as run:
        assert run.plan.methods[0].num_masks == 3


@pytest.mark.slow
def test_an_interruption_keeps_completed_maps(engine: Engine, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, StepMap) and event.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.explain(CAPTION, Rise(16), num_steps=4, out=tmp_path / "run.h5", on_event=stop)
    with dfengine.open(tmp_path / "run.part.h5") as run:
        assert run[0].done["rise"].tolist() == [True, True, False, False]
        assert np.isfinite(run[0].maps["rise"][:2]).all()
        assert np.isnan(run[0].maps["rise"][2:]).all()


@pytest.mark.slow
def test_resuming_an_interrupted_run_gives_identical_bits(engine: Engine, tmp_path: Path) -> None:
    explainers = [Rise(21), Rise(13, score="global", estimator="contrast", name="global")]
    uninterrupted = engine.explain(CAPTION, explainers, num_steps=4, out=tmp_path / "whole.h5")

    def stop(event: Event) -> None:
        if isinstance(event, StepMap) and (event.method, event.step) == ("global", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.explain(CAPTION, explainers, num_steps=4, out=tmp_path / "cut.h5", on_event=stop)
    events: list[Event] = []
    resumed = engine.explain(CAPTION, explainers, num_steps=4, out=tmp_path / "cut.h5", on_event=events.append)
    assert [(e.method, e.step) for e in events if isinstance(e, StepMap)] == [("global", 2), ("global", 3)]
    with dfengine.open(tmp_path / "whole.h5") as expected, dfengine.open(tmp_path / "cut.h5") as actual:
        for name in ("rise", "global"):
            for kind in ("maps", "errors", "scores"):
                np.testing.assert_array_equal(getattr(expected[0], kind)[name], getattr(actual[0], kind)[name])
                np.testing.assert_array_equal(getattr(resumed, kind)[name], getattr(uninterrupted, kind)[name])
        np.testing.assert_array_equal(expected[0].previews, actual[0].previews)
        np.testing.assert_array_equal(resumed.previews, uninterrupted.previews)
        np.testing.assert_array_equal(resumed.image, uninterrupted.image)


@pytest.mark.slow
def test_an_interrupted_run_with_other_settings_is_rejected(engine: Engine, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.explain(CAPTION, Rise(4), num_steps=2, out=tmp_path / "run.h5", on_event=stop)
    with pytest.raises(ValueError, match=r"num_masks of rise \(4, now 5\)"):
        engine.explain(CAPTION, Rise(5), num_steps=2, out=tmp_path / "run.h5")
    engine.explain(CAPTION, Rise(5), num_steps=2, out=tmp_path / "run.h5", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run.h5"}


def test_a_run_with_a_custom_similarity_is_not_resumed(engine: Engine, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        raise KeyboardInterrupt

    def mean_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.mean((1, 2, 3))

    rise = Rise(4, similarity=mean_of, score="global", estimator="sum")
    with pytest.raises(KeyboardInterrupt):
        engine.explain(CAPTION, rise, num_steps=2, out=tmp_path / "run.h5", on_event=stop)
    with pytest.raises(ValueError, match="interrupted run"):
        engine.explain(CAPTION, rise, num_steps=2, out=tmp_path / "run.h5")


def test_the_key_of_an_item_depends_on_all_its_inputs(engine: Engine) -> None:
    job = engine.job(CAPTION)
    settings = {"rise": describe(Rise(5))}
    model, half, other = (copy.copy(engine.denoiser) for _ in range(3))
    half.dtype, other.name = torch.float16, "other"
    keys = {
        item_key(model, "", job, settings),
        item_key(other, "", job, settings),
        item_key(half, "", job, settings),
        item_key(model, "other weights", job, settings),
        item_key(model, "", dataclasses.replace(job, seed=1), settings),
        item_key(model, "", dataclasses.replace(job, prompt="a red circle"), settings),
        item_key(model, "", dataclasses.replace(job, negative_prompt="a red circle"), settings),
        item_key(model, "", dataclasses.replace(job, guidance=4.0), settings),
        item_key(model, "", dataclasses.replace(job, timesteps=(3, 2)), settings),
        item_key(model, "", dataclasses.replace(job, image=torch.zeros(2, 2, 3, dtype=torch.uint8)), settings),
        item_key(model, "", job, {"rise": describe(Rise(6))}),
    }
    assert len(keys) == 11
    assert item_key(model, "", engine.job(CAPTION), {"rise": describe(Rise(5))}) in keys
