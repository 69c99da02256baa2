"""The description of a sweep: every form that a file may use, the message for every mistake, and the digest."""

import dataclasses
import inspect
import json

import pytest

from dfengine import Attention, Cam, Counterfactual, Engine, Lime, Random, Relevance, Rise
from dfengine.explain import XDiffusionCam, XDiffusionLime, XDiffusionRise
from dfengine.sweep.spec import ModelSpec, Schedule, SharedSettings, Sweep, read

EVERY_KEY = """
prompts:
  - a red circle
  - a blue square, and “this”
seeds: [7, 3]
num_steps: 20
gamma: 50
guidance: 2.5
schedules:
  - uniform
  - early
  - {sampling: latter, num_steps: 10, gamma: 8, guidance: 1}
  - [900, 500, 100]
models:
  - shapes
  - {model: other/one, dtype: float16, variant: fp16, revision: main, random_weights: true, image_size: [64, 32]}
explainers:
  - rise
  - random
  - rise: {num_masks: 8, name: few}
negative_prompt: blurry
preset: paper
previews: true
compression: none
mantissa_bits: 10
unit_minutes: 2.5
"""


@pytest.fixture
def read_lines(tmp_path):
    """Reads a file of these lines, with prompts and explainers added where they are missing."""

    def read_file(text):
        required = {"prompts": "prompts: a cat", "explainers": "explainers: random"}
        added = [line for key, line in required.items() if f"{key}:" not in text]
        (tmp_path / "sweep.yaml").write_text("\n".join([*added, text]), encoding="utf-8")
        return read(tmp_path / "sweep.yaml")

    return read_file


def make_sweep(**keys):
    return Sweep(**{"prompts": "a cat", "explainers": Random()} | keys)


def test_every_key(read_lines):
    sweep = read_lines(EVERY_KEY)
    assert sweep.prompts == ("a red circle", "a blue square, and “this”")
    assert sweep.seeds == (7, 3)
    assert sweep.schedules == (
        Schedule(sampling="uniform", num_steps=20, gamma=0, guidance=2.5),
        Schedule(sampling="early", num_steps=20, gamma=50, guidance=2.5),
        Schedule(sampling="latter", num_steps=10, gamma=8, guidance=1),
        Schedule(sampling=(900, 500, 100), num_steps=3, gamma=0, guidance=2.5),
    )
    other = {"dtype": "float16", "variant": "fp16", "revision": "main", "random_weights": True, "image_size": (64, 32)}
    assert sweep.models == (ModelSpec(model="shapes"), ModelSpec(model="other/one", **other))
    assert sweep.explainers == (Rise.paper(), Random(), Rise.paper(num_masks=8, name="few"))
    assert (sweep.negative_prompt, sweep.preset, sweep.previews) == ("blurry", "paper", True)
    assert (sweep.compression, sweep.mantissa_bits, sweep.unit_minutes) == ("none", 10, 2.5)


