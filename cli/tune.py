"""`millstream tune`: loads a service's model here and measures with which batch limits this device is fastest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from millstream.broker.config.load import Config, ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, UnknownService, did_you_mean
from millstream.cli import options
from millstream.cli.config import load_and_warn
from millstream.cli.options import SecondsRange
from millstream.cli.table import align, bar, quantity
from millstream.worker import models
from millstream.worker.making import use_threads
from millstream.worker.measuring import tuning
from millstream.worker.measuring.cores import cores
from millstream.worker.measuring.probe import auto_tokens, most_tokens
from millstream.worker.measuring.threads import Threads, waiting
from millstream.worker.measuring.tuning import Cell, best, same
from millstream.worker.measuring.warmup import warm_up
from millstream.worker.models.base import Model, Prepared
from millstream.worker.scheduling.batcher import Budget
from millstream.worker.supervision.plan import preflight
from millstream.worker.window import Window

DEFAULT_S, LONGEST_S = 60.0, 3_600.0
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Subject:
    """The loaded model of a service, its device and threads, and the limits that the service has now (`own`)."""

    spec: ServiceSpec
    model: Model
    device: str
    threads: Threads
    own: Budget


@click.command()
@options.service
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="By default ./config.yaml.",
)
@click.option(
    "--texts",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Measure with the texts of this file, one per line; by default with a long-tailed mix of lengths.",
)
@click.option(
    "--seconds",
    type=SecondsRange(0, LONGEST_S, min_open=True),
    default=DEFAULT_S,
    show_default=True,
    help="Seconds to measure.",
)
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; by default the model's.")
@options.json_output()
def tune(
    service: str, config: Path | None, texts: Path | None, seconds: float, device: str | None, as_json: bool
) -> None:
    """Measure with which batch_size and max_batch_tokens SERVICE is fastest on this machine.

    Loads its model in this process with as many threads as one of its workers would use, runs batches as its workers
    pack them, and prints the lines to put into config.yaml. Needs no server. Stop the workers on this machine first:
    other programs slow the measurement. Ctrl-C ends it and shows the figures measured so far.
    """
    spec = _service(load_and_warn(config), service)
    lines = _lines(texts) if texts else None
    subject = _load(spec, device)
    rows = _rows(subject.model, lines)
    click.echo(f"{service}: measuring for about {seconds:g} s; Ctrl-C ends it", err=True)
    cells, interrupted = _measure(subject, rows, seconds)
    click.echo(_json(subject, cells) if as_json else report(subject, cells))
    if interrupted:
        click.get_current_context().exit(INTERRUPTED)


def _service(config: Config, name: str) -> ServiceSpec:
    """Returns the spec of a service that can be measured.

    Raises UnknownService, InvalidRequest if its type cannot be measured, ModelUnavailable if the model cannot run here.
    """
    spec = config.services.get(name)
    if spec is None:
        close = did_you_mean(name, config.services)
        raise UnknownService(
            f"the configuration has no service {name!r}",
            did_you_mean=close,
            hint=f"did you mean {close}?" if close else f"known are: {', '.join(config.services) or 'none'}",
        )
    if spec.model.operation.streams:
        raise InvalidRequest(f"service {name!r} generates: its batches change with each token", hint=_OTHER_TYPES)
    if spec.model.operation.needs_code:
        raise InvalidRequest(f"service {name!r} runs custom code: only its callers know payloads", hint=_OTHER_TYPES)
    if spec.model.is_upstream:
        raise InvalidRequest(f"service {name!r} runs on a server of its own: tune that server", hint=_OTHER_TYPES)
    preflight([spec])
    return spec


_OTHER_TYPES = "name a service of another type"


def _load(spec: ServiceSpec, device: str | None) -> Subject:
    """Loads the model and chooses the number of threads, as a worker does. Raises ModelUnavailable if that fails."""
    place = device or next(iter(spec.model.devices), spec.model.device)
    # Before torch is imported, because its OpenMP reads these variables only once.
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
        raise InvalidRequest(f"{path} cannot be read: {error}", hint="give UTF-8 with one text per line") from None
    found = [line for line in lines if line.strip()]
    if not found:
        raise InvalidRequest(f"{path} has no text", hint="give one text per line")
    return found


def _rows(model: Model, texts: Sequence[str] | None) -> Sequence[Prepared]:
    """Returns the rows of `texts`, or of a mix if it is None. Raises InvalidRequest if the model refuses all texts."""
    if texts is None:
        return tuning.mix(model)
    rows, refused = tuning.rows_of(model, texts)
    if not rows:
        raise InvalidRequest(f"the model accepts none of the texts: {next(iter(refused.values()))}")
    if refused:
        click.echo(f"{quantity(len(refused), 'text')} left out: {next(iter(refused.values()))}", err=True)
    return rows


def _measure(subject: Subject, rows: Sequence[Prepared], seconds: float) -> tuple[list[Cell], bool]:
    """Measures the grid for `seconds`. Returns its cells, and whether Ctrl-C ended the measurement."""
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
    """Returns a table of the measured cells, and the lines to put into config.yaml."""
    chosen = best(cells, subject.own)
    fastest = max((cell.rate for cell in cells), default=0.0)
    table = align([_HEADING, *(_row(cell, fastest, _mark(subject, cell, chosen)) for cell in cells)])
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
    marks = {"now": same(cell.budget, subject.own), "best": cell is chosen}
    return ", ".join(mark for mark, here in marks.items() if here)


def _yaml(subject: Subject, cells: Sequence[Cell], chosen: Cell | None) -> Iterator[str]:
    if chosen is None:
        yield "# nothing was measured: give it more --seconds"
        return
    keeps = same(chosen.budget, subject.own)
    now = next((cell.rate for cell in cells if same(cell.budget, subject.own)), 0.0)
    place = f"{subject.device}, {subject.threads}"
    if any(not cell.rates and not cell.no_room for cell in cells):
        place += ", some limits not measured for lack of time"
    if keeps:
        yield f"# {place}: the present limits are within 5 % of the best"
    elif now:
        yield f"# {place}: {chosen.rate / now:.2f} times the rows/s of the present limits"
    else:
        yield f"# {place}: the best of the measured limits; the present ones were not measured"
    runtime = subject.spec.runtime
    yield "services:"
    yield f"  {subject.spec.name}:"
    yield "    runtime:"
    yield f"      batch_size: {chosen.budget.rows}"
    yield f"      max_batch_tokens: {runtime.max_batch_tokens if keeps else chosen.budget.tokens}"


def _json(subject: Subject, cells: Sequence[Cell]) -> str:
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
