"""`millstream tune`: loads a service's model here and measures which batch limits this device is fastest with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from millstream.broker.contract.errors import InvalidRequest, UnknownService, did_you_mean
from millstream.cli.options import SecondsRange
from millstream.cli.table import aligned, bar, counted

if TYPE_CHECKING:
    from millstream.broker.config.load import Config, ServiceSpec
    from millstream.worker.measuring.threads import Threads
    from millstream.worker.measuring.tuning import Cell
    from millstream.worker.models.base import Model, Prepared
    from millstream.worker.scheduling.batcher import Budget

DEFAULT_S, LONGEST_S = 60.0, 3_600.0
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a service's model, loaded, and the limits the service has now."""

    spec: ServiceSpec
    model: Model
    device: str
    threads: Threads
    own: Budget


@click.command()
@click.argument("service")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="By default ./config.yaml.",
)
@click.option(
    "--texts",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Measure with these texts, one a line; by default with a long-tailed mix of lengths.",
)
@click.option(
    "--seconds",
    type=SecondsRange(0, LONGEST_S, min_open=True),
    default=DEFAULT_S,
    show_default=True,
    help="How long to measure.",
)
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; by default the model's.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def tune(
    service: str, config: Path | None, texts: Path | None, seconds: float, device: str | None, as_json: bool
) -> None:
    """Measure which batch_size and max_batch_tokens SERVICE is fastest with on this machine.

    Loads its model in this process, on the threads that one of its workers would choose, runs batches as its workers
    pack them, and prints the lines to put into config.yaml. Needs no server. Stop the workers of this machine first:
    what else runs is measured, too. Ctrl-C ends it and shows what was measured so far.
    """
    from millstream.cli.config import load_and_warn

    spec = _service(load_and_warn(config), service)
    lines = _lines(texts) if texts else None
    subject = _loaded(spec, device)
    rows = _rows(subject.model, lines)
    click.echo(f"{service}: measuring for about {seconds:g} s; Ctrl-C ends it", err=True)
    cells, interrupted = _measured(subject, rows, seconds)
    click.echo(_json(subject, cells) if as_json else report(subject, cells))
    if interrupted:
        click.get_current_context().exit(INTERRUPTED)


def _service(config: Config, name: str) -> ServiceSpec:
    """Raises UnknownService, InvalidRequest where its batches have no such limits, ModelUnavailable."""
    from millstream.worker.supervision.supervisor import preflight

    spec = config.services.get(name)
    if spec is None:
        close = did_you_mean(name, config.services)
        raise UnknownService(
            f"the configuration has no service {name!r}",
            did_you_mean=close,
            hint=f"did you mean {close}?" if close else f"known are: {', '.join(config.services) or 'none'}",
        )
    if spec.model.type == "llm":
        raise InvalidRequest(f"service {name!r} generates: its batches change with each token", hint="tune others")
    if spec.model.type == "custom":
        raise InvalidRequest(f"service {name!r} runs code of yours: only its callers know payloads", hint="tune others")
    preflight([spec])
    return spec