def test_only_prompts_and_explainers_are_required(read_lines):
    sweep = read_lines("prompts: a cat\nexplainers: rise")
    assert (sweep.prompts, sweep.seeds, sweep.explainers) == (("a cat",), (0,), (Rise(),))
    assert [one.model_dump() for one in sweep.schedules] == [
        {"sampling": "uniform", "num_steps": 30, "gamma": 0.0, "guidance": None}
    ]
    assert [one.model_dump() for one in sweep.models] == [
        {"model": "shapes", "dtype": None, "variant": None, "revision": None}
        | {"random_weights": False, "image_size": None}
    ]
    assert (sweep.negative_prompt, sweep.preset, sweep.previews) == ("", "default", False)
    assert (sweep.compression, sweep.mantissa_bits, sweep.unit_minutes) == ("gzip", 23, 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompts: a cat", ("a cat",)),
        ("prompts: [a cat, a dog]", ("a cat", "a dog")),
        ("prompts: {file: prompts.txt}", ("one", "two", "three")),
        ("prompts: {file: prompts.txt, limit: 2}", ("one", "two")),
        ("prompts: {file: prompts.txt, limit: 9}", ("one", "two", "three")),
        ("prompts: {file: sub/table.csv}", ("a cat on a mat",)),
        ("seeds: 3", (0, 1, 2)),
        ("seeds: 1", (0,)),
        ("seeds: [5]", (5,)),
        ("seeds: [5, 0, 2]", (5, 0, 2)),
        ("seeds: {first: 40, count: 3}", (40, 41, 42)),
        ("seeds: {count: 2}", (0, 1)),
        ("seeds: {first: 40}", (40,)),
        (f"seeds: [{2**63 - 1}]", (2**63 - 1,)),
        ("schedules: early", (Schedule(sampling="early"),)),
        ("schedules: {sampling: early}", (Schedule(sampling="early", num_steps=30, gamma=60),)),
        ("schedules: {num_steps: 7}", (Schedule(sampling="uniform", num_steps=7),)),
        ("schedules: {steps: 7}", (Schedule(sampling="uniform", num_steps=7),)),
        ("schedules: [early, {sampling: latter}]", (Schedule(sampling="early"), Schedule(sampling="latter"))),
        ("schedules: [[9, 4]]", (Schedule(sampling=(9, 4), num_steps=2),)),
        ("schedules: {sampling: [9, 4]}", (Schedule(sampling=(9, 4), num_steps=2),)),
        ("schedules: [9.5, 4]", (Schedule(sampling=(9.5, 4), num_steps=2),)),
        ("schedules: [[9], [9, 4]]", (Schedule(sampling=(9,), num_steps=1), Schedule(sampling=(9, 4), num_steps=2))),
        ("models: a/b", (ModelSpec(model="a/b"),)),
        ("models: {model: a/b, dtype: bfloat16}", (ModelSpec(model="a/b", dtype="bfloat16"),)),
        ("models: [a/b, {model: c}]", (ModelSpec(model="a/b"), ModelSpec(model="c"))),
        ("explainers: rise", (Rise(),)),
        ("explainers: {rise: {num_masks: 5}}", (Rise(5),)),
        ("explainers: [{rise: }, cam]", (Rise(), Cam())),
        ("explainers: [relevance, attention, lime, random]", (Relevance(), Attention(), Lime(), Random())),
        ("explainers: [{cam: {layers: [up*, mid*]}}]", (Cam(layers=("up*", "mid*")),)),
        ("explainers: [{cam: {layers: mid*}}]", (Cam(layers=("mid*",)),)),
        ("explainers: [{attention: {words: cat}}]", (Attention(words=("cat",)),)),
        ("explainers: [{attention: {words: [cat]}}]", (Attention(words=("cat",)),)),
        (
            "explainers: [{counterfactual: {edit: replace, replace: {cat: [dog, cow], a: the}}}]",
            (Counterfactual(edit="replace", replace={"cat": ("dog", "cow"), "a": ("the",)}),),
        ),
        (
            "explainers: [xdiffusion-rise, xdiffusion-cam, xdiffusion-lime]",
            (XDiffusionRise(), XDiffusionCam(), XDiffusionLime()),
        ),
    ],
)
def test_every_form_of_a_value(read_lines, tmp_path, text, expected):
    (tmp_path / "sub").mkdir()
    (tmp_path / "prompts.txt").write_text("one\ntwo\n# no prompt\nthree\n")
    (tmp_path / "sub/table.csv").write_text("prompt\na cat on a mat\n")
    assert getattr(read_lines(text), text.partition(":")[0]) == expected


def test_a_file_of_prompts_is_relative_to_the_sweep(tmp_path, monkeypatch):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps/prompts.txt").write_text("beside it\n")
    (tmp_path / "prompts.txt").write_text("here\n")
    sweep = tmp_path / "sweeps/sweep.yaml"
    monkeypatch.chdir(tmp_path)
    sweep.write_text("{prompts: {file: prompts.txt}, explainers: rise}")
    assert read("sweeps/sweep.yaml").prompts == ("beside it",)
    sweep.write_text(f"{{prompts: {{file: {tmp_path / 'prompts.txt'}}}, explainers: rise}}")
    assert read(sweep).prompts == ("here",), "an absolute path"
    assert make_sweep(prompts={"file": "prompts.txt"}).prompts == ("here",)


def test_settings_of_the_top_level_are_defaults_of_the_schedules():
    sweep = make_sweep(
        num_steps=5,
        gamma=7,
        guidance=2,
        schedules=["early", {"sampling": "latter", "num_steps": 6, "gamma": 8, "guidance": 3}],
    )
    assert sweep.schedules == (
        Schedule(sampling="early", num_steps=5, gamma=7, guidance=2),
        Schedule(sampling="latter", num_steps=6, gamma=8, guidance=3),
    )
    assert make_sweep(num_steps=5).schedules == make_sweep(steps=5).schedules == (Schedule(num_steps=5),)
    short = make_sweep(steps=5, schedules=["early", {"sampling": "early", "steps": 6}])
    assert [schedule.num_steps for schedule in short.schedules] == [5, 6]
    assert make_sweep(gamma=5, schedules="latter").schedules == (Schedule(sampling="latter", gamma=5),)
    assert make_sweep(guidance=0, schedules={"num_steps": 4}).schedules == (Schedule(num_steps=4, guidance=0),)
    assert make_sweep(guidance=2, schedules={"guidance": None}).schedules == (Schedule(),), (
        "an explicit null is the model's own"
    )


