"""Any call of any pipeline: recorded without changing it, understood from its numbers, replayed with masked latents."""

import copy
from collections.abc import Callable
from pathlib import Path

import dfkernels
import numpy as np
import pipelines
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from marks import soak
from pipelines import PIPELINES, Example
from torch import Tensor
from torch.testing import assert_close

import dfengine
from dfengine import Attention, Cam, Counterfactual, Lime, Random, Relevance, Rise
from dfengine.explain import Explainer
from dfengine.models.recorded import Recorded
from dfengine.models.unet.stable_diffusion import StableDiffusion
from dfengine.tracing import Trace

# Raised by diffusers under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

#: One of each mechanism runs always: rows in one batch, σ-space, extra channels, tokens, two calls, lists.
QUICK = ("stable_diffusion", "flux_true_cfg", "z_image")
#: The weights of the rows of each call, in order, of what is no [−(w − 1), w] with w = 7.5.
WEIGHTS = {
    "stable_diffusion_turbo": [1],
    "latent_consistency": [1],
    "instruct_pix2pix": [7.5, -6, -0.5],
    "perturbed_attention": [-6.5, 10.5, -3],
    "ddpm": [1],
    "stable_diffusion_3": [-4, 5],
    "flux": [1],
    "flux_true_cfg": [2, -1],
    "flux_kontext": [1],
    "pixart_sigma": [-3.5, 4.5],
    "dit": [4, -3],
    "z_image": [-6, 5],
    "sana": [-3.5, 4.5],
}

#: These add no mechanism to the others.
VARIANTS = (
    "stable_diffusion_euler_a",
    "stable_diffusion_heun",
    "stable_diffusion_dpm",
    "stable_diffusion_turbo",
    "latent_consistency",
    "img2img",
    "inpaint",
    "controlnet_one",
    "flux",
    "pixart_sigma",
    "sana",
)


def marked(name: str) -> object:
    if name in QUICK:
        return name
    return soak(name) if name in VARIANTS else pytest.param(name, marks=pytest.mark.slow)


examples = pytest.mark.parametrize("name", [marked(name) for name in PIPELINES])


def traced(name: str) -> tuple[Example, Trace]:
    one = PIPELINES[name]()
    with dfengine.trace(one.pipeline) as trace:
        one.call()
    return one, trace


def state(pipeline: object) -> list[object]:
    """Everything that a trace touches."""
    parts = pipeline.components.values()  # type: ignore[attr-defined]
    hooks = [
        (dict(part._forward_hooks), dict(part._forward_pre_hooks)) for part in parts if hasattr(part, "parameters")
    ]
    return [type(pipeline), hooks, [sorted(vars(part)) for part in parts if hasattr(part, "config")]]


@examples
def test_a_traced_call_is_the_same_and_leaves_nothing_behind(name: str) -> None:
    one = PIPELINES[name]()
    expected, before = one.call(), state(one.pipeline)
    with dfengine.trace(one.pipeline):
        images = one.call()
    assert np.array_equal(np.asarray(images), np.asarray(expected))
    assert state(one.pipeline) == before


@examples
def test_rows_and_weights_are_inferred_from_the_tensors(name: str) -> None:
    _, trace = traced(name)
    denoiser = trace.denoiser()
    if name == "qwen_image":  # its guidance is rescaled, which is not linear
        assert all(0 < roles.residual < 0.05 for roles in denoiser.roles)
        assert all(roles.conditional(0).weight > 3 for roles in denoiser.roles)
        return
    expected = WEIGHTS.get(name, [-6.5, 7.5])
    for roles in denoiser.roles:
        assert [row.weight for row in roles.rows] == pytest.approx(expected, abs=1e-4)
        assert roles.residual < 1e-6
        assert roles.sign == (-1 if name == "z_image" else 1)
        assert roles.conditional(0).weight == pytest.approx(max(expected, key=lambda w: w * roles.sign))
    is_pair = len(expected) == 2
    assert denoiser.job.guidance == pytest.approx(max(map(abs, expected)) if is_pair else 1, abs=1e-4)