def _loaded(spec: ServiceSpec, device: str | None) -> Subject:
    """Raises ModelUnavailable."""
    from millstream.worker import models
    from millstream.worker.measuring.cores import cores
    from millstream.worker.measuring.probe import auto_tokens, most_tokens
    from millstream.worker.measuring.threads import Threads, waiting
    from millstream.worker.process import use_threads
    from millstream.worker.scheduling.batcher import Budget

    place = device or next(iter(spec.model.devices), spec.model.device)
    # Before torch is imported: its OpenMP reads this once.
    os.environ.update(waiting(os.environ))
    threads = Threads(max(1, cores() // spec.runtime.worker_count))
    click.echo(f"{spec.name}: loading {spec.model.model_name or spec.model.type}", err=True)
    model = models.load(spec, place, threads.count)
    threads.choose(model, use_threads)
    tokens = most_tokens(spec.runtime, auto_tokens(spec, model))
    own = Budget(spec.runtime.batch_size, tokens, packs=models.packs(model))
    return Subject(spec, model, place or "auto", threads, own)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}", hint="UTF-8, one text a line") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise InvalidRequest(f"{path} has no text", hint="one text a line")
    return found


def _rows(model: Model, texts: Sequence[str] | None) -> Sequence[Prepared]:
    """Raises InvalidRequest where the model takes none of the texts."""
    from millstream.worker.measuring import tuning

    if texts is None:
        return tuning.mix(model)
    rows, refused = tuning.rows_of(model, texts)
    if not rows:
        raise InvalidRequest(f"the model takes none of the texts: {next(iter(refused.values()))}")
    if refused:
        click.echo(f"{counted(len(refused), 'text')} left out: {next(iter(refused.values()))}", err=True)
    return rows


def _measured(subject: Subject, rows: Sequence[Prepared], seconds: float) -> tuple[list[Cell], bool]:
    """The grid as far as there was time, and whether somebody ended it."""
    from millstream.worker.measuring import tuning
    from millstream.worker.measuring.warmup import warm_up
    from millstream.worker.window import Window

    window = Window(subject.own)
    warm_up(subject.model, window)
    cells = tuning.grid(rows, window, subject.own)
    try:
        for _ in tuning.measure(subject.model, cells, seconds):
            pass
    except KeyboardInterrupt:
        return cells, True
    return cells, False


_HEADING = ("BATCH_SIZE", "TOKENS", "ROWS/S", "LOW-HIGH", "PADDING", "ROWS/FORWARD", "MS/FORWARD", "")


def report(subject: Subject, cells: Sequence[Cell]) -> str:
    """The curve as a table, and the lines to put into config.yaml."""
    from millstream.worker.measuring.tuning import best

    chosen = best(cells, subject.own)
    fastest = max((cell.rate for cell in cells), default=0.0)
    table = aligned([_HEADING, *(_row(cell, fastest, _mark(subject, cell, chosen)) for cell in cells)])
    return "\n".join([table, "", *_yaml(subject, cells, chosen)])


def _row(cell: Cell, fastest: float, mark: str) -> tuple[str, ...]:
    limits = (str(cell.budget.rows), str(cell.budget.tokens))
    if not cell.rates:
        return (*limits, *["-"] * 5, "out of memory" if cell.no_room else "not measured")
    return (
        *limits,
        f"{cell.rate:.1f}",
        f"{min(cell.rates):.1f}-{max(cell.rates):.1f}",
        f"{cell.padding:.2f}",
        f"{cell.rows_per_forward:.1f}",
        f"{1000 * cell.forward_s:.1f}",
        f"{bar(cell.rate / fastest)} {mark}".rstrip(),
    )


def _mark(subject: Subject, cell: Cell, chosen: Cell | None) -> str:
    from millstream.worker.measuring.tuning import same

    marks = {"now": same(cell.budget, subject.own), "best": cell is chosen}
    return ", ".join(mark for mark, here in marks.items() if here)


def _yaml(subject: Subject, cells: Sequence[Cell], chosen: Cell | None) -> Iterator[str]:
    from millstream.worker.measuring.tuning import same

    if chosen is None:
        yield "# nothing was measured: give it more --seconds"
        return
    keeps = same(chosen.budget, subject.own)
    now = next((cell.rate for cell in cells if same(cell.budget, subject.own)), 0.0)
    place = f"{subject.device}, {subject.threads}"
    if any(not cell.rates and not cell.no_room for cell in cells):
        place += ", of what there was time for"
    if keeps:
        yield f"# {place}: what it has now is within 5 % of the best"
    elif now:
        yield f"# {place}: {chosen.rate / now:.2f} times the rows/s of what it has now"
    else:
        yield f"# {place}: the best that was measured; what it has now was not"
    runtime = subject.spec.runtime
    yield "services:"
    yield f"  {subject.spec.name}:"
    yield "    runtime:"
    yield f"      batch_size: {chosen.budget.rows}"
    yield f"      max_batch_tokens: {runtime.max_batch_tokens if keeps else chosen.budget.tokens}"


def _json(subject: Subject, cells: Sequence[Cell]) -> str:
    from millstream.worker.measuring.tuning import best

    records = [
        {
            "batch_size": cell.budget.rows,
            "max_batch_tokens": cell.budget.tokens,
            "rows_per_s": cell.rate or None,
            "rounds": cell.rates,
            "padding": cell.padding,
            "rows_per_forward": cell.rows_per_forward,
            "ms_per_forward": 1000 * cell.forward_s or None,
            "out_of_memory": cell.no_room,
        }
        for cell in cells
    ]
    found = best(cells, subject.own)
    limits = {"batch_size": found.budget.rows, "max_batch_tokens": found.budget.tokens} if found else None
    now = {"batch_size": subject.own.rows, "max_batch_tokens": subject.own.tokens}
    head = {"service": subject.spec.name, "device": subject.device, "threads": subject.threads.count}
    rates = {str(count): rate for count, rate in subject.threads.rates.items()}
    return json.dumps(
        {**head, "tokens_per_s_by_threads": rates, "now": now, "best": limits, "measured": records}, indent=2
    )
