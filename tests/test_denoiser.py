"""The three targets and the conversion of predictions, on a network whose output can be worked out by hand."""

import math
from typing import Any

import pytest
import torch
from analytic import Analytic
from torch import Tensor
from torch.testing import assert_close

from dfengine.diffusion.denoiser import Condition
from dfengine.diffusion.guidance import TARGETS, GuidedDenoiser
from dfengine.diffusion.path import NoiseSchedule

EXACT = {"rtol": 1e-6, "atol": 1e-6}


def network(**config: Any) -> Analytic:
    """A network that predicts x plus the number in the prompt."""
    denoiser = Analytic(lambda x, number: x + number[:, None, None, None], shape=(2, 3, 5))
    denoiser.schedule = NoiseSchedule.from_config({"clip_sample": False} | config)
    return denoiser


def guided(denoiser: Analytic, target: str, scale: tuple[float, ...] = (1.0, 2.0, 5.0)) -> GuidedDenoiser:
    """A guided denoiser with the prompts 10, 20, 30 and the negative prompts 1, 2, 3."""
    prompts, negatives = denoiser.encode_prompts(["10", "20", "30"]), denoiser.encode_prompts(["1", "2", "3"])
    return GuidedDenoiser(denoiser, prompts, negatives, target, scale)


def latents(count: int) -> Tensor:
    return torch.randn(count, 2, 3, 5, generator=torch.Generator().manual_seed(1))


ROWS = torch.tensor([2, 0, 2, 1])
T = torch.tensor([900, 500, 20, 0])


@pytest.mark.parametrize(
    ("target", "added", "batches"),
    [
        ("conditional", [30.0, 10.0, 30.0, 20.0], [4]),
        ("unconditional", [3.0, 1.0, 3.0, 2.0], [4]),
        # u + s (c − u) with s = 5, 1, 5, 2
        ("guided", [138.0, 10.0, 138.0, 38.0], [8]),
    ],
)
def test_each_latent_is_explained_under_the_prompt_of_its_row(
    target: str, added: list[float], batches: list[int]
) -> None:
    denoiser, x = network(), latents(4)
    epsilon = guided(denoiser, target)(x, T, ROWS).epsilon
    assert_close(epsilon, x + torch.tensor(added)[:, None, None, None], **EXACT | {"atol": 2e-5})
    assert denoiser.batches == batches


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0])
def test_a_scale_of_one_or_less_is_the_prompt_alone_in_one_forward(scale: float) -> None:
    denoiser, x = network(prediction_type="v_prediction"), latents(4)
    ours, other = guided(denoiser, "guided", (scale,) * 3)(x, T, ROWS), guided(denoiser, "conditional")(x, T, ROWS)
    assert_close(ours, other, rtol=0, atol=0)
    assert denoiser.batches == [4, 4]


def test_scales_of_both_kinds_may_share_a_batch() -> None:
    denoiser, x = network(), latents(3)
    rows = torch.tensor([0, 1, 2])
    ours = guided(denoiser, "guided", (0.5, 5.0, -1.0))(x, T[:3], rows).epsilon
    conditional, unconditional = (guided(denoiser, target)(x, T[:3], rows).epsilon for target in TARGETS[::2])
    assert_close(ours[[0, 2]], conditional[[0, 2]], rtol=0, atol=0)
    assert_close(ours[1], unconditional[1] + 5 * (conditional[1] - unconditional[1]), rtol=0, atol=2e-5)


def test_a_guided_forward_has_at_most_the_batch_size() -> None:
    """Two forwards if both halves together exceed the batch size, with the same prediction."""
    denoiser, x = network(), latents(4)
    together = guided(denoiser, "guided")(x, T, ROWS).epsilon
    denoiser.batch_size = 7
    apart = guided(denoiser, "guided")(x, T, ROWS).epsilon
    shared = guided(denoiser, "guided")(x, T, 2).epsilon
    assert denoiser.batches == [8, 4, 4, 4, 4]
    assert_close(apart, together, **EXACT)
    assert_close(shared[::2], together[::2], **EXACT)