@examples
def test_a_batch_of_latents_is_predicted_as_one_by_one(name: str) -> None:
    _, trace = traced(name)
    denoiser = trace.denoiser()
    x = torch.randn(4, *denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor(denoiser.job.timesteps).repeat(4)[:4].double()
    condition = denoiser.condition([denoiser.job] * 4)
    condition.tensors["role"][1::2] = 1
    with torch.no_grad():
        together = denoiser.predict(x, t, condition)
        alone = [denoiser.predict(x[i : i + 1], t[i : i + 1], condition[i : i + 1]) for i in range(4)]
    assert_close(together, torch.cat(alone), rtol=0, atol=2e-5 * float(together.std()))
    assert together.std() > 1e-3


@examples
def test_every_pipeline_is_explained_and_stored(name: str, tmp_path: Path) -> None:
    _, trace = traced(name)
    result = trace.explain([Rise(num_masks=8, cell=2), Random()], out=tmp_path / "call.h5")
    assert np.isfinite(result.maps["rise"]).all()
    assert result.maps["rise"].std() > 1e-3
    assert len(result.maps["rise"]) == len(trace.calls[0].steps) - (3 if name == "stable_diffusion_heun" else 0)
    assert result.previews is not None
    if not name.startswith("inpaint"):  # which puts the given image's places back after every step
        assert np.abs(result.previews[-1].astype(int) - result.image.astype(int)).mean() < 80
    with dfengine.open(tmp_path / "call.h5") as run:
        assert np.array_equal(run[0].maps["rise"], result.maps["rise"])


# A map by hand --------------------------------------------------------------------------------------------------------


def by_unet(one: Example, x: Tensor, t: Tensor) -> Tensor:
    prompt = one.arguments["prompt_embeds"].expand(len(x), -1, -1)
    return one.pipeline.unet(x, t, prompt).sample


def by_sd3(one: Example, x: Tensor, t: Tensor) -> Tensor:
    n, arguments = len(x), one.arguments
    velocity = one.pipeline.transformer(
        hidden_states=x,
        timestep=t.expand(n),
        encoder_hidden_states=arguments["prompt_embeds"].expand(n, -1, -1),
        pooled_projections=arguments["pooled_prompt_embeds"].expand(n, -1),
    ).sample
    return x + (1 - t / 1000) * velocity


def by_flux(one: Example, x: Tensor, t: Tensor) -> Tensor:
    n, (h, w), arguments = len(x), x.shape[2:], one.arguments
    places = torch.zeros(h, w, 3)
    places[..., 1], places[..., 2] = torch.arange(h)[:, None], torch.arange(w)
    velocity = one.pipeline.transformer(
        hidden_states=x.flatten(2).transpose(1, 2),
        timestep=(t / 1000).expand(n),
        guidance=None,
        encoder_hidden_states=arguments["prompt_embeds"].expand(n, -1, -1),
        pooled_projections=arguments["pooled_prompt_embeds"].expand(n, -1),
        txt_ids=torch.zeros(7, 3),
        img_ids=places.flatten(0, 1),
    ).sample
    return x + (1 - t / 1000) * velocity.transpose(1, 2).unflatten(2, (h, w))


def by_z_image(one: Example, x: Tensor, t: Tensor) -> Tensor:
    captions = [one.arguments["prompt_embeds"][0]] * len(x)
    velocity = one.pipeline.transformer(list(x[:, :, None]), (1 - t / 1000).expand(len(x)), captions)[0]
    return x - (1 - t / 1000) * torch.stack(velocity)[:, :, 0]


@pytest.mark.parametrize(
    ("name", "epsilon"),
    [
        ("stable_diffusion", by_unet),
        ("stable_diffusion_3", by_sd3),
        ("flux_true_cfg", by_flux),
        ("z_image", by_z_image),
    ],
)
def test_a_map_is_what_the_pipelines_own_network_gives(
    name: str, epsilon: Callable[[Example, Tensor, Tensor], Tensor]
) -> None:
    one, trace = traced(name)
    settings = {"output": "epsilon", "similarity": "mse", "score": "global", "estimator": "coverage"}
    rise = Rise(num_masks=12, cell=1, shifted=False, design="iid", **settings)
    result = trace.explain(rise)
    job = trace.denoiser().job
    for step in (0, 2):
        t, x = torch.tensor(job.timesteps[step]), torch.from_numpy(result.latents[step])[None]
        masks = dfkernels.masks(job.mask_seed, step, 0, 12, x.shape[2:])
        with torch.no_grad():
            masked, reference = epsilon(one, x * masks[:, None], t), epsilon(one, x, t)
        scores = -(masked - reference).square().mean((1, 2, 3))
        expected = (scores[:, None, None] * masks).sum(0) / masks.sum(0)
        assert_close(torch.from_numpy(result.maps["rise"][step]), expected, rtol=1e-4, atol=1e-5)


# Several images, several calls, some steps ----------------------------------------------------------------------------


@pytest.mark.slow
def test_each_image_of_a_batch_has_its_own_latent_and_prompt() -> None:
    one = PIPELINES["stable_diffusion"]()
    changes = {
        name: torch.cat([one.arguments[name], 2 * one.arguments[name]]) for name in one.arguments if "embeds" in name
    }
    with dfengine.trace(one.pipeline) as trace:
        one.call()
        images = one.call(**changes, num_images_per_prompt=2)
    results = [trace.explain(Random(), image=image) for image in range(4)]
    for result, image in zip(results, images, strict=True):
        assert np.abs(result.image / 255 - image.permute(1, 2, 0).numpy()).max() < 0.003
    latents = [result.latents[0] for result in results]
    assert all(not np.array_equal(latents[i], latents[j]) for i in range(4) for j in range(i))
    first = trace.explain(Random(), call=0)
    alone = traced("stable_diffusion")[1].explain(Random())
    assert np.array_equal(first.latents, alone.latents)


@pytest.mark.slow
def test_some_steps_are_those_of_all() -> None:
    _, trace = traced("stable_diffusion")
    every, some = trace.explain(Lime(num_samples=8)), trace.explain(Lime(num_samples=8), steps=[1, 3])
    assert some.timesteps.tolist() == every.timesteps[[1, 3]].tolist()
    assert np.array_equal(some.latents, every.latents[[1, 3]])


@pytest.mark.slow
def test_a_prompt_and_a_seed_are_those_of_the_call(tiny: StableDiffusion) -> None:
    pipeline = tiny.pipeline
    with dfengine.trace(pipeline) as trace:
        generator = torch.Generator().manual_seed(5)
        pipeline(["a red circle", "a blue ring"], num_inference_steps=2, generator=generator)
    result = trace.explain(Random(), image=1)
    assert (result.prompt, result.seed) == ("a blue ring", 5)


@pytest.mark.parametrize("name", ["flux_true_cfg", pytest.param("controlnet_two", marks=pytest.mark.slow)])
def test_a_saved_call_is_explained_alike(name: str, tmp_path: Path) -> None:
    one, trace = traced(name)
    trace.save(tmp_path / "call.trace")
    again = dfengine.replay(one.pipeline, tmp_path / "call.trace")
    rise = Rise(num_masks=8, cell=2)
    assert np.array_equal(trace.explain(rise).maps["rise"], again.explain(rise).maps["rise"])
    assert again.nbytes == trace.nbytes > 0
    size = (tmp_path / "call.trace").stat().st_size
    assert size < 2 * trace.nbytes + 100_000


@pytest.mark.slow
def test_what_is_recorded_is_what_was_given_even_if_it_changes_later() -> None:
    one = PIPELINES["stable_diffusion"]()

    def spoil(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point():
                value.zero_()

    with dfengine.trace(one.pipeline) as trace:
        hook = one.pipeline.unet.register_forward_hook(spoil, with_kwargs=True)
        one.call()
        hook.remove()
    first, *later = (step.forwards[0].arguments["encoder_hidden_states"] for step in trace.calls[0].steps)
    assert torch.equal(first, torch.cat([one.arguments["negative_prompt_embeds"], one.arguments["prompt_embeds"]]))
    assert all(value.count_nonzero() == 0 for value in later)
    assert all(step.forwards[0].arguments["sample"].count_nonzero() for step in trace.calls[0].steps)


# Calls that are unlike others -----------------------------------------------------------------------------------------


def test_a_step_of_second_order_is_the_one_that_is_taken() -> None:
    _, trace = traced("stable_diffusion_heun")
    steps = trace.denoiser().steps
    every = trace.calls[0].steps
    assert [step.timestep for step in every] == [999, 666, 666, 333, 333, 0, 0]
    assert [step.sample is every[place].sample for step, place in zip(steps, (0, 2, 4, 6), strict=True)] == [True] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), [("z_image", 2), ("qwen_image", 2), ("controlnet_two", 3), ("dit", 2)])