@pytest.mark.parametrize("sampling", ["uniform", (9, 4)])
def test_gamma_is_0_if_it_is_not_used(sampling):
    """So that equal schedules are equal."""
    assert Schedule(sampling=sampling, gamma=3) == Schedule(sampling=sampling)
    assert Schedule(sampling=sampling).gamma == 0
    assert [Schedule(sampling=stage).gamma for stage in ("early", "latter")] == [60, 60]


@pytest.mark.parametrize("steps", [{}, {"num_steps": 30}, {"num_steps": 2}])
def test_a_list_of_time_steps_determines_their_number(steps):
    assert Schedule(sampling=[9, 4, 2], **steps).num_steps == 3
    assert make_sweep(schedules=[[9, 4, 2]], **steps).schedules == (Schedule(sampling=(9, 4, 2)),)
    assert make_sweep(schedules={"sampling": [9, 4, 2]}, **steps).schedules[0].num_steps == 3


def test_values_may_be_objects_in_python():
    schedules, models = (Schedule(sampling="early"), Schedule(num_steps=3)), (ModelSpec(model="a/b"),)
    explainers = (Rise(4), Cam(layers=("up*",)))
    sweep = make_sweep(prompts=("a", "b"), seeds=range(2), schedules=schedules, models=models, explainers=explainers)
    assert (sweep.prompts, sweep.seeds) == (("a", "b"), (0, 1))
    assert (sweep.schedules, sweep.models, sweep.explainers) == (schedules, models, explainers)
    assert make_sweep(schedules=schedules[0], models=models[0], explainers=explainers[0]).schedules == schedules[:1]
    assert make_sweep(explainers=[Rise(4), "cam", {"lime": {"num_samples": 9}}]).explainers == (Rise(4), Cam(), Lime(9))


