"""Which layers and heads know where the shapes are: DF-CAM's layers, attention's heads, and what all methods owe x.

    OMP_NUM_THREADS=1 python bench/inner_maps.py

DF-CAM's map of every layer is scored against the true area of both shapes; every head's attention to the noun of the
subject and of the object against the area of its own shape. Layers and heads are chosen on half of the captions, by
their mean AUROC over the steps, and scored on the others. Every method's map is also correlated (Spearman) with the
latent's own magnitude, which asks the network nothing. Captions are of a seed that no other measurement here uses.
Replaces bench/results/inner_maps.json.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import record
import torch
import torch.nn.functional as F
from numpy import ndarray
from rise_settings import BATCH, NUM_STEPS, STEPS, items
from scipy.stats import spearmanr
from torch import Tensor

from dfengine import Attention, Cam, Counterfactual, Engine, Relevance, Rise
from dfengine.diffusion.trajectory import Trajectory
from dfengine.evaluate.intervals import SHARES, mean_interval
from dfengine.evaluate.localisation import localisation_scores
from dfengine.evaluate.truth import Areas
from dfengine.shapes.world import Caption
from dfengine.tokens import concept_spans

SEED, CAPTIONS = 31_000, 48
#: The share of layers or heads that is chosen, besides the single best one.
CHOSEN = 4
KINDS = {
    "up blocks": ["up_blocks*"],
    "mid block": ["mid_block*"],
    "down blocks": ["down_blocks*"],
    "resnets": ["*resnets*"],
    "attentions": ["*attentions*"],
}

Item = tuple[Trajectory, Areas]


def score(saliency: Tensor, area: Any) -> float:
    return localisation_scores(saliency.double().numpy(), area)["auroc"]


def chosen(scores: dict[Any, ndarray], half: ndarray) -> list[Any]:
    """Layers or heads, the best on half of the captions first."""
    return sorted(scores, key=lambda name: -float(np.nanmean(scores[name][half])))


# DF-CAM --------------------------------------------------------------------------------------------------------------


def cam_scores(engine: Engine, of: Sequence[Item], layers: Sequence[str]) -> tuple[ndarray, dict[str, ndarray]]:
    """AUROC [captions, steps] of the combined map, and of each layer's."""
    combined, by_layer = np.zeros((len(of), len(STEPS))), defaultdict(lambda: np.full((len(of), len(STEPS)), np.nan))
    for step_map in Cam(layers=layers).explain(engine.denoiser, [path for path, _ in of]):
        at, area = (step_map.item, STEPS.index(step_map.step)), of[step_map.item][1]["both"]
        combined[at] = score(step_map.saliency, area)
        for name, of_layer in (step_map.layers or {}).items():
            by_layer[name][at] = score(of_layer, area)
    return combined, dict(by_layer)


