"""What DF-RISE's settings do to its maps: where they find the shapes, how they play, what they are without a network.

    OMP_NUM_THREADS=1 python bench/rise_settings.py
    OMP_NUM_THREADS=1 python bench/rise_settings.py --captions 8 --masks 128 --laws cells4 --no-record

Every kind of masks is drawn once for each caption and step, and its forwards are compared in every way (ε or x0,
every similarity, local and global). A map is scored against the true areas of the shapes, in both games with either
refill (structure of x0, at the step that tables explain), by its correlation with the same map of the identity, and by
its lead over the answer frozen at f(R). Captions are of a seed that no other measurement here uses. Replaces the rows
of these masks in bench/results/rise_settings.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import dfkernels
import numpy as np
import record
import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from dfengine import Engine, Rise
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.evaluate.games import GAMES, REFILLS, play
from dfengine.evaluate.intervals import SHARES, mean_interval
from dfengine.evaluate.localisation import localisation_scores
from dfengine.evaluate.playing import resolve_features
from dfengine.evaluate.truth import Areas, ConceptJudge, has_distinct_colours
from dfengine.explain.rise_forwards import RiseForwards
from dfengine.shapes.world import Caption, sample_scenes

sys.path.insert(0, str(record.ROOT / "tests"))
from tolerance import tolerance

SEED, NUM_STEPS, STEPS = 22_000, 12, (1, 5, 8)
BATCH = 64

#: The kinds of masks.
LAWS: dict[str, dict[str, Any]] = {
    "cells of 4, shifted": {"cell": 4},
    "cells of 4": {"cell": 4, "shifted": False},
    "cells of 4, shifted, iid": {"cell": 4, "design": "iid"},
    "cells of 2 and 4, shifted": {"cell": (2, 4)},
    "cells of 2, shifted": {"cell": 2},
    "cells of 4, shifted, noise": {"cell": 4, "fill": "noise"},
    "smooth (RISE)": {"mask_kind": "rise"},
    "pixels": {"cell": 1},
    "pixels, iid": {"cell": 1, "design": "iid"},
    "cells of 2, 4 and 8, shifted": {"cell": (2, 4, 8)},
    "cells of 2": {"cell": 2, "shifted": False},
}
#: What is compared, how, and the estimators of maps from it.
WAYS = [
    ("x0", "structure", "local", ("coverage", "contrast")),
    ("x0", "mse", "local", ("coverage", "contrast")),
    ("x0", "cosine", "local", ("contrast",)),
    ("x0", "ssim", "local", ("contrast",)),
    ("x0", "structure", "global", ("contrast",)),
    ("x0", "mse", "global", ("contrast",)),
    ("epsilon", "structure", "local", ("coverage", "contrast")),
    ("epsilon", "mse", "local", ("contrast",)),
]
#: The map that plays the games, and the step at which it does.
PLAYED, GAME_STEP = ("x0", "structure", "local", "contrast"), 8
BASELINES = (None, "identity", "frozen")


class _Ways(RiseForwards):
    """DF-RISE's hot loop, whose forwards are compared in every way."""

    def __init__(self, rise: Rise, engine: Engine, paths: Sequence[Trajectory]) -> None:
        super().__init__(rise, engine.denoiser, paths)
        schedule = engine.denoiser.schedule
        self.readings = {
            output: torch.stack(schedule.reading(output, self.timesteps), 1).view(-1, 2) for output in ("x0", "epsilon")
        }
        shape, count = self.shape, self.sums.randomisations
        self.all_sums = {way[:3]: dfkernels.Sums.zeros(len(self.rows), shape, randomisations=count) for way in WAYS}
        self.compared = {output: torch.empty_like(self.references[:-1]) for output in self.readings}

    def compute_references(self, rows: Int[Tensor, " n"], known: range) -> None:
        super().compute_references(rows, known)
        real = rows[rows >= 0]
        latents = self.latents[real]
        outputs = self.predict(latents, real, None).float()
        for output, reading in self.readings.items():
            factors = reading[real, :, None, None, None]
            self.compared[output][real] = factors[:, 0] * outputs + factors[:, 1] * latents

    def accumulate(
        self,
        outputs: Float[Tensor, "n c h w"],
        masked: Float[Tensor, "n c h w"],
        rows: Int[Tensor, " n"],
        indices: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        for (output, similarity, score), sums in self.all_sums.items():
            scores = dfkernels.accumulate(
                outputs, self.compared[output], sums, self.seeds, self.steps, rows, indices, self.distribution,
                similarity=similarity, score=score, inputs=masked, reading=self.readings[output],
            )  # fmt: skip
        return scores

    def maps(self) -> dict[tuple[str, str, str, str], Float[Tensor, "rows h w"]]:
        """The map of every row, by output, similarity, score and estimator."""
        return {
            (*way[:3], estimator): dfkernels.estimate(self.all_sums[way[:3]], estimator)[0]
            for way in WAYS
            for estimator in way[3]
        }


def items(engine: Engine, count: int, seed: int = SEED) -> list[tuple[Trajectory, Areas]]:
    """Generations that show what their captions say, and the areas of their shapes."""
    captions: list[str] = []
    for caption in sample_scenes(20 * count, torch.Generator().manual_seed(seed)).captions:
        if caption.object is not None and has_distinct_colours(caption) and str(caption) not in captions:
            captions.append(str(caption))
    judge, found = ConceptJudge(), []
    for start in itertools.count(0, 8):
        jobs = [engine.job(text, seed=start, num_steps=NUM_STEPS) for text in captions[start : start + 8]]
        for path in trajectories(engine.denoiser, jobs):
            areas = judge.areas(path.image.numpy(), Caption.parse(path.job.prompt))
            if areas is not None:
                found.append((dataclasses.replace(path, explain_steps=STEPS), areas))
        if len(found) >= count:
            return found[:count]
    raise AssertionError


def rows_of(engine: Engine, law: str, num_masks: int, of: Sequence[tuple[Trajectory, Areas]]) -> Iterator[record.Row]:
    """A row for each way of comparing the forwards of one kind of masks."""
    paths = [path for path, _ in of]
    maps, seconds = {}, []
    for baseline in BASELINES:
        forwards = _Ways(Rise(num_masks=num_masks, baseline=baseline, **LAWS[law]), engine, paths)
        begin = time.perf_counter()
        list(forwards.run())
        seconds.append(time.perf_counter() - begin)
        maps[baseline] = forwards.maps()
    for way, of_network in maps[None].items():
        values: dict[str, Any] = {}
        for row, (item, step) in enumerate(forwards.rows):
            areas = of[item][1]
            network, identity, frozen = (maps[baseline][way][row] for baseline in BASELINES)
            scores = localisation_scores(network.numpy(), areas["both"]) | {
                "frozen": localisation_scores(frozen.numpy(), areas["both"])["auroc"],
                "subject": localisation_scores(network.numpy(), areas["subject"])["auroc"],
                "identity": float(spearmanr(network.flatten(), identity.flatten()).statistic),
            }
            for name, value in scores.items():
                values.setdefault(name, {}).setdefault(str(step), []).append(round(value, 4))
        if way == PLAYED:
            at = [row for row, (_, step) in enumerate(forwards.rows) if step == GAME_STEP]
            values["games"] = games(engine, paths, of_network[at])
        names = ("output", "similarity", "score", "estimator")
        yield {
            "law": law,
            "num_masks": num_masks,
            **dict(zip(names, way, strict=True)),
            "steps": STEPS,
            "num_steps": NUM_STEPS,
            "seconds": round(seconds[0], 1),
            "values": values,
        }


def games(engine: Engine, paths: Sequence[Trajectory], maps: Float[Tensor, "items h w"]) -> dict[str, list[float]]:
    """The lead over random order in each game with each refill, of every item: positive is better."""
    at = [dataclasses.replace(path, explain_steps=(GAME_STEP,)) for path in paths]
    random = torch.rand(maps.shape, generator=torch.Generator().manual_seed(SEED))
    leads: dict[str, list[float]] = {}
    for refill in REFILLS:
        extract, _ = resolve_features(engine.denoiser)
        curves = play(engine.denoiser, at, {"map": maps, "random": random}, extract, refill=refill)
        for number, (game, sign) in enumerate(zip(GAMES, (1, -1), strict=True)):
            areas = {
                name: np.array([area_under(one.features[number], one.features[number, -number]) for one in of])
                for name, of in curves.items()
            }
            leads[f"{game}, {refill}"] = (sign * (areas["map"] - areas["random"])).round(4).tolist()
    return leads


def area_under(features: Float[Tensor, "points d"], unperturbed: Float[Tensor, " d"]) -> float:
    """Of the distance from the unperturbed image along a curve, as a share of its largest."""
    distance = (features - unperturbed).norm(dim=1)
    return float(torch.trapezoid(distance, dx=1 / (len(distance) - 1)) / distance.max().clamp(min=1e-12))


def table_of_ways(rows: Sequence[record.Row]) -> str:
    """Every way of comparing the default's masks, best first."""
    law, num_masks = next(iter(LAWS)), Rise().num_masks
    return table([row for row in rows if (row["law"], row["num_masks"]) == (law, num_masks)])


def table_of_masks(rows: Sequence[record.Row]) -> str:
    """Every kind and number of masks, compared by structure and squared difference, best first."""
    of = ("x0", "local", "contrast")
    return table(
        [
            row
            for row in rows
            if (row["output"], row["score"], row["estimator"]) == of and row["similarity"] in ("structure", "mse")
        ]
    )


def table(rows: Sequence[record.Row]) -> str:
    """Rows, the best first."""
    if not rows:
        return record.NOT_MEASURED
    first = rows[0]
    count, commits = (
        len(first["values"]["auroc"][str(STEPS[0])]),
        ", ".join(sorted({f"`{row['commit']}`" for row in rows})),
    )
    columns = (
        "masks",
        "compared",
        "estimator",
        "AUROC",
        "by step",
        "IoU",
        "pointing",
        "identity",
        "lead over frozen, by step",
    )
    games = [f"{game}, {refill}" for refill in REFILLS for game in GAMES]
    lines = [
        f"{count} captions × steps {', '.join(map(str, STEPS))} of {NUM_STEPS}, commit {commits}; games at step "
        f"{GAME_STEP}: the lead over random order.\n",
        f"| {' | '.join((*columns, *games))} |",
        "|---" * (len(columns) + len(games)) + "|",
    ]
    lines += [f"| {' | '.join(cells(row, games))} |" for row in sorted(rows, key=_auroc, reverse=True)]
    return "\n".join(lines) + "\n"


def cells(row: record.Row, games: Sequence[str]) -> Iterator[str]:
    """The cells of one row of the table."""
    values = {name: np.array(list(of.values()), dtype=float) for name, of in row["values"].items() if name != "games"}
    yield f"{row['law']} × {row['num_masks']}"
    yield f"{row['output']}, {row['score']} {row['similarity']}"
    yield row["estimator"]
    yield str(mean_interval(values["auroc"].mean(0).tolist(), SHARES))
    yield " ".join(f"{one:.2f}" for one in values["auroc"].mean(1))
    yield f"{values['iou'].mean():.2f}"
    yield f"{values['pointing'].mean():.2f}"
    yield " ".join(f"{one:+.2f}" for one in np.nanmean(values["identity"], 1))
    leads = values["auroc"] - values["frozen"]
    has_frozen = row["output"] == "x0"  # of ε the frozen answer's map is constant
    yield " ".join(format(mean_interval(one.tolist()), "+.2f") for one in leads) if has_frozen else "–"
    played = row["values"].get("games")
    for game in games:
        yield "–" if played is None else format(mean_interval(played[game]), "+.2f")


def _auroc(row: record.Row) -> float:
    return float(np.mean(list(row["values"]["auroc"].values())))


def check_areas(of: Sequence[tuple[Trajectory, Areas]]) -> None:
    """Exit unless the true areas themselves have an AUROC of 1."""
    for path, areas in of:
        value = localisation_scores(areas["both"].astype(float), areas["both"])["auroc"]
        record.check(value == 1, f"the true area of {path.job.prompt!r} has AUROC {value}, expected 1")


def check_maps(engine: Engine, path: Trajectory) -> None:
    """Exit unless maps from shared forwards are the explainer's own."""
    rise = Rise(num_masks=BATCH)
    forwards = _Ways(rise, engine, [path])
    list(forwards.run())
    shared = forwards.maps()[rise.output, str(rise.similarity), rise.score, rise.resolved_estimator]
    own = torch.stack([one.saliency for one in rise.explain(engine.denoiser, [path])])
    with record.checked("maps from shared forwards"):
        torch.testing.assert_close(shared, own, **tolerance("estimate"))


TABLES = {("bench/README.md", "rise_settings"): table_of_ways, ("bench/README.md", "rise_masks"): table_of_masks}


@torch.no_grad()
def main() -> None:
    """Measure, record and print."""
    parser = record.parser(__doc__)
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--masks", type=int, nargs="+", default=[256])
    parser.add_argument("--laws", nargs="+", default=list(LAWS), choices=list(LAWS))
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # about constant maps and few masks
    recorder = record.Recorder("rise_settings", TABLES, record=not options.no_record)
    engine = Engine.from_pretrained("shapes", device="cpu", batch_size=BATCH)
    of = items(engine, options.captions)
    check_areas(of)
    check_maps(engine, of[0][0])
    for law, masks in itertools.product(options.laws, options.masks):
        rows = [row | recorder.environment(engine.denoiser.device) for row in rows_of(engine, law, masks, of)]
        recorder.replace(rows, ("law", "num_masks"))
        print(f"{law} × {masks}: {rows[0]['seconds']} s", file=sys.stderr, flush=True)
        print(table(rows), end="", flush=True)


if __name__ == "__main__":
    main()