def test_duplicates_are_removed_in_order(read_lines):
    sweep = read_lines("""
prompts: [b, a, b]
seeds: [2, 1, 2, 1]
num_steps: 4
schedules: [uniform, early, {sampling: uniform, gamma: 9}, {num_steps: 4}, [9, 4], {sampling: [9, 4], num_steps: 7}]
models: [m, shapes, {model: m}]
""")
    assert (sweep.prompts, sweep.seeds) == (("b", "a"), (2, 1))
    assert [one.sampling for one in sweep.schedules] == ["uniform", "early", (9, 4)]
    assert [one.model for one in sweep.models] == ["m", "shapes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Keys: the place, and the nearest that is known.
        ("prompt: a", "prompt is not known: did you mean 'prompts'?"),
        ("seed: 3", "seed is not known: did you mean 'seeds'?"),
        ("schedule: early", "schedule is not known: did you mean 'schedules'?"),
        ("model: a", "model is not known: did you mean 'models'?"),
        ("explainer: rise", "explainer is not known: did you mean 'explainers'?"),
        ("negativeprompt: a", "negativeprompt is not known: did you mean 'negative_prompt'?"),
        ("presets: paper", "presets is not known: did you mean 'preset'?"),
        ("preview: true", "preview is not known: did you mean 'previews'?"),
        ("compresion: none", "compresion is not known: did you mean 'compression'?"),
        ("mantisa_bits: 3", "mantisa_bits is not known: did you mean 'mantissa_bits'?"),
        ("unit_minute: 3", "unit_minute is not known: did you mean 'unit_minutes'?"),
        ("step: 3", "step is not known: did you mean 'num_steps'?"),
        ("gama: 3", "gama is not known: did you mean 'gamma'?"),
        ("guidence: 3", "guidence is not known: did you mean 'guidance'?"),
        ("schedules: {sampeling: early}", "schedules.0.sampeling is not known: did you mean 'sampling'?"),
        ("schedules: [early, {step: 3}]", "schedules.1.step is not known: did you mean 'num_steps'?"),
        ("schedules: {zzz: 3}", "schedules.0.zzz is not known: expected one of sampling, num_steps, gamma, guidance"),
        ("models: [a, {model: b, dtyp: float16}]", "models.1.dtyp is not known: did you mean 'dtype'?"),
        ("models: {imagesize: [3, 3]}", "models.0.imagesize is not known: did you mean 'image_size'?"),
        ("prompts: {fil: a.txt}", "prompts: 'fil' is not known: did you mean 'file'?"),
        ("prompts: {file: a.txt, limt: 3}", "prompts: 'limt' is not known: did you mean 'limit'?"),
        ("seeds: {frist: 3}", "seeds: 'frist' is not known: did you mean 'first'?"),
        ("seeds: {counts: 3}", "seeds: 'counts' is not known: did you mean 'count'?"),
        ("explainers: [{rise: {num_maks: 3}}]", "'num_maks' of rise is not known: did you mean 'num_masks'?"),
        # Names.
        ("explainers: [rise, cma]", "explainers.1: explainer 'cma' is not known: did you mean 'cam'?"),
        ("explainers: [{ris: {num_masks: 3}}]", "explainers.0: explainer 'ris' is not known: did you mean 'rise'?"),
        ("explainers: zzz", "explainers.0: explainer 'zzz' is not known: expected one of attention, cam, "),
        ("schedules: [uniform, erly]", "schedules.1.sampling: 'erly' is not known: did you mean 'early'?"),
        ("schedules: zzz", "'zzz' is not known: expected one of uniform, early, latter; or give a list of time-steps"),
        # Values.
        ("prompts: []", "prompts: "),
        ("prompts: [a, 3]", "prompts.1: "),
        ('prompts: [a, " "]', "prompts: a prompt is empty: say what the image should show"),
        ("prompts:", "prompts.0: "),
        ("prompts: {limit: 3}", "prompts: expected a list of prompts, or {file: prompts.txt, limit: 100}"),
        ("prompts: {file: none.txt}", "none.txt' cannot be read: No such file"),
        ("prompts: {file: none.xml}", "is not a file of prompts: expected .txt, .csv, .jsonl, .json"),
        ("prompts: {file: prompts.txt, limit: 0}", "prompts: limit is 0: expected at least 1 prompt"),
        ("seeds: 0", "seeds: 0 seeds are not possible: expected at least 1"),
        ("seeds: {count: 0}", "seeds: 0 seeds are not possible: expected at least 1"),
        ("seeds: -2", "seeds: -2 seeds are not possible: expected at least 1"),
        ("seeds: [3, -1]", "seeds.1: "),
        (f"seeds: [{2**63}]", "seeds.0: "),
        ("seeds: [1.5]", "seeds.0: "),
        ("seeds: {first: x}", "seeds: "),
        ("seeds: three", "seeds: "),
        (f"seeds: {10**12}", "seeds: 1000000000000 seeds are not possible: expected at most 1,000,000"),
        (f"seeds: {{first: 5, count: {10**12}}}", "seeds: 1000000000000 seeds are not possible"),
        ("seeds: [true]", "seeds.0: Input should be a valid integer"),
        ('seeds: ["5"]', "seeds.0: Input should be a valid integer"),
        ("seeds: [5.0]", "seeds.0: Input should be a valid integer"),
        ("num_steps: true", "schedules.0.num_steps: Input should be a valid integer"),
        ("guidance: true", "schedules.0.guidance: Input should be a valid number"),
        ('guidance: "7"', "schedules.0.guidance: Input should be a valid number"),
        ("models: {image_size: [true, 64]}", "models.0.image_size.0: Input should be a valid integer"),
        ("models: {image_size: [0, 64]}", "models.0.image_size.0: Input should be greater than or equal to 1"),
        ('previews: "yes"', "previews: Input should be a valid boolean"),
        ("mantissa_bits: true", "mantissa_bits: Input should be a valid integer"),
        ("unit_minutes: .inf", "unit_minutes: Input should be a finite number"),
        ('prompts: "a\\0b"', r"text 'a\x00b' is not possible: expected text without NUL characters"),
        ('negative_prompt: "a\\0b"', r"negative_prompt: text 'a\x00b' is not possible: expected text without NUL"),
        (
            "explainers: [{rise: {num_masks: true}}]",
            "explainers.0: rise.num_masks: True is not possible: Input should be a valid integer",
        ),
        ("explainers: [{rise: {sigma: .inf}}]", "explainers.0: rise.sigma: inf is not possible: expected a finite num"),
        ("explainers: [{rise: {sigma: .nan}}]", "explainers.0: rise.sigma: nan is not possible: expected a finite num"),
        ('explainers: [{rise: {name: ""}}]', "rise: name '' is not possible: expected text that can be printed"),
        ('explainers: [{rise: {name: "a\\0"}}]', "is not possible"),
        (
            "seeds: 1000000\nprompts: [a, b, c, d, e, f, g, h, i, j, k]",
            "11,000,000 items are not possible",
        ),
        ("steps: 0", "schedules.0.num_steps: "),
        ("schedules: [early, {num_steps: -1}]", "schedules.1.num_steps: "),
        ("schedules: []", "schedules: "),
        ("schedules: [[]]", "schedules.0.num_steps: "),
        ("steps: 3\nnum_steps: 3", "steps is another name of num_steps: give one of them"),
        ("schedules: {steps: 3, num_steps: 4}", "steps is another name of num_steps: give one of them"),
        ("schedules: [early, 5]", "schedules.1.sampling: 5 is not known: expected one of uniform, early, latter"),
        ("schedules: [[9, .inf]]", "schedules.0.sampling: [9, inf] is not known"),
        ("schedules: {sampling: [true]}", "schedules.0.sampling: [True] is not known"),
        ("schedules: {sampling: early, gamma: x}", "schedules.0.gamma: "),
        ("schedules: {guidance: x}", "schedules.0.guidance: "),
        ("schedules: {guidance: .nan}", "schedules.0.guidance: Input should be a finite number"),
        ("gamma: .inf\nschedules: early", "schedules.0.gamma: Input should be a finite number"),
        ("seeds: []", "seeds: "),
        ("seeds: true", "seeds: True is not valid: expected a number, a list, or {first: 100, count: 8}"),
        ("seeds: {count: null}", "seeds: {'count': None} is not valid"),
        ("seeds: {first: [1]}", "seeds: {'first': [1]} is not valid"),
        ("seeds: {count: 2.7}", "seeds: {'count': 2.7} is not valid"),
        ("prompts: {file: 3}", "prompts: expected a list of prompts, or {file: prompts.txt, limit: 100}"),
        ("prompts: {file: p.txt, limit: x}", "prompts: expected a list of prompts, or {file: prompts.txt, limit: 100}"),
        ("prompts: {file: p.txt, limit: 2.5}", "prompts: expected a list of prompts"),
        ('prompts: "half \\ud83d a letter"', "is not possible: expected text without lone surrogates"),
        ("unit-minutes: 3", "unit-minutes is not known: did you mean 'unit_minutes'?"),
        ("schedules: {guidance-scale: 3}", "schedules.0.guidance-scale is not known: did you mean 'guidance'?"),
        (
            "explainers: [rise, {cam: {loss_scale: x}}]",
            "explainers.1: cam.loss_scale: 'x' is not possible: Input should be a valid number",
        ),
        (
            "explainers: [{rise: {similarity: 3}}]",
            "explainers.0: rise.similarity: 3 is not possible: Input should be a valid string",
        ),
        ("models: []", "models: "),
        ("models: [a, 3]", "models.1: "),
        ("models: {dtype: float8}", "models.0.dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
        ("models: {image_size: 64}", "models.0.image_size: "),
        ("models: {random_weights: perhaps}", "models.0.random_weights: "),
        ("explainers: []", "explainers: "),
        ("explainers: [3]", "explainers.0: 3 is not an explainer: expected a name or {name: settings}"),
        (
            "explainers: [{rise: {}, cam: {}}]",
            "explainers.0: {'rise': {}, 'cam': {}} is not an explainer: expected a name",
        ),
        ("explainers: [{rise: 5}]", "explainers.0: 5 is not valid: expected settings of rise as {name: value}"),
        ("explainers: [{rise: {num_masks: x}}]", "explainers.0: rise.num_masks: 'x' is not possible: Input should be"),
        ("explainers: [{rise: {num_masks: 0}}]", "explainers.0: rise: 0 masks are not possible: expected at least 1"),
        ("explainers: [{lime: {num_samples: 1}}]", "1 samples are not possible: expected at least 2"),
        ("explainers: [rise, rise]", "explainers share a name (rise, rise): give each its own, as in - rise: {name: "),
        ("explainers: [cam, {rise: {name: cam}}]", "explainers share a name (cam, cam)"),
        ("negative_prompt: [a]", "negative_prompt: "),
        ("preset: released", "preset: preset 'released' is not known: expected one of default, paper, xdiffusion"),
        ("preset: papr", "preset: preset 'papr' is not known: did you mean 'paper'?"),
        ("explainers: [{rise: {preset: papr}}]", "explainers.0: preset 'papr' of rise is not known: did you mean 'pa"),
        # Former names of version 0.1.
        ("behaviour: xdiffusion", "behaviour has been replaced by presets: write preset: xdiffusion instead"),
        ("explainers: Rise", "explainers.0: explainer 'Rise' is now spelled 'rise'"),
        ("explainers: [ReleasedRise]", "explainers.0: explainer 'ReleasedRise' is now spelled 'xdiffusion-rise'"),
        ("explainers: [cam, {releasedcam: {}}]", "explainers.1: explainer 'releasedcam' is now spelled 'xdiffusion-c"),
        ("explainers: XDiffusionLime", "explainers.0: explainer 'XDiffusionLime' is now spelled 'xdiffusion-lime'"),
        ("explainers: [{rise: {masks: rise}}]", "explainers.0: 'masks' of rise is now called 'mask_kind'"),
        ("explainers: [{rise: {masks: 100}}]", "explainers.0: 'masks' of rise is not known: their number is called 'n"),
        ("explainers: [grad-cam]", "explainers.0: explainer 'grad-cam' is not known: did you mean 'cam'?"),
        ("explainers: [{cam: {scale: 2}}]", "explainers.0: 'scale' of cam is now called 'loss_scale'"),
        ("previews: perhaps", "previews: "),
        ("compression: zip", "compression: Input should be 'gzip' or 'none'"),
        ("mantissa_bits: 24", "mantissa_bits: "),
        ("mantissa_bits: 0", "mantissa_bits: "),
        ("unit_minutes: 0", "unit_minutes: "),
        ("unit_minutes: .nan", "unit_minutes: "),
        ("{preset: xdiffusion, prompts: a, explainers: [{rise: {grid: 4}}]}", "explainers.0: rise: "),
        ("{preset: xdiffusion, prompts: a, explainers: [{rise: {similarity: ssim}}]}", "similarity 'ssim' is not"),
        ("preset: xdiffusion\ngamma: 0\nschedules: early", "schedule 'early' has gamma 0, which in the released code "),
    ],
)
def test_errors_are_one_line_with_their_position(read_lines, tmp_path, text, message):
    (tmp_path / "prompts.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"sweep\.yaml") as refused:
        read_lines(text)
    line = str(refused.value)
    assert line.startswith(f"{tmp_path / 'sweep.yaml'}: ")
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: a", "explainers is missing"),
        ("explainers: rise", "prompts is missing"),
        ("seeds: 3", "prompts is missing; explainers is missing"),
        ("prompts: a\nexplainers: [{rise: {num_masks: x}}]\nsteps: 0", "num_masks: "),
        ("prompts: a\nexplainers: rise\nsteps: 0\nfoo: 3\nmodels: {bar: 3}", "schedules.0.num_steps: "),
        ("prompts: a\nexplainers: rise\nsteps: 0\nfoo: 3\nmodels: {bar: 3}", "; models.0.bar is not known"),
        ("prompts: a\nexplainers: rise\nsteps: 0\nfoo: 3\nmodels: {bar: 3}", "; foo is not known: expected one of "),
        ("- prompts", "is not a sweep: expected keys, at least prompts and explainers"),
        ("", "is not a sweep"),
        ("prompts: [a\nexplainers: rise", "is not YAML: while parsing a flow sequence"),
        (b"prompts: \xff", "is not YAML: "),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_not_a_sweep_is_a_one_line_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "sweep.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"sweep\.yaml") as refused:
        read(tmp_path / "sweep.yaml")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: a\nexplainers: rise\nprompts: b", "is not YAML: prompts is given twice in .*, line 3, column 1"),
        ("{prompts: a, explainers: [{rise: {num_masks: 3, num_masks: 4}}]}", "is not YAML: num_masks is given twice"),
        ("[" * 5000, "is nested too deeply: expected prompts, explainers and other keys"),
        ("{a: " * 5000, "is nested too deeply"),
        ("prompts: &a [*a]", "its aliases stand for more than 10000000 values"),
        (
            "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))]),
            "its aliases stand for more than 10000000 values",
        ),
    ],
)
def test_a_file_that_yaml_would_accept_is_a_one_line_error(tmp_path, text, message):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        read(tmp_path / "sweep.yaml")
    assert "\n" not in str(refused.value)