def test_several_images_are_explained_each(name: str, images: int) -> None:
    one = PIPELINES[name]()
    changes = {"class_labels": [1, 2]} if name == "dit" else {"num_images_per_prompt": images}
    with dfengine.trace(one.pipeline) as trace:
        pictures = one.call(**changes)
    maps = [trace.explain(Rise(num_masks=8, cell=2), image=image).maps["rise"] for image in range(images)]
    assert len(pictures) == images
    assert all(np.isfinite(one).all() for one in maps)
    assert not np.array_equal(maps[0], maps[-1])


@pytest.mark.slow
def test_equal_images_are_two() -> None:
    one = PIPELINES["stable_diffusion"]()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    with dfengine.trace(one.pipeline) as trace:
        one.pipeline(**one.arguments, num_images_per_prompt=2, generator=generators, output_type="pt")
    first, second = (trace.explain(Random(), image=image) for image in range(2))
    assert np.array_equal(first.latents, second.latents)


@pytest.mark.slow
def test_the_scheduler_may_be_copied_or_replaced_inside() -> None:
    one = PIPELINES["stable_diffusion_euler"]()
    own, expected = one.pipeline.scheduler, one.call()
    try:
        with dfengine.trace(one.pipeline) as trace:
            one.pipeline.scheduler = copy.deepcopy(own)
            images = one.call()
            inside = copy.deepcopy(one.pipeline.scheduler)
        assert torch.equal(images, expected)
        assert "step" not in vars(inside)
        assert trace.explain(Random()).maps["random"].shape == (4, 8, 8)
    finally:
        one.pipeline.scheduler = own


