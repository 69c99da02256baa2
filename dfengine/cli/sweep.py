"""`dfengine sweep` and `dfengine worker`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dfengine.cli import options, progress, screen

if TYPE_CHECKING:
    from dfengine.sweep import Estimate, Event, Outcome, Sweep

#: Quarantined items that are listed.
_MOST_LINES = 20

Spec = Annotated[
    Path, options.path_argument("a YAML file: prompts, seeds, schedules, models, explainers (docs/sweeps.md)")
]
Out = Annotated[Path, options.path_option("-o", "--out", "--output", help="run folder, a new one or one to resume")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="retry quarantined items")]
Device = Annotated[
    Literal["cpu", "cuda"] | None,
    typer.Option(help="a GPU by default if there is one; GPUs are distributed among the workers"),
]
Threads = Annotated[
    int | None, options.integer(help="threads of each worker on a CPU; by default all cores divided", low=1, high=4096)
]
Stall = Annotated[float, options.real(help="minutes without progress after which a worker is killed", above=0)]


def sweep(
    spec: Spec,
    out: Out,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only estimate the cost")] = False,
    workers: Annotated[
        int | None, options.integer(help="number of workers; by default one for each GPU, or one", low=1, high=4096)
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="address of a running Ray cluster ('auto': this machine's) that shares the run folder"),
    ] = None,
    retry_failed: Retry = False,
    device: Device = None,
    threads: Threads = None,
    batch_size: options.BatchSize = "auto",
    attention: options.AttentionBackend = "auto",
    compile: options.Compile = None,
    stall_minutes: Stall = 30,
    as_json: options.JsonLines = False,
) -> None:
    """Explain prompts × seeds × schedules × models. Rerun to resume; exit status 1 if items are left or quarantined."""
    from dfengine import sweep as sweeping

    options.refuse(dry_run and retry_failed, "--retry-failed", "not for a --dry-run")
    options.check_folder(out)
    described = sweeping.read(spec)
    resources = sweeping.Resources(
        workers=workers,
        device=device,
        threads=threads,
        ray_address=ray_address,
        batch_size=batch_size,
        attention=attention,
        compile=compile,
        stall=60 * stall_minutes,
    )
    if not dry_run:
        _run(sweeping.run(described, out, resources, retry_failed=retry_failed), described, out, as_json)
        return
    with progress.bar("measuring the models"):
        estimate, notes = sweeping.dry_run(described, out, resources)
    for note in notes:
        screen.note(note)
    if as_json:
        screen.say_json(dataclasses.asdict(estimate))
    else:
        screen.say(*_estimate_lines(estimate, out))


def worker(
    spec: Spec,
    out: Out,
    shard: Annotated[str, typer.Option(metavar="I/N", help="part of the sweep to run, from 1/N to N/N")],
    retry_failed: Retry = False,
    device: Device = None,
    threads: Threads = None,
    batch_size: options.BatchSize = "auto",
    attention: options.AttentionBackend = "auto",
    compile: options.Compile = None,
    stall_minutes: Stall = 30,
    as_json: options.JsonLines = False,
) -> None:
    """Run a fixed part of a sweep with one worker, as a task of a Slurm array; all tasks share the run folder."""
    from dfengine import sweep as sweeping

    resources = sweeping.Resources(
        workers=1,
        device=device,
        threads=threads,
        batch_size=batch_size,
        attention=attention,
        compile=compile,
        stall=60 * stall_minutes,
    )
    part, described = _shard(shard), sweeping.read(spec)
    options.check_folder(out)
    events = sweeping.run(described, out, resources, shard=part, retry_failed=retry_failed)
    _run(events, described, out, as_json, is_complete=False)


def _run(
    events: Iterator[tuple[int, Event]], described: Sweep, out: Path, as_json: bool, *, is_complete: bool = True
) -> None:
    """Follow a sweep, and exit with 0 if everything is done, otherwise with 1; a shard does a part of it."""
    from dfengine import sweep as sweeping

    busy = set()  # held by another run
    with (
        screen.interruptible(lambda: f"completed work is in {out}; {screen.RESUME}" if out.exists() else ""),
        closing(events),  # type: ignore[type-var]  # it is a generator
        progress.sweep_bars() as show,
    ):
        for worker, event in events:
            if isinstance(event, sweeping.UnitBusy):
                busy.add(event.unit)
            elif isinstance(event, sweeping.Closed):
                busy.discard(event.unit)
            show(worker, event)
            if as_json:
                screen.say_json(_line(worker, event))
    outcome = sweeping.outcome(out, described)
    if as_json:
        screen.say_json({"event": "Outcome", "finished": outcome.finished} | dataclasses.asdict(outcome))
    else:
        screen.say(*_outcome_lines(outcome, out))
    left = busy or outcome.quarantined or (is_complete and outcome.units_left)
    raise typer.Exit(int(bool(left and not outcome.finished)))


def _line(worker: int, event: Event) -> dict[str, Any]:
    return {"event": type(event).__name__, "worker": worker} | dataclasses.asdict(event)


def _estimate_lines(estimate: Estimate, out: Path) -> Iterator[str]:
    from dfengine import store
    from dfengine.runtime.tuning import format_duration

    yield f"  items      {estimate.items:,} in {estimate.units:,} units"
    yield f"  forwards   {estimate.forwards:,} of one latent"
    workers = f"{estimate.workers} worker{'s' * (estimate.workers != 1)} ({', '.join(estimate.devices)})"
    yield f"  predicted  {format_duration(3600 * estimate.hours)} on {workers}"
    yield f"  files      {estimate.nbytes / 1e9:,.3f} GB before compression"
    if store.is_folder(out):
        left = sum(map(len, store.units_left(out, store.Folder(out).closed())))
        planned = sum(len(unit) for unit in store.planned_units(out) if not unit.retry_of)
        yield f"  already    {planned - left:,} items of {out} are done or quarantined"


def _outcome_lines(outcome: Outcome, out: Path) -> Iterator[str]:
    for one in outcome.quarantined[:_MOST_LINES]:
        what = one.described
        yield f"quarantined: {what['prompt']!r}, seed {what['seed']}, {what['schedule']['sampling']}: {one.errors[-1]}"
    if len(outcome.quarantined) > _MOST_LINES:
        yield f"and {len(outcome.quarantined) - _MOST_LINES} more: dfengine info {out} --json"
    if outcome.finished:
        yield f"{out}: all {outcome.items} items are done"
        return
    parts = [f"{outcome.units_left} units remain"] if outcome.units_left else []
    if outcome.quarantined:
        parts.append(
            f"{len(outcome.quarantined)} of {outcome.items} items were quarantined (--retry-failed retries them)"
        )
    yield f"{out}: {', '.join(parts)}"


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"shard {text!r} is not understood: expected I/N with I from 1 to N, as in 3/16")
    return int(part), int(parts)