def test_anchors_and_merged_keys_are_no_repetition(tmp_path):
    (tmp_path / "sweep.yaml").write_text("""
prompts: &words [a, b]
explainers: [{rise: &rise {num_masks: 5, sigma: 2}}, {rise: {<<: *rise, num_masks: 6, name: more}}]
""")
    sweep = read(tmp_path / "sweep.yaml")
    assert sweep.explainers == (Rise(5, sigma=2.0), Rise(6, sigma=2.0, name="more"))


def test_a_long_range_of_seeds_is_refused():
    for seeds in (range(10**12), range(0, 10**13, 7)):
        with pytest.raises(ValueError, match="seeds are not possible"):
            make_sweep(seeds=seeds)
    assert make_sweep(seeds=range(4, 10, 3)).seeds == (4, 7)


def test_functions_and_classes_of_this_process_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Mine(Random):
        """An explainer that no other process can import."""

    for explainer in (Rise(similarity=lambda a, b: a), Mine()):
        with pytest.raises(ValueError, match="contains code that worker processes do not have"):
            make_sweep(explainers=explainer)


def test_the_preset_applies_to_explainers_by_name_without_their_own(read_lines):
    explainers = "explainers: [{rise: {num_masks: 8}}, cam, {rise: {name: own, preset: default}}, {lime: }, random]"
    assert read_lines(f"preset: xdiffusion\n{explainers}").explainers == (
        Rise.xdiffusion(num_masks=8),
        Cam.xdiffusion(),
        Rise(name="own"),
        Lime.xdiffusion(),
        Random(),
    )
    assert read_lines("explainers: [rise, {rise: {preset: xdiffusion, num_masks: 5, name: x}}]").explainers == (
        Rise(),
        Rise.xdiffusion(num_masks=5, name="x"),
    )
    assert make_sweep(explainers=[Rise(8), "cam"], preset="xdiffusion").explainers == (Rise(8), Cam.xdiffusion())
    with pytest.raises(ValueError, match=r"explainers share a name \(rise, rise\)"):
        make_sweep(explainers=[Rise(8), "rise"], preset="xdiffusion")


