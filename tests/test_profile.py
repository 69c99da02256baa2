"""The profile: its counts by independent means, its prediction, and the command."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from analytic import Analytic
from commands import dfengine_command
from torch import nn

from dfengine import Engine, Rise
from dfengine.profile import Profile, format_profile, profile
from dfengine.profile.clock import Clock, copy_bandwidth, matmul_ceiling
from dfengine.profile.measure import _padded, suggestions
from dfengine.profile.operations import KINDS, flops_by_kind, kind_of, time_by_kind

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("shapes", device="cpu", batch_size=16)


@pytest.fixture(scope="module")
def measured(engine: Engine) -> Profile:
    return profile(engine, Rise(64), engine.job("a red circle", num_steps=5), images=3, seconds=0.2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::cudnn_convolution", "convolution"),
        ("mkldnn::_convolution_pointwise", "convolution"),
        ("triton_tem_fused_convolution_silu_4", "convolution"),
        ("aten::addmm", "linear"),
        ("aten::bmm", "attention"),
        ("aten::_softmax", "attention"),
        ("mkl::_mkl_linear", "linear"),
        ("triton_tem_fused_addmm_2", "linear"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_cudnn_attention_forward", "attention"),
        ("xformers::efficient_attention_forward_cutlass", "attention"),
        # A fused kernel is named after the convolution whose bias it adds.
        ("triton_poi_fused_convolution_native_group_norm_7", "other"),
        ("cpp_fused_convolution_silu_3", "other"),
        ("aten::native_group_norm", "other"),
        ("aten::copy_", "other"),
    ],
)
def test_kinds_of_operations(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_flops_match_a_count_by_hand() -> None:
    convolution, linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 16)
    x = torch.randn(2, 3, 6, 5)

    def forward() -> object:
        tokens = linear(convolution(x).flatten(2).transpose(1, 2)).unflatten(2, (4, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    with torch.no_grad():
        counted = flops_by_kind(forward)
    pixels = 2 * 6 * 5
    assert counted == {
        "convolution": 2 * pixels * 3 * 9 * 8,
        "linear": 2 * pixels * 8 * 16,
        "attention": 2 * (2 * 2 * 4 * 30 * 30 * 4),
        "other": 0,
    }


def test_time_by_kind_sums_to_one() -> None:
    a = torch.randn(400, 400)
    shares = time_by_kind(lambda: [a @ a for _ in range(20)], CPU)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["linear"] > 0.8


def test_a_clock_repeats_short_work_and_not_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        calls.append(seconds)
        now[0] += seconds

    clock = Clock(CPU, seconds=1.0, max_repeats=5)
    for seconds, repeats in ((0.01, 5), (0.3, 4), (1.5, 3)):
        assert len(clock.times(lambda seconds=seconds: work(seconds))) == repeats
    calls.clear()
    assert clock.times(lambda: work(3.0)) == [3.0]
    assert calls == [3.0]


@pytest.mark.slow
def test_ceilings_are_plausible() -> None:
    clock = Clock(CPU, seconds=0.1)
    assert 1e8 < matmul_ceiling(clock, torch.float32) < 1e15
    assert 1e8 < copy_bandwidth(clock) < 1e13


@pytest.mark.slow
def test_ceilings_divide_operations_and_bytes_by_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    medians = iter([0.5, 2.0, 0.25])
    monkeypatch.setattr(Clock, "median", lambda self, work: next(medians))
    assert matmul_ceiling(Clock(CPU), torch.float32) == 2 * 2048**3 / 2.0
    assert copy_bandwidth(Clock(CPU)) == 2 * 2**28 / 0.25


def test_median_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "times", lambda self, work: [1.0, 9.0, 2.0])
    assert Clock(CPU).median(lambda: None) == 2.0


@pytest.mark.parametrize(("total", "padded"), [(5, 5), (16, 16), (17, 32), (33, 48)])
def test_the_padded_tail_is_included(total: int, padded: int) -> None:
    assert _padded(total, 16) == padded


@pytest.mark.slow
def test_a_custom_denoiser_and_ridge_can_be_profiled() -> None:
    engine = Engine(Analytic(lambda x_t, _: torch.nn.functional.conv2d(x_t, torch.ones(2, 2, 1, 1)), batch_size=4))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* masks are few")
        measured = profile(engine, Rise(70, score="global"), engine.job("1", num_steps=2), seconds=0.01)
    assert measured.gflop_per_mask["convolution"] == 2 * 2 * 2 * 30 / 1e9
    assert measured.attention == "its own"


@pytest.mark.slow
def test_the_profile_is_consistent(measured: Profile) -> None:
    loop = 1 / measured.masks_per_second
    stages = measured.seconds_per_mask
    assert set(stages) == {"network", "masks", "scores", "maps", "rest", "file"}
    assert all(seconds >= 0 for seconds in stages.values())
    assert stages["network"] > 5 * (stages["masks"] + stages["scores"])
    assert measured.outside_network == pytest.approx(1 - stages["network"] / loop)
    assert 0 < measured.outside_network < 0.5
    assert stages["file"] > 0
    assert 0.1 < measured.peak_gib < 20
    rates = [point["masks_per_second"] for point in measured.curve]
    assert 0.4 < measured.masks_per_second / rates[-1] < 1.2
    assert rates[-1] > rates[0]
    assert {point["peak_gib"] for point in measured.curve} == {None}
    assert sum(measured.network_shares.values()) == pytest.approx(1)
    assert set(measured.network_shares) == set(KINDS) == set(measured.gflop_per_mask)
    assert measured.tflop_s == pytest.approx(sum(measured.gflop_per_mask.values()) * measured.masks_per_second / 1e3)
    assert measured.share_of_ceiling == pytest.approx(measured.tflop_s / measured.ceiling_tflop_s)
    assert [point["batch"] for point in measured.curve] == [1, 2, 4, 8, 16]
    assert (measured.batch_size, measured.compiled, measured.dtype, measured.attention) == (
        16,
        False,
        "float32",
        "sdpa",
    )
    # The embedded model's forward without the text's keys and values and 5/9 of the convolutions after upsampling.
    assert sum(measured.gflop_per_mask.values()) == pytest.approx(0.468 - 0.53e-3 * 100 * 5 / 9, abs=0.005)


@pytest.mark.slow
def test_the_prediction_covers_the_complete_job(measured: Profile) -> None:
    job = measured.job
    assert (job["images"], job["steps"], job["masks"], job["forwards"]) == (3, 5, 64, 3 * 5 * 65)
    masks_alone = 3 * 5 * 64 / measured.masks_per_second
    assert masks_alone < job["seconds"] < masks_alone + 3 * 5 * 2
    # Maps, errors, R_t and ε in float32, scores, and six pictures; then t, a, b and a marker per step, and six numbers.
    values = 3 * (5 * 4 * (2 * 256 + 2 * 4 * 256 + 64) + 6 * 3 * 64 * 64)
    assert job["bytes"] == values + 3 * (5 * (3 * 8 + 1) + 8 + 8 + 3 * 4 + 1)


@pytest.mark.soak
def test_guidance_costs_two_forwards_minus_the_shared_part(engine: Engine, measured: Profile) -> None:
    guided = profile(engine, Rise(64, target="guided"), engine.job("a red circle", num_steps=2), seconds=0.2)
    pixels, width = 256, 48
    # The first convolution, a resnet's two, the first attention's projections and its products.
    products = pixels * width * (4 * 9 + 2 * 9 * width + width + 4 * width + 2 * pixels)
    expected = 2 * sum(measured.gflop_per_mask.values()) - 2 * products / 1e9
    assert sum(guided.gflop_per_mask.values()) == pytest.approx(expected, rel=1e-4)
    assert guided.job["forwards"] == 2 * 2 * 65


@pytest.mark.slow
def test_the_table_is_complete(measured: Profile) -> None:
    text = "\n".join(format_profile(measured))
    assert text.startswith("shapes on ")
    assert "float32, batch size 16, not compiled, sdpa attention" in text
    assert "3 images × 5 steps × 64 masks: about " in text
    for word in ("masks per second", "outside the network", "scores and sums", "file (separate thread)", *KINDS):
        assert word in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_suggestions(engine: Engine) -> None:
    assert suggestions(engine) == ["the network is not compiled: --compile (the default for long jobs)"]
    hook = engine.denoiser.unet.mid_block.register_forward_hook(lambda *_: None)
    try:
        first, _ = suggestions(engine)
    finally:
        hook.remove()
    assert first == "the UNet falls back to diffusers' own forward: mid_block has a hook"


@pytest.mark.soak
def test_the_command_prints_json_and_writes_a_trace(tmp_path: Path) -> None:
    quick = ["--num-steps", "2", "--num-masks", "8", "--seconds", "0.1", "--batch-size", "8", "--no-compile"]
    run = dfengine_command("profile", *quick, "--device", "cpu", "--json", "--trace", str(tmp_path / "trace.json"))
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    printed = json.loads(run.stdout)
    assert set(printed) == {field.name for field in dataclasses.fields(Profile)}
    assert printed["job"]["forwards"] == 2 * 9
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = {event.get("name") for event in events}
    assert {"dfengine: masks", "dfengine: network", "dfengine: scores", "dfengine: maps"} <= named