def test_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="'both' is not known: expected one of conditional, guided, unconditional"):
        guided(network(), "both")


@pytest.mark.parametrize("target", ["conditional", "unconditional", "guided"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predictions_are_converted_with_the_input_of_the_network(prediction_type: str, target: str) -> None:
    """For a masked latent R ⊙ M: ε and x0 by the definitions of the parametrisations, one pixel at a time."""
    denoiser = network(prediction_type=prediction_type)
    masked = latents(4) * (latents(4).flip(0)[:, :1] > 0)
    assert (masked == 0).any()
    x0, epsilon = guided(denoiser, target)(masked, T, ROWS)
    added = {
        "conditional": [30.0, 10.0, 30.0, 20.0],
        "unconditional": [3.0, 1.0, 3.0, 2.0],
        "guided": [138.0, 10.0, 138.0, 38.0],
    }[target]
    for i in range(4):
        a = math.sqrt(denoiser.schedule.alpha_bar[T[i]])
        s = math.sqrt(1 - denoiser.schedule.alpha_bar[T[i]])
        x = masked[i, 1, 2, 3].item()
        out = x + added[i]
        if prediction_type == "epsilon":
            want_x0, want_epsilon = (x - s * out) / a, out
        elif prediction_type == "v_prediction":
            # v = a ε − s x0 and x = a x0 + s ε
            want_x0, want_epsilon = a * x - s * out, s * x + a * out
        else:
            want_x0, want_epsilon = out, (x - a * out) / s
        assert x0[i, 1, 2, 3].item() == pytest.approx(want_x0, rel=1e-4, abs=1e-4)
        # At t = 0, s = 0.01: float32 keeps 1 − ᾱ = 1e-4 to 6e-4 of itself.
        assert epsilon[i, 1, 2, 3].item() == pytest.approx(want_epsilon, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("prediction_type", "sign"), [("v_prediction", -1), ("sample", 1)])
def test_without_signal_x0_and_epsilon_come_straight_from_the_prediction(prediction_type: str, sign: int) -> None:
    """If ᾱ = 0, the latent is ε and x0 is ∓ the network's output; computing x0 from ε would give 0/0."""
    denoiser = network(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    x, last = latents(3), torch.tensor([999, 999, 999])
    x0, epsilon = guided(denoiser, "conditional")(x, last, torch.arange(3))
    output = x + torch.tensor([10.0, 20.0, 30.0])[:, None, None, None]
    assert_close(x0, sign * output, **EXACT)
    assert_close(epsilon, x, **EXACT)


def test_calling_a_denoiser_returns_epsilon() -> None:
    denoiser, x = network(prediction_type="v_prediction"), latents(4)
    condition = denoiser.encode_prompts(["1", "2", "3", "4"])
    assert_close(
        denoiser(x, T, condition),
        denoiser.schedule.to_x0_and_eps(denoiser.predict(x, T, condition), x, T).epsilon,
        rtol=0,
        atol=0,
    )


def test_half_precision_outputs_are_converted_in_float32() -> None:
    schedule = NoiseSchedule.from_config({})
    prediction = schedule.to_x0_and_eps(latents(4).half(), latents(4).half(), T)
    assert prediction.x0.dtype == prediction.epsilon.dtype == torch.float32


def test_conditions_are_indexed_and_concatenated_by_row() -> None:
    first, second = (Condition({"text": torch.arange(n, n + 3)[:, None], "pooled": torch.ones(3)}) for n in (0, 10))
    both = Condition.cat([first[torch.tensor([2, 0])], second[1:]])
    assert len(both) == 4
    assert both.tensors["text"].flatten().tolist() == [2, 0, 11, 12]
    assert both.tensors["pooled"].shape == (4,)