def test_defaults_match_those_of_the_python_api():
    """Schedules have the defaults of `Engine.job`, explainers their own (above)."""
    defaults = {name: one.default for name, one in inspect.signature(Engine.job).parameters.items()}
    schedule = Schedule(sampling="early")
    assert (schedule.num_steps, schedule.gamma, schedule.guidance) == tuple(
        defaults[name] for name in ("num_steps", "gamma", "guidance")
    )
    assert Schedule().sampling == defaults["sampling"]
    explain = {name: one.default for name, one in inspect.signature(Engine.explain).parameters.items()}
    sweep = make_sweep()
    for name in ("negative_prompt", "compression", "mantissa_bits"):
        assert getattr(sweep, name) == explain[name]
    load = {name: one.default for name, one in inspect.signature(Engine.from_pretrained).parameters.items()}
    for name, value in ModelSpec().model_dump().items():
        assert value == load[name]


def test_gamma_0_is_a_schedule_of_other_presets():
    assert make_sweep(schedules="early", gamma=0).schedules == (Schedule(sampling="early", gamma=0),)
    assert make_sweep(schedules="uniform", preset="xdiffusion").schedules == (Schedule(),), "which has no gamma"


EXPLAINERS = (
    Rise(8, keep_probability=0.3, mask_kind="rise", score="global", similarity="frechet", stop_at_error=0.1, name="r"),
    Cam(layers=("up*", "mid*"), target="unconditional", loss_scale=2, name="c"),
    Relevance(self_attention=False, name="v"),
    Attention(words=("red", "blue square"), name="a"),
    Counterfactual(words=("red",), replace={"red": ("blue", "green")}, output="x0", name="w"),
    Lime(9, kernel_size=3, name="l"),
    Random(name="n"),
    XDiffusionRise(7, "cosine"),
    XDiffusionCam(3.0),
    XDiffusionLime(5),
)


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda one: type(one).__name__)
def test_explainers_survive_the_transfer_to_a_worker(explainer):
    sweep = make_sweep(explainers=explainer)
    assert json.loads(json.dumps(sweep.shared)) == sweep.shared
    (rebuilt,) = SharedSettings.from_json(json.loads(json.dumps(sweep.shared))).explainers
    assert (type(rebuilt), rebuilt) == (type(explainer), explainer)


