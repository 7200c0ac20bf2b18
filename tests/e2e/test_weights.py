"""All workers of a service run the same weights: the first one's, until a push after all have stopped."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from e2e.sites import Site, echo, site_of
from e2e.supervisors import START_S, lone_worker, said, supervising
from support import eventually

from millstream.broker.config.load import ModelSpec, ServiceSpec
from millstream.broker.contract.answer import answer_field, decode_answer, encode_answer
from millstream.broker.queue.registry import Registry
from millstream.worker.supervision.child_args import EXIT_PERMANENT
from millstream.worker.supervision.plan import Plan

pytestmark = [pytest.mark.early, pytest.mark.timeout(300)]

LONG = bool(os.environ.get("MILLSTREAM_LONG"))

Open = Callable[[ServiceSpec], Site]


@pytest.fixture
def opened(url: str, tmp_path: Path) -> Iterator[Open]:
    """Registers a service, without a worker."""
    with ExitStack() as ends:
        yield lambda spec: ends.enter_context(site_of(url, spec, tmp_path / spec.name))


def of_folder(folder: Path) -> ServiceSpec:
    model = ModelSpec(type="embedding", model_name=str(folder), device="cpu")
    return echo("").model_copy(update={"model": model})


def changed(site: Site, **model: object) -> ServiceSpec:
    """The site's service with another model, published."""
    spec = site.spec.model_copy(update={"model": site.spec.model.model_copy(update=model)})
    Registry(site.connection).push([spec], replace=True)
    return spec


