"""`dfengine sweep` and `dfengine worker`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfengine.cli import options, screen

if TYPE_CHECKING:
    from dfengine.sweep import Estimate, Event, Outcome

#: Of items that were set aside.
_MOST_LINES = 20

Spec = Annotated[
    Path, typer.Argument(help="a YAML file: prompts, seeds, schedules, models, explainers (docs/sweeps.md)")
]
Out = Annotated[Path, typer.Option("-o", "--out", help="the run folder: a new one, or one to go on with")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="try items again that were set aside")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU by default where there is one")]
Threads = Annotated[int | None, typer.Option(help="of each worker on a CPU; by default the cores are shared out")]
Stall = Annotated[float, typer.Option(help="minutes after which a worker that tells nothing is ended")]


def sweep(
    spec: Spec,
    out: Out,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would cost, and do nothing")] = False,
    workers: Annotated[int | None, typer.Option(help="by default one a GPU, or one")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="of a running Ray ('auto': here), whose machines all see the run folder")
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
    """Explain prompts × seeds × schedules × models. The same command goes on; exit status 1: not all is done."""
    from dfengine import sweep as sweeping

    described = sweeping.read(spec)
    resources = sweeping.Resources(
        workers=workers,
        device=device,
        threads=threads,
        ray_address=ray_address,
        batch_size=options.count_or_auto(batch_size),
        attention=attention,
        compile=compile,
        stall=60 * stall_minutes,
    )
    if not dry_run:
        _run(sweeping.run(described, out, resources, retry_failed=retry_failed), out, as_json)
        return
    with screen.err.status("measuring the models"):
        found, notes = sweeping.dry_run(described, out, resources)
    for note in notes:
        screen.err.print(f"dfengine: note: {note}", markup=False)
    print(json.dumps(dataclasses.asdict(found)) if as_json else "\n".join(_expected(found, out)))


def worker(
    spec: Spec,
    out: Out,
    shard: Annotated[str, typer.Option(metavar="I/N", help="the part of the sweep to do, from 1/N to N/N")],
    retry_failed: Retry = False,
    device: Device = None,
    threads: Threads = None,
    batch_size: options.BatchSize = "auto",
    attention: options.AttentionBackend = "auto",
    compile: options.Compile = None,
    stall_minutes: Stall = 30,
    as_json: options.JsonLines = False,
) -> None:
    """Do a fixed part of a sweep with one worker, as one of a Slurm array's tasks: they share the run folder."""
    from dfengine import sweep as sweeping

    resources = sweeping.Resources(
        workers=1,
        device=device,
        threads=threads,
        batch_size=options.count_or_auto(batch_size),
        attention=attention,
        compile=compile,
        stall=60 * stall_minutes,
    )
    events = sweeping.run(sweeping.read(spec), out, resources, shard=_shard(shard), retry_failed=retry_failed)
    _run(events, out, as_json, whole=False)


def _run(events: Iterator[tuple[int, Event]], out: Path, as_json: bool, *, whole: bool = True) -> None:
    """Follow a sweep, and end with the exit status that tells whether everything is done."""
    from dfengine import sweep as sweeping

    busy = set()  # held by another run
    with screen.terminated_as_interrupted():
        try:
            with closing(events), screen.sweep_bars() as show:  # type: ignore[type-var]  # it is a generator
                for worker, event in events:
                    if isinstance(event, sweeping.UnitBusy):
                        busy.add(event.unit)
                    elif isinstance(event, sweeping.Closed):
                        busy.discard(event.unit)
                    show(worker, event)
                    if as_json:
                        print(json.dumps(_line(worker, event), ensure_ascii=False), flush=True)
        except KeyboardInterrupt:
            done = f"what was done is in {out}" if out.exists() else "nothing was written"
            screen.err.print(f"dfengine: interrupted; {done}, the same command goes on", markup=False)
            raise typer.Exit(130) from None
    found = sweeping.outcome(out)
    if as_json:
        print(
            json.dumps({"event": "Outcome", "finished": found.finished} | dataclasses.asdict(found), ensure_ascii=False)
        )
    else:
        print("\n".join(_told(found, out)))
    left = busy or found.quarantined or (whole and found.units_left)
    raise typer.Exit(int(bool(left and not found.finished)))


def _line(worker: int, event: Event) -> dict[str, Any]:
    return {"event": type(event).__name__, "worker": worker} | dataclasses.asdict(event)


def _expected(found: Estimate, out: Path) -> Iterator[str]:
    from dfengine import store
    from dfengine.runtime.tuning import format_duration

    yield f"  items      {found.items:,} in {found.units:,} units"
    yield f"  forwards   {found.forwards:,} of one latent"
    workers = f"{found.workers} worker{'s' * (found.workers != 1)} ({', '.join(found.devices)})"
    yield f"  predicted  {found.hours:.2f} hours ({format_duration(3600 * found.hours)}) on {workers}"
    yield f"  files      {found.nbytes / 1e9:,.3f} GB before compression"
    if store.is_folder(out):
        left = sum(map(len, store.units_left(out, store.Folder(out).closed())))
        planned = sum(len(unit) for unit in store.planned_units(out) if not unit.retry_of)
        yield f"  already    {planned - left:,} items of {out} are done, or set aside"


def _told(found: Outcome, out: Path) -> Iterator[str]:
    for one in found.quarantined[:_MOST_LINES]:
        what = one.described
        yield f"set aside: {what['prompt']!r}, seed {what['seed']}, {what['schedule']['sampling']}: {one.errors[-1]}"
    if len(found.quarantined) > _MOST_LINES:
        yield f"and {len(found.quarantined) - _MOST_LINES} more: dfengine info {out} --json"
    if found.finished:
        yield f"{out}: all {found.items} items are done"
        return
    parts = [f"{found.units_left} units are left"] if found.units_left else []
    if found.quarantined:
        parts.append(
            f"{len(found.quarantined)} of {found.items} items were set aside (--retry-failed tries them again)"
        )
    yield f"{out}: {', '.join(parts)}"


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise ValueError(f"shard {text!r} is not understood: expected I/N, as in 3/16")
    return int(part), int(parts)