def test_shared_settings_survive_the_transfer_to_a_worker():
    values = {"negative_prompt": "ugly “x”", "previews": True, "compression": "none", "mantissa_bits": 11}
    sweep = make_sweep(explainers=EXPLAINERS, prompts=["p", "q"], seeds=2, unit_minutes=3, **values)
    assert (
        dataclasses.asdict(SharedSettings.from_json(sweep.shared))
        == {
            "explainers": tuple(map(dataclasses.asdict, EXPLAINERS)),
        }
        | values
    )
    assert set(sweep.shared) == {*values, "explainers"}


BASE = {
    "prompts": ["a cat", "a dog"],
    "seeds": [0, 1],
    "schedules": ["uniform", {"sampling": "early"}],
    "models": ["shapes"],
    "explainers": [Rise(8), Cam()],
}


#: Each of these changes the sweep.
CHANGES = [
    {"prompts": ["a cat"]},
    {"prompts": ["a cat", "a dog", "a cow"]},
    {"prompts": ["a cat", "a Dog"]},
    {"prompts": ["a dog", "a cat"]},
    {"seeds": [0]},
    {"seeds": [0, 2]},
    {"schedules": ["uniform"]},
    {"schedules": ["uniform", "latter"]},
    {"schedules": [[9, 4], "early"]},
    {"schedules": [[9, 5], "early"]},
    {"num_steps": 31},
    {"gamma": 61},
    {"guidance": 7},
    {"models": ["other"]},
    {"models": [{"model": "shapes", "dtype": "float16"}]},
    {"models": [{"model": "shapes", "variant": "fp16"}]},
    {"models": [{"model": "shapes", "revision": "main"}]},
    {"models": [{"model": "shapes", "random_weights": True}]},
    {"models": [{"model": "shapes", "image_size": (64, 64)}]},
    {"models": [{"model": "shapes", "image_size": (64, 32)}]},
    {"explainers": [Rise(8)]},
    {"explainers": [Rise(9), Cam()]},
    {"explainers": [Cam(), Rise(8)]},
    {"explainers": [Rise(8), Cam(layers=("up*",))]},
    {"explainers": [Rise(8), Lime(name="cam")]},
    {"negative_prompt": "blurry"},
    {"explainers": ["rise", "cam"]},
    {"explainers": ["rise", "cam"], "preset": "xdiffusion"},
    {"previews": True},
    {"compression": "none"},
    {"mantissa_bits": 10},
]