def cam_rows(engine: Engine, of: Sequence[Item], held_out: ndarray) -> Iterator[record.Row]:
    combined, by_layer = cam_scores(engine, of, ["*"])
    best = chosen(by_layer, ~held_out)
    yield row("DF-CAM", f"all {len(best)} layers", combined[held_out])
    quarter = best[: max(1, len(best) // CHOSEN)]
    for what, layers in {
        f"best quarter: {len(quarter)} layers": quarter,
        f"best: {best[0]}": best[:1],
        **KINDS,
    }.items():
        yield row("DF-CAM", what, cam_scores(engine, of, layers)[0][held_out])
    for name in best:
        yield row("DF-CAM", name, by_layer[name][held_out], is_part=True)


# Attention -----------------------------------------------------------------------------------------------------------


def head_maps(engine: Engine, path: Trajectory) -> tuple[list[str], Tensor]:
    """The names of all heads, and their attention to each position of the text [heads, steps, positions, h, w]."""
    denoiser, names, maps = engine.denoiser, [], []

    def hook(probabilities: Tensor, grid: tuple[int, int]) -> Tensor:
        layer = len({name.split(",")[0] for name in names})
        for head, of_head in enumerate(probabilities.float().unbind(1)):
            field = of_head.transpose(1, 2).unflatten(2, grid)
            names.append(f"layer {layer} ({grid[0]}×{grid[1]}), head {head}")
            maps.append(F.interpolate(field, size=denoiser.latent_shape[1:], mode="bilinear", align_corners=False))
        return probabilities

    latents = torch.stack([path.latents[step] for step in STEPS])
    timesteps = torch.tensor([path.job.timesteps[step] for step in STEPS])
    network = denoiser.with_attention_hook(path.prompt, hook)  # type: ignore[attr-defined]  # shapes has attention
    with torch.no_grad():
        network(latents, timesteps, torch.zeros(len(STEPS), dtype=torch.int64))
    return names, torch.stack(maps)


def attention_rows(engine: Engine, of: Sequence[Item], held_out: ndarray) -> Iterator[record.Row]:
    maps: list[list[tuple[Tensor, Any]]] = []
    for path, areas in of:
        caption, tokens = Caption.parse(path.job.prompt), engine.denoiser.tokens(path.job.prompt)  # type: ignore[attr-defined]
        names, of_heads = head_maps(engine, path)
        maps.append([])
        for target, shape in {"subject": caption.subject, "object": caption.object}.items():
            ((_, spans),) = concept_spans(path.job.prompt, [shape[1]])  # type: ignore[index]  # every caption has an object
            places = [place for span in spans for place in tokens.places(*span)]
            maps[-1].append((of_heads[:, :, places].mean(2), areas[target]))

    def scores(heads: Sequence[int]) -> ndarray:
        """AUROC [captions, steps] of the mean over heads, itself the mean over both nouns."""
        return np.array(
            [
                [
                    np.mean([score(field[list(heads), k].mean(0), area) for field, area in both])
                    for k in range(len(STEPS))
                ]
                for both in maps
            ]
        )

    by_head = {head: scores([head]) for head in range(len(names))}
    best = chosen(by_head, ~held_out)
    yield row("attention to the noun", f"all {len(best)} heads", scores(best)[held_out])
    quarter = best[: max(1, len(best) // CHOSEN)]
    yield row("attention to the noun", f"best quarter: {len(quarter)} heads", scores(quarter)[held_out])
    yield row("attention to the noun", f"best: {names[best[0]]}", by_head[best[0]][held_out])
    for head in best:
        yield row("attention to the noun", names[head], by_head[head][held_out], is_part=True)


# The latent's own magnitude ------------------------------------------------------------------------------------------


def magnitude_rows(engine: Engine, of: Sequence[Item], held_out: ndarray) -> Iterator[record.Row]:
    """How far each method's map is the latent's own magnitude ‖x_t‖ over channels."""
    paths = [path for path, _ in of]

    def magnitude(item: int, step: int) -> Tensor:
        return torch.linalg.vector_norm(paths[item].latents[step].float(), dim=0)

    values = [[score(magnitude(item, step), areas["both"]) for step in STEPS] for item, (_, areas) in enumerate(of)]
    yield row("‖x‖", "the latent's magnitude", np.array(values)[held_out])
    for explainer in (Rise(), Cam(), Relevance(), Attention(), Counterfactual()):
        shares, found = np.zeros((len(of), len(STEPS))), np.zeros((len(of), len(STEPS)))
        for step_map in explainer.explain(engine.denoiser, paths):
            at = (step_map.item, STEPS.index(step_map.step))
            field = magnitude(step_map.item, step_map.step)
            shares[at] = spearmanr(step_map.saliency.flatten(), field.flatten()).statistic
            found[at] = score(step_map.saliency, of[step_map.item][1]["both"])
        yield row(explainer.name, "the map", found[held_out], share=shares[held_out].mean(0).round(4).tolist())


# Rows ----------------------------------------------------------------------------------------------------------------


def row(
    method: str, what: str, auroc: ndarray, *, is_part: bool = False, share: list[float] | None = None
) -> record.Row:
    values = auroc.round(4).tolist()
    return {"method": method, "what": what, "is_part": is_part, "steps": STEPS, "auroc": values, "magnitude": share}


def table(rows: Sequence[record.Row]) -> str:
    """The combinations, the range of the single layers and heads, and what is the latent's magnitude."""
    first = rows[0]
    lines = [
        f"{len(first['auroc'])} held-out captions × steps {', '.join(map(str, first['steps']))} of {NUM_STEPS}, commit "
        f"`{first['commit']}`.\n",
        "| map | layers or heads | AUROC | by step | correlation with ‖x‖, by step |",
        "|---" * 5 + "|",
    ]
    for one in rows:
        if one["is_part"]:
            continue
        share = one["magnitude"]
        shares = "–" if share is None else " ".join(f"{value:+.2f}" for value in share)
        lines.append(f"| {one['method']} | {one['what']} | {_cells(one)} | {shares} |")
        parts = [part for part in rows if part["is_part"] and part["method"] == one["method"]]
        if parts and one is next(each for each in rows if each["method"] == one["method"]):
            means = [float(np.nanmean(part["auroc"])) for part in parts]
            quantiles = ", ".join(f"{value:.2f}" for value in np.quantile(means, (0, 0.5, 1)))
            lines.append(f"| | each alone: lowest, median, highest | {quantiles} | | |")
    return "\n".join(lines) + "\n"


def _cells(one: record.Row) -> str:
    values = np.array(one["auroc"], dtype=float)
    by_step = " ".join(f"{value:.2f}" for value in np.nanmean(values, 0))
    return f"{mean_interval(np.nanmean(values, 1).tolist(), SHARES)} | {by_step}"


TABLES = {("bench/README.md", "inner_maps"): table}


def main() -> None:
    """Measure, record and print."""
    parser = record.parser(__doc__)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # about constant maps
    recorder = record.Recorder("inner_maps", TABLES, record=not options.no_record)
    engine = Engine.from_pretrained("shapes", device="cpu", batch_size=BATCH)
    # Two nouns, so that each has maps of its own.
    of = [
        (path, areas)
        for path, areas in items(engine, 2 * options.captions, SEED)
        if len(set(shapes_of(path.job.prompt))) == 2
    ][: options.captions]
    held_out = np.arange(len(of)) % 2 == 1
    environment = recorder.environment(engine.denoiser.device)
    parts = (cam_rows, attention_rows, magnitude_rows)
    rows = [one | environment for part in parts for one in part(engine, of, held_out)]
    recorder.replace(rows)
    print(table(rows), end="")


def shapes_of(prompt: str) -> list[str]:
    """The kinds of both shapes of a caption."""
    caption = Caption.parse(prompt)
    return [shape[1] for shape in (caption.subject, caption.object) if shape is not None]


if __name__ == "__main__":
    main()