@pytest.mark.slow
def test_a_network_compiled_in_place_is_recorded() -> None:
    one = PIPELINES["stable_diffusion"]()
    expected = one.call()
    one.pipeline.unet.compile(backend="eager", fullgraph=True)
    try:
        with dfengine.trace(one.pipeline) as trace:
            images = one.call()
        assert_close(images, expected)
        assert trace.explain(Rise(8)).maps["rise"].shape == (4, 8, 8)
    finally:
        one.pipeline.unet._compiled_call_impl = None


@pytest.mark.slow
def test_an_image_resized_after_decoding_keeps_its_previews() -> None:
    one = PIPELINES["stable_diffusion"]()

    class Resizing(type(one.pipeline)):  # type: ignore[misc]  # a class that is known at run time
        def __call__(self, *args: object, **kwargs: object) -> object:
            output = super().__call__(*args, **kwargs)
            return (F.interpolate(output.images, (25, 25)),)

    pipeline = Resizing(**one.pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    with dfengine.trace(pipeline) as trace:
        pipeline(**one.arguments, output_type="pt")
    result = trace.explain(Random())
    assert result.previews is not None
    assert result.previews.shape[1:] == result.image.shape == (25, 25, 3)


@pytest.mark.slow
def test_a_call_that_cannot_be_recorded_goes_on_and_says_why_later() -> None:
    one = PIPELINES["stable_diffusion"]()

    class Strange(type(one.pipeline)):  # type: ignore[misc]  # a class that is known at run time
        def __call__(self, *args: object, **kwargs: object) -> object:
            super().__call__(*args, **kwargs)
            return {"depth": 1}

    class Own(DDIMScheduler):
        def step(self, output: Tensor, t: Tensor, x: Tensor, **kwargs: object) -> object:  # type: ignore[override]
            return super().step(output, t, x, **kwargs)

    pipeline = Strange(**one.pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    with dfengine.trace(pipeline) as trace:
        assert pipeline(**one.arguments) == {"depth": 1}
    with pytest.raises(ValueError, match="the call returned 0 images and its steps are of 1"):
        trace.explain()
    own = one.pipeline.scheduler
    try:
        one.pipeline.scheduler = Own.from_config(own.config)
        with dfengine.trace(one.pipeline) as trace:
            one.call()
        with pytest.raises(ValueError, match="Own does not step from a model_output, which is not supported"):
            trace.explain()
    finally:
        one.pipeline.scheduler = own


@pytest.mark.slow
def test_a_crop_is_no_map_of_the_whole_image() -> None:
    one = PIPELINES["inpaint"]()
    given = {"image": pipelines.image(96).crop((0, 0, 96, 64)), "mask_image": pipelines.mask(96).crop((0, 0, 96, 64))}
    with dfengine.trace(one.pipeline) as trace:
        one.call(**given, height=16, width=16, padding_mask_crop=2, output_type="pil")
    with pytest.raises(ValueError, match="8×8 has not the proportions of the image, 64×96 pixels, which was cropped"):
        trace.explain()


# What cannot be -------------------------------------------------------------------------------------------------------


class Empty:
    """A pipeline of nothing."""

    def __init__(self) -> None:
        self.components: dict[str, object] = {}


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (torch.nn.Linear(1, 1), "Linear is no diffusers pipeline: give the pipeline object whose call to explain"),
        (Empty(), "Empty has no network to record: expected a component 'unet'"),
    ],
)
def test_what_is_no_pipeline_is_refused(pipeline: object, message: str) -> None:
    with pytest.raises(ValueError, match=message), dfengine.trace(pipeline):
        pass


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    one = PIPELINES["stable_diffusion"]()
    before = state(one.pipeline)
    with pytest.raises(ValueError, match="divisible by 8"), dfengine.trace(one.pipeline) as trace:
        one.call(height=17)
    assert state(one.pipeline) == before
    assert trace.calls == []
    with pytest.raises(
        ValueError, match=r"no call is recorded: call the pipeline inside `with dfengine\.trace\(pipe\)`"
    ):
        trace.explain()