@pytest.mark.parametrize("changed", CHANGES)
def test_any_change_changes_the_digest(changed):
    assert Sweep(**BASE | changed).digest != Sweep(**BASE).digest


def test_no_two_changes_have_the_same_digest():
    digests = {Sweep(**BASE | changed).digest for changed in CHANGES}
    assert len(digests) == len(CHANGES)
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)


@pytest.mark.parametrize(
    "same",
    [
        {"unit_minutes": 1},
        {"prompts": ("a cat", "a dog", "a cat")},
        {"seeds": 2},
        {"seeds": {"count": 2}},
        {"schedules": [{"num_steps": 30}, Schedule(sampling="early")]},
        {"schedules": [{"gamma": 5}, {"sampling": "early", "gamma": 60}]},
        {"num_steps": 30, "gamma": 60},
        {"models": ModelSpec(model="shapes", random_weights=False)},
        {"explainers": [{"rise": {"num_masks": 8}}, "cam"]},
        {"negative_prompt": ""},
        {"mantissa_bits": 23},
        {"preset": "paper"},
    ],
)
def test_equal_sweeps_have_equal_digests(same):
    assert Sweep(**BASE | same).digest == Sweep(**BASE).digest


def test_a_sweep_is_immutable():
    sweep = make_sweep()
    for one, name in ((sweep, "prompts"), (sweep.schedules[0], "num_steps"), (sweep.models[0], "model")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(one, name, "x")
    assert {sweep.schedules: 1, sweep.models: 2} == {(Schedule(),): 1, (ModelSpec(),): 2}, "they are keys"


def test_bare_numbers_are_the_time_steps_of_one_schedule(read_lines):
    sweep = read_lines("prompts: a cat\nexplainers: rise\nschedules: [901, 401, 1]\nguidance: 3")
    assert sweep.schedules == (Schedule(sampling=(901, 401, 1), num_steps=3, gamma=0, guidance=3),)


def test_schedule_objects_are_kept():
    both = make_sweep(schedules=[Schedule(sampling="early"), "early"], num_steps=5, gamma=7)
    assert both.schedules == (Schedule(sampling="early"), Schedule(sampling="early", num_steps=5, gamma=7))