def test_a_worker_with_other_weights_is_refused_and_the_first_goes_on(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    site = opened(echo("sleep:0.001"))

    with supervising(site.url, Plan(site.spec, 1)), site.ledger() as ledger:
        site.await_workers(1)
        workers = site.watch.live()
        other = changed(site, model_name="sleep:0.002")
        status, reason = lone_worker(site)
        with supervising(site.url, Plan(other, 1)) as second:
            eventually(lambda: not second.is_alive(), within_s=30.0)
        ledger.wait_for(ledger.send([["a"]]))
        assert site.watch.live() == workers

    assert status == EXIT_PERMANENT == 78
    assert "runs echo:sleep:0.001, this worker has echo:sleep:0.002" in reason
    assert "--replace" in reason
    assert second.refused
    assert said(caplog, reason, logging.ERROR)() == [f"service {site.spec.name}: {reason}"]


def test_once_all_workers_have_stopped_a_push_lets_other_weights_in(opened: Open) -> None:
    site = opened(echo("sleep:0.001"))
    with supervising(site.url, Plan(site.spec, 1)):
        site.await_workers(1)
        other = changed(site, model_name="sleep:0.002")
    assert lone_worker(site)[0] == EXIT_PERMANENT

    changed(site, model_name="sleep:0.002")

    with supervising(site.url, Plan(other, 1)), site.ledger() as ledger:
        site.await_workers(1)
        ledger.wait_for(ledger.send([["a"]]))
        (worker,) = site.watch.workers().values()
        assert worker[b"fingerprint"] == b"echo:sleep:0.002"


class First(NamedTuple):
    """A service of `path`, a link to the tiny model, and its first worker, which is live."""

    site: Site
    path: Path


@pytest.fixture(scope="module")
def started(url: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[First]:
    home = tmp_path_factory.mktemp("first")
    path = home / "model"
    path.symlink_to(tiny_model)
    with site_of(url, of_folder(path), home / "site") as site, supervising(url, Plan(site.spec, 1)):
        site.await_workers(1)
        yield First(site, path)


@pytest.fixture
def first(started: First, tiny_model: Path) -> Iterator[First]:
    """The service, and after the test again as it was."""
    field, answer = answer_of(started.site)
    yield started
    lead(started.path, tiny_model)
    store(started.site, field, answer)


def answer_of(site: Site) -> tuple[str, Mapping[int, float]]:
    """The first worker's answer to a fixed text, and the field of the service's hash that has it."""
    fingerprint = site.connection.client.hget(site.keys.spec(), "fingerprint")
    assert isinstance(fingerprint, bytes)
    field = answer_field(fingerprint.decode())
    stored = site.connection.client.hget(site.keys.spec(), field)
    assert isinstance(stored, bytes)
    return field, decode_answer(stored.decode())


def store(site: Site, field: str, answer: Mapping[int, float], times: float = 1.0) -> None:
    """Change the first worker's answer to `times` as much."""
    changed = {place: times * number for place, number in answer.items()}
    site.connection.client.hset(site.keys.spec(), field, encode_answer(changed))


def test_hosts_agree_by_what_the_files_hold_not_by_their_names(first: First, tiny_model: Path, tmp_path: Path) -> None:
    """Two hosts, on which the same path leads to different folders. They may compute a little differently."""
    site, path = first
    field, answer = answer_of(site)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)

    store(site, field, answer, 1.0005)
    lead(path, copy)
    with supervising(site.url, Plan(site.spec, 1)):
        site.await_workers(2)


@pytest.mark.skipif(not LONG, reason="MILLSTREAM_LONG is not 1")
def test_a_worker_of_a_trained_copy_is_refused(first: First, tiny_model: Path, tmp_path: Path) -> None:
    site, path = first
    trained = Path(shutil.copytree(tiny_model, tmp_path / "trained"))
    train_a_little(trained / "model.safetensors")

    lead(path, trained)
    status, reason = lone_worker(site)

    assert status == EXIT_PERMANENT
    assert " float32 16, this worker has " in reason


def lead(path: Path, folder: Path) -> None:
    path.unlink()
    path.symlink_to(folder)


def train_a_little(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    next(iter(tensors.values()))[0] += 0.001
    save_file(tensors, file, {"format": "pt"})


def test_a_worker_that_ends_over_other_weights_costs_what_it_held_no_attempt(opened: Open) -> None:
    site = opened(echo("sleep:0.5", batch_size=2))

    with supervising(site.url, Plan(site.spec, 1)) as supervision, site.ledger() as ledger:
        site.await_workers(1)
        ids = ledger.send([[f"text {number}"] for number in range(40)])
        eventually(lambda: ledger.answered > 2)
        site.connection.client.hset(site.keys.spec(), "fingerprint", "others")
        site.connection.client.hincrby(site.keys.spec(), "revision", 1)
        eventually(lambda: not supervision.is_alive(), within_s=60.0)

        answered = sum(1 for job in ids if job in ledger.replies)
        assert 2 < answered < len(ids)
        assert (site.watch.attempts(), site.watch.dead_letters()) == (0, [])
        assert answered + site.watch.depth() == len(ids)


def test_a_worker_of_the_same_fingerprint_with_another_answer_is_refused(first: First) -> None:
    """Its weights were lost on the way from the file: what it holds is as if the first worker had held other ones."""
    site, _ = first
    field, answer = answer_of(site)

    store(site, field, answer, -1.0)
    status, reason = lone_worker(site)

    assert status == EXIT_PERMANENT
    assert "its answer to a fixed text differs from the first worker's by 2 of that answer's length" in reason


@pytest.mark.parametrize("damage", ["a pointer", "a lost tensor"] if LONG else ["a lost tensor"])
def test_a_damaged_folder_ends_its_worker_with_the_name_of_the_file_or_tensor(
    opened: Open, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    if damage == "a pointer":
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    else:
        tensors = load_file(folder / "model.safetensors")
        del tensors["embeddings.LayerNorm.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    site = opened(of_folder(folder))

    with supervising(site.url, Plan(site.spec, 1)) as supervision:
        eventually(lambda: not supervision.is_alive(), within_s=START_S)

    assert supervision.refused
    assert supervision.supervisor.restarts == 0
    assert list(supervision.supervisor.refusals()) == [site.spec.name]
    name = "model.safetensors" if damage == "a pointer" else "embeddings.LayerNorm.weight"
    assert len(said(caplog, name, logging.ERROR)()) == 1