def test_impossible_requests_are_one_line() -> None:
    one, trace = traced("stable_diffusion")
    for arguments, message in [
        ({"image": 1}, "image 1 is not there: the call made 1, counted from 0"),
        ({"call": 3}, "call 3 is not there: 1 are recorded, counted from 0"),
        ({"steps": [4]}, r"step 4 is outside \[0, 3\]: the call took 4 steps"),
        ({"steps": "some"}, "steps 'some' .*'all' or a list of steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            trace.explain(**arguments)
    weight = one.pipeline.unet.conv_in.weight
    with torch.no_grad():
        weight += 1
    try:
        with pytest.raises(ValueError, match="weights have changed since the call: record it again"):
            trace.explain()
    finally:
        with torch.no_grad():
            weight -= 1


@pytest.mark.slow
def test_predictions_that_a_call_does_not_have_are_refused() -> None:
    _, trace = traced("perturbed_attention")
    message = (
        r"t = 751 the call does not step with u \+ w \(c − u\).*3 predictions, weights -6\.5, 10\.5, -3\): explain"
    )
    for explainer in (Rise(target="guided"), "xdiffusion-rise"):
        with pytest.raises(ValueError, match=message):
            trace.explain(explainer)
    _, trace = traced("stable_diffusion_turbo")
    with pytest.raises(ValueError, match="no unconditional prediction at t = 999: explain the conditional one"):
        trace.explain(Rise(target="unconditional"))

    def weaken(pipeline: object, step: int, *_: object) -> dict[str, object]:
        pipeline._guidance_scale = 2.0 + step  # type: ignore[attr-defined]
        return {}

    one = PIPELINES["stable_diffusion"]()
    with dfengine.trace(one.pipeline) as trace:
        one.call(callback_on_step_end=weaken)
    with pytest.raises(
        ValueError, match=r"t = 501 the call does not step with .* w = 7\.5 .*weights -1, 2\).* steps that"
    ):
        trace.explain(Rise(8, target="guided"))
    assert np.isfinite(trace.explain(Rise(8, target="guided"), steps=[0]).maps["rise"]).all()
    one = PIPELINES["stable_diffusion"]()
    with dfengine.trace(one.pipeline) as trace:
        one.call(output_type="latent")
    with pytest.raises(ValueError, match="0 images and its steps are of 1: leave output_type 'latent' out"):
        trace.explain()


@pytest.mark.parametrize(
    ("explainer", "message"),
    [
        (Cam(), "StableDiffusionPipeline does not expose .*: DF-CAM is not possible with it"),
        (Attention(), "StableDiffusionPipeline does not expose its attention: attention is"),
        (Relevance(), "StableDiffusionPipeline does not expose its attention: relevance is"),
        (Counterfactual(words=["image"]), "a recorded call has one prompt"),
    ],
)
def test_explainers_that_need_more_say_so(explainer: Explainer, message: str) -> None:
    _, trace = traced("stable_diffusion")
    with pytest.raises(ValueError, match=message):
        trace.explain(explainer)


@pytest.mark.slow
def test_a_network_in_training_mode_is_named() -> None:
    one = PIPELINES["dit"]()
    one.pipeline.transformer.train()
    try:
        with dfengine.trace(one.pipeline) as trace:
            one.call()
    finally:
        one.pipeline.transformer.eval()
    with pytest.raises(
        ValueError, match=r"does not return what it returned.*training mode: call transformer\.eval\(\)"
    ):
        trace.explain()


@pytest.mark.slow
def test_replaced_processors_are_named() -> None:
    one, trace = traced("stable_diffusion")
    kept = dict(one.pipeline.unet.attn_processors)
    one.pipeline.unet.set_attn_processor(Doubling())
    try:
        with pytest.raises(
            ValueError, match=r"does not return what it returned.*attention processors are not those of the call"
        ):
            trace.explain()
    finally:
        one.pipeline.unet.set_attn_processor(kept)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    pipeline = PIPELINES["stable_diffusion"]().pipeline
    with pytest.raises(FileNotFoundError, match=r"missing\.trace is not there: write it with Trace\.save"):
        dfengine.replay(pipeline, tmp_path / "missing.trace")
    (tmp_path / "text").write_text("no call")
    torch.save({"a": 1}, tmp_path / "weights.pt")
    torch.save({"version": 9}, tmp_path / "later")
    for name in ("text", "weights.pt"):
        with pytest.raises(ValueError, match=rf"{name} is no recorded call: expected a file that Trace\.save wrote"):
            dfengine.replay(pipeline, tmp_path / name)
    _, trace = traced("flux_true_cfg")
    trace.save(tmp_path / "flux")
    with pytest.raises(
        ValueError, match="the call is one of FluxPipeline, and the pipeline StableDiffusionPipeline: give"
    ):
        dfengine.replay(pipeline, tmp_path / "flux").explain()
    with pytest.raises(ValueError, match="UNet2DConditionModel is no diffusers pipeline"):
        dfengine.replay(pipeline.unet, tmp_path / "flux")
    with pytest.raises(ValueError, match="StableDiffusionPipeline is a class: give the pipeline object"):
        dfengine.trace(type(pipeline))
    with pytest.raises(ValueError, match="later has version 9 and this dfengine reads 1: record the call again"):
        dfengine.replay(pipeline, tmp_path / "later")


class Doubling:
    """An attention that is none."""

    def __call__(self, attention: object, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return 2 * hidden_states


def test_a_recorded_call_has_its_own_image() -> None:
    _, trace = traced("stable_diffusion")
    denoiser = trace.denoiser()
    assert isinstance(denoiser, Recorded)
    with pytest.raises(ValueError, match="a recorded call has its own image"):
        denoiser.encode(torch.zeros(1, 3, 16, 16))


# The table of docs/pipelines.md, which `python tests/test_tracing.py` writes ------------------------------------------

DOCUMENT = Path(__file__).parent.parent / "docs" / "pipelines.md"
BEGIN, END = "<!-- pipelines: begin -->\n", "<!-- pipelines: end -->\n"


def table() -> str:
    """What was found of each call."""
    lines = [
        "| pipeline | scheduler | the latent in the network's input | latent | calls a step | weights of the rows |",
        "|---|---|---|---|---|---|",
    ]
    for name in PIPELINES:
        one, trace = traced(name)
        denoiser = trace.denoiser()
        roles, (argument, value) = denoiser.roles[0], denoiser.steps[0].forwards[0].inputs
        part = roles.latent
        place = "all of it"
        if part.axis is not None:
            what = "channels" if not denoiser.layout.has_tokens else "tokens"
            place = f"the {'first' if part.start == 0 else 'last'} {part.size} {what}"
        if abs(roles.scale - 1) > 1e-6:
            place += ", scaled"
        kind = "list" if isinstance(value, list) else "tokens" if denoiser.layout.has_tokens else "map"
        weights = ", ".join(f"{row.weight:.3g}".replace("-", "−") for row in roles.rows)
        note = "" if roles.residual < 1e-6 else f" (of {100 * roles.residual:.1g} % they say nothing)"
        pipeline, scheduler = type(one.pipeline).__name__, type(one.pipeline.scheduler).__name__
        size = "×".join(map(str, denoiser.latent_shape))
        lines.append(
            f"| {pipeline} | {scheduler} | `{argument}`, {place} | {kind} of {size} "
            f"| {len(denoiser.steps[0].forwards)} | {weights}{note} |"
        )
    return "\n".join(lines) + "\n"


@soak
def test_the_table_of_pipelines_is_what_is_found() -> None:
    _, _, rest = DOCUMENT.read_text().partition(BEGIN)
    assert rest.partition(END)[0] == table()


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
