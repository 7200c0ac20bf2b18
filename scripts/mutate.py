"""Break the product one line at a time and see that the test named for it turns red: scripts/mutate [WORDS].

The breaks and their tests are in scripts/mutations.toml. The working tree is copied to temporary folders and only the
copies are broken; an unbroken copy comes first, in which every test named must pass. With WORDS only those breaks are
made whose line in the table has them all. Exit 1 where a test stayed green, or did not run at all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = ROOT / "scripts" / "mutations.toml"
AT_ONCE = 2
LONGEST_S = 180.0
"""Seconds for the test of one break."""

ALL_S = 900.0
"""Seconds for all tests, where nothing is broken."""

PASSED, FAILED = 0, 1
"""What pytest ends with; everything else means that the tests did not run."""

_WHERE = (
    "import millstream.broker.queue.streams as s, millstream.broker.queue.scripts as c; print(s.__file__, c._FOLDER)"
)


@dataclass(frozen=True, slots=True)
class Mutation:
    """`find`, which `file` has once, becomes `replace`: this breaks a promise, and `test` must say so."""

    promise: int
    breaks: str
    file: str
    find: str
    replace: str
    test: str

    def __str__(self) -> str:
        return f"{self.promise:2} {self.breaks:<66} {self.file:<28} {self.test.rpartition('::')[2]}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the tests ended: pytest's exit status, its output, and how long it took."""

    status: int
    output: str
    seconds: float

    def verdict(self) -> str:
        return {PASSED: "GREEN", FAILED: "red"}.get(self.status, "DID NOT RUN")


class Copy:
    """A copy of the working tree whose tests import the copy's own packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in _files():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
        self._environment = os.environ | {
            "PYTHONPATH": str(folder / ".typecheck"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        found = self._python(LONGEST_S, "-c", _WHERE).stdout.split()
        if len(found) != 2 or not all(Path(each).resolve().is_relative_to(folder.resolve()) for each in found):
            raise SystemExit(f"the copy in {folder} would test {found or 'nothing'} instead of itself")

    def run(self, tests: Sequence[str], within_s: float = LONGEST_S) -> Outcome:
        began = time.monotonic()
        try:
            ended = self._python(
                within_s, "-m", "pytest", "-x", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", *tests
            )
        except subprocess.TimeoutExpired:
            # A break may make a test wait for ever: that is red enough.
            return Outcome(FAILED, "", time.monotonic() - began)
        return Outcome(ended.returncode, ended.stdout + ended.stderr, time.monotonic() - began)

    @contextmanager
    def broken(self, mutation: Mutation) -> Iterator[None]:
        file = self.folder / mutation.file
        whole = file.read_text(encoding="utf-8")
        if whole.count(mutation.find) != 1:
            raise SystemExit(f"{mutation.file} has {whole.count(mutation.find)} times, not once: {mutation.find}")
        file.write_text(whole.replace(mutation.find, mutation.replace), encoding="utf-8")
        try:
            yield
        finally:
            file.write_text(whole, encoding="utf-8")

    def _python(self, within_s: float, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *words]
        return subprocess.run(
            command, cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=within_s
        )


def _files() -> list[str]:
    """What git tracks and what it would, of what is there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted({name for name in listed.stdout.split("\0") if name and os.path.lexists(ROOT / name)})


def read(words: Sequence[str] = ()) -> list[Mutation]:
    """The breaks whose line in the table has all `words`."""
    listed = tomllib.loads(MUTATIONS.read_text(encoding="utf-8"))["mutation"]
    return [each for each in (Mutation(**entry) for entry in listed) if all(word in str(each) for word in words)]


def try_all(mutations: Sequence[Mutation], copies: Sequence[Copy]) -> Iterator[tuple[Mutation, Outcome]]:
    """Each mutation by itself, in whichever copy is free; in the order given."""
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def try_one(mutation: Mutation) -> Outcome:
        copy = free.get()
        try:
            with copy.broken(mutation):
                return copy.run([mutation.test])
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        yield from zip(mutations, pool.map(try_one, mutations), strict=True)


def main(words: Sequence[str]) -> int:
    say = Console(width=180, highlight=False, soft_wrap=True).print
    mutations = read(words)
    if not mutations:
        # pytest without a test's name would run them all.
        raise SystemExit(f"no break has all these words: {' '.join(words)}")
    with tempfile.TemporaryDirectory(prefix="millstream-mutate-") as folder:
        copies = [Copy(Path(folder) / str(number)) for number in range(AT_ONCE)]
        unbroken = copies[0].run(sorted({each.test for each in mutations}), ALL_S)
        if unbroken.status != PASSED:
            say(unbroken.output, markup=False)
            say("these tests do not pass where nothing is broken")
            return 1
        survivors = 0
        for mutation, outcome in try_all(mutations, copies):
            survivors += outcome.status != FAILED
            say(f"{outcome.verdict():<11} {outcome.seconds:5.1f} s  {mutation}", markup=False)
            if outcome.status not in (PASSED, FAILED):
                say(outcome.output, markup=False)
    say(f"{len(mutations)} breaks, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
