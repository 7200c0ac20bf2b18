"""User code as a model: what it may be, how it is found, and what its mistakes cost."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millstream.broker.config.load import ModelSpec, Runtime, ServiceSpec
from millstream.broker.contract.errors import InvalidRequest, ModelFailed, ModelUnavailable
from millstream.worker import models
from millstream.worker.engines.one_shot import run_rows
from millstream.worker.models.base import Laps, Prepared
from millstream.worker.models.custom import CustomModel, Hooks, name_of
from millstream.worker.shutdown import Ended
from millstream.worker.supervision.plan import preflight

Write = Callable[[str], str]


def model_of(handler: object, hooks: Hooks | None = None) -> CustomModel:
    return CustomModel(handler, "here:handler", Runtime(batch_size=64), "cpu", hooks)


def prepared(model: CustomModel, *payloads: Any) -> list[Prepared]:
    rows = model.prepare(payloads, {})
    assert all(isinstance(row, Prepared) for row in rows)
    return [row for row in rows if isinstance(row, Prepared)]


def answers(handler: object, *payloads: Any) -> list[Any]:
    model = model_of(handler)
    return run_rows(model, prepared(model, *payloads))


# -- what a handler may be -----------------------------------------------------------------------------------------


class Scale:
    """Everything a handler may have."""

    def __init__(self) -> None:
        self.device: str | None = ""
        self.torn_down = False

    def set_up(self, device: str | None) -> None:
        self.device = device

    def __call__(self, payloads: list[Any]) -> list[Any]:
        return [each * 2 for each in payloads]

    def cost(self, payload: Any) -> int:
        return len(payload)

    def check(self, payload: Any) -> None:
        if not payload:
            raise ValueError("an empty payload")

    def tear_down(self) -> None:
        self.torn_down = True


def test_a_function_answers() -> None:
    assert answers(lambda payloads: [each + 1 for each in payloads], 1, 2) == [2, 3]


def test_a_class_is_constructed_and_an_object_taken_as_it_is_with_the_methods_beside_it() -> None:
    for handler in (Scale, Scale()):
        model = model_of(handler)
        good, bad = model.prepare(["abc", ""], {})

        assert isinstance(good, Prepared)
        assert good.tokens == 3
        assert run_rows(model, [good]) == ["abcabc"]
        assert isinstance(bad, InvalidRequest)
        assert bad.message == "an empty payload"


def test_set_up_gets_the_device_and_tear_down_ends_it() -> None:
    scale = Scale()

    model = model_of(scale)
    assert (scale.device, scale.torn_down) == ("cpu", False)
    model.close()

    assert scale.torn_down


def test_hooks_that_are_given_go_before_methods() -> None:
    model = model_of(Scale(), Hooks(cost=lambda payload: 7))

    assert prepared(model, "abc")[0].tokens == 7


def test_a_tear_down_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("stuck")

    model_of(list.copy, Hooks(tear_down=fail)).close()

    assert "tear_down failed" in caplog.text


async def asynchronous(payloads: list[Any]) -> list[Any]:
    return payloads


class NoCall:
    pass


class AsynchronousCall:
    async def __call__(self, payloads: list[Any]) -> list[Any]:
        return payloads


@pytest.mark.parametrize("handler", [5, "text", NoCall, NoCall(), asynchronous, AsynchronousCall])
def test_what_cannot_be_called_is_no_handler(handler: object) -> None:
    with pytest.raises(ModelUnavailable, match=r"'here:handler' is (no function|async)"):
        model_of(handler)


def test_a_payload_without_a_cost_counts_an_equal_share_of_a_batch() -> None:
    assert Runtime(batch_size=64).row_tokens == 32
    assert Runtime(batch_size=64, max_batch_tokens="auto").row_tokens == 32
    assert Runtime(batch_size=10_000).row_tokens == 1
    model = model_of(list.copy)
    assert prepared(model, "a" * 1_000)[0].tokens == 32
    model.adapt(Runtime(batch_size=128))
    assert prepared(model, "a" * 1_000)[0].tokens == 16


@pytest.mark.parametrize("cost", [0, -1, True, 1.5, "3", None])
def test_a_cost_that_is_no_number_of_tokens_is_its_payloads_failure(cost: Any) -> None:
    model = model_of(list.copy, Hooks(cost=lambda payload: cost if payload == "bad" else 1))

    good, bad = model.prepare(["good", "bad"], {})

    assert isinstance(good, Prepared)
    assert isinstance(bad, ModelFailed)


def picky(payload: Any) -> int:
    return len(payload["text"])


@pytest.mark.parametrize(("hook", "hooks"), [("cost", Hooks(cost=picky)), ("check", Hooks(check=picky))])
def test_a_hook_that_raises_fails_its_payload_alone(hook: str, hooks: Hooks) -> None:
    model = model_of(list.copy, hooks)

    good, bad = model.prepare([{"text": "a"}, {}], {})

    assert isinstance(good, Prepared)
    assert isinstance(bad, ModelFailed)
    assert bad.message == f"{hook}: KeyError: 'text'"


@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit(), KeyboardInterrupt()])
@pytest.mark.parametrize("which", ["check", "cost"])
def test_a_hook_that_would_end_the_process_fails_its_payload_alone(which: str, error: BaseException) -> None:
    def leave(payload: Any) -> int:
        if payload == "bad":
            raise error
        return 1

    model = model_of(list.copy, Hooks(**{which: leave}))  # type: ignore[arg-type]

    assert [type(row) for row in model.prepare(["a", "bad", "b"], {})] == [Prepared, ModelFailed, Prepared]


@pytest.mark.parametrize("error", [SystemExit("no"), KeyboardInterrupt("no"), RuntimeError("no")])
def test_whatever_a_set_up_raises_says_that_the_model_cannot_start(error: BaseException) -> None:
    def set_up(device: str | None) -> None:
        raise error

    with pytest.raises(ModelUnavailable, match="cannot be set up"):
        model_of(list.copy, Hooks(set_up=set_up))


def test_a_signal_that_ends_the_process_passes_a_set_up() -> None:
    def set_up(device: str | None) -> None:
        raise Ended

    with pytest.raises(Ended):
        model_of(list.copy, Hooks(set_up=set_up))


def test_each_payload_has_the_whole_stall_timeout_for_its_hooks() -> None:
    laps: list[str] = []
    model = model_of(list.copy, Hooks(check=lambda payload: laps.append(str(payload))))
    assert isinstance(model, Laps)
    model.lap_by(lambda: laps.append("lap"))

    model.prepare(["a", "b"], {})

    assert laps == ["lap", "a", "lap", "b"]


def test_options_are_refused_row_by_row() -> None:
    assert [type(row) for row in model_of(list.copy).prepare(["a", "b"], {"x": 1})] == [InvalidRequest] * 2


# -- what it may give ----------------------------------------------------------------------------------------------


def test_arrays_come_as_vectors_and_flat_ones_as_numbers() -> None:
    matrix = np.array([[1.0, 2.0], [3.0, 4.0]], np.float64)

    rows = answers(lambda payloads: matrix, "a", "b")
    assert [(row.dtype, row.tolist()) for row in rows] == [(np.float32, [1, 2]), (np.float32, [3, 4])]
    assert answers(lambda payloads: matrix[0], "a", "b") == [1.0, 2.0]
    assert answers(lambda payloads: [np.float32(0.5), np.int64(7)], "a", "b") == [0.5, 7]
    assert answers(lambda payloads: (np.arange(2), np.arange(2)), "a", "b")[1].tolist() == [0, 1]


def test_an_array_that_is_used_again_does_not_change_what_was_answered() -> None:
    buffer = np.zeros((1, 2), np.float32)

    def fill(payloads: list[Any]) -> Any:
        buffer[:] = payloads[0]
        return buffer

    model = model_of(fill)
    first, second = (run_rows(model, prepared(model, each))[0] for each in (1, 2))

    assert (np.asarray(first).tolist(), np.asarray(second).tolist()) == ([1, 1], [2, 2])


@pytest.mark.parametrize("answer", [None, 5, {"a": 1}, "ab", np.zeros((2, 2, 2)), np.array([None, None])])
def test_an_answer_that_is_no_list_of_results_fails(answer: object) -> None:
    assert [type(each) for each in answers(lambda payloads: answer, "a", "b")] == [ModelFailed] * 2


def test_a_list_may_hold_errors_of_its_rows() -> None:
    got = answers(lambda payloads: [1, KeyError("stone"), InvalidRequest("no"), np.zeros((2, 2))], *"abcd")

    assert [type(each) for each in got] == [int, ModelFailed, InvalidRequest, ModelFailed]


UNSENDABLE = {
    "nan": float("nan"),
    "infinity": float("inf"),
    "nan within": {"a": [{"b": float("nan")}]},
    "set": {1, 2},
    "object": object(),
    "half a character": "\ud800",
    "half a character within": {"a": "\udfff"},
    "huge number": 10**5_000,
    "key": {(1, 2): 3},
}


@pytest.mark.parametrize("bad", UNSENDABLE.values(), ids=UNSENDABLE)
def test_a_result_that_json_cannot_carry_fails_alone(bad: object) -> None:
    got = answers(lambda payloads: [bad if each == "bad" else each for each in payloads], "a", "bad", "b")

    assert [type(each) for each in got] == [str, ModelFailed, str]


def test_a_result_nested_too_deep_fails_alone() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]

    assert [type(each) for each in answers(lambda payloads: [deep, 1], "a", "b")] == [ModelFailed, int]


def test_a_function_that_changes_its_payloads_is_given_whole_ones_when_it_is_called_again() -> None:
    def pop(payloads: list[Any]) -> list[Any]:
        taken = [each.pop("n") for each in payloads]
        return [10 // each for each in taken]

    got = answers(pop, *({"n": n} for n in range(8)))

    assert isinstance(got[0], ModelFailed)
    assert got[1:] == [10 // n for n in range(1, 8)]


@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit(), KeyboardInterrupt()])
def test_what_would_end_the_process_is_a_payloads_failure(error: BaseException) -> None:
    def leave(payloads: list[Any]) -> list[Any]:
        if "bad" in payloads:
            raise error
        return payloads

    assert [type(each) for each in answers(leave, "a", "bad", "b")] == [str, ModelFailed, str]


class Unreadable(Exception):
    def __str__(self) -> str:
        raise SystemExit("mine")


@pytest.mark.parametrize("error", [Unreadable(), GeneratorExit("no"), asyncio.CancelledError("no")])
def test_any_error_that_is_returned_is_its_payloads_failure(error: BaseException) -> None:
    got = answers(lambda payloads: [error if each == "bad" else each for each in payloads], "a", "bad")

    assert got[0] == "a"
    assert isinstance(got[1], ModelFailed)
    assert type(error).__name__ in got[1].message


def test_an_error_whose_message_raises_is_its_payloads_failure() -> None:
    def fail(payloads: list[Any]) -> list[Any]:
        if "bad" in payloads:
            raise Unreadable
        return payloads

    assert [type(each) for each in answers(fail, "a", "bad")] == [str, ModelFailed]


@pytest.mark.parametrize("error", [SystemExit("no"), KeyboardInterrupt("no"), GeneratorExit("no"), RuntimeError("no")])
def test_whatever_a_tear_down_raises_is_logged(caplog: pytest.LogCaptureFixture, error: BaseException) -> None:
    def tear_down() -> None:
        raise error

    model = model_of(list.copy, Hooks(tear_down=tear_down))
    model.close()

    assert "tear_down failed" in caplog.text


def test_a_signal_that_ends_the_process_passes_a_tear_down() -> None:
    def tear_down() -> None:
        raise Ended

    with pytest.raises(Ended):
        model_of(list.copy, Hooks(tear_down=tear_down)).close()


# -- how it is found -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What loading a handler changes in its process is put back."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def write(tmp_path: Path, request: pytest.FixtureRequest) -> Write:
    """Writes a module, gives its name, and forgets it afterwards."""

    def written(text: str) -> str:
        name = f"own_{abs(hash((request.node.name, text)))}"
        (tmp_path / f"{name}.py").write_text(text)
        request.addfinalizer(lambda: sys.modules.pop(name, None))
        return name

    return written


def load(handler: str | None, folder: Path, threads: int = 1) -> models.Model:
    spec = ServiceSpec(name="mill", model=ModelSpec(type="custom", handler=handler), model_ref="m", runtime=Runtime())
    return models.load(spec, None, threads, str(folder))


def refusal(handler: str | None, folder: Path) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        load(handler, folder)
    return str(caught.value)


def test_a_handler_is_found_beside_the_configuration(write: Write, tmp_path: Path) -> None:
    name = write("class Inner:\n    @staticmethod\n    def run(payloads):\n        return payloads[::-1]\n")

    model = load(f"{name}:Inner.run", tmp_path)

    assert model.fingerprint == f"{name}:Inner.run"
    assert run_rows(model, [Prepared(1, "a"), Prepared(1, "b")]) == ["b", "a"]


@pytest.mark.parametrize(("before", "after"), [(None, "3"), ("5", "5")])
def test_libraries_get_a_workers_share_of_the_cores(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    if before is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", before)
    name = write("import os\nTHREADS = os.environ['OMP_NUM_THREADS']\ndef run(payloads):\n    return [THREADS]\n")

    model = load(f"{name}:run", tmp_path, threads=3)

    assert run_rows(model, [Prepared(1, "a")]) == [after]


def test_without_a_handler_of_its_own_a_worker_is_refused(tmp_path: Path) -> None:
    assert "this worker's config.yaml names no handler" in refusal(None, tmp_path)
    with pytest.raises(ModelUnavailable, match="names no handler"):
        preflight([ServiceSpec(name="mill", model=ModelSpec(type="custom"), model_ref="m", runtime=Runtime())])


@pytest.mark.parametrize(
    ("text", "attribute", "said"),
    [
        ("", "run", "there is no 'run' in "),
        ("class Run:\n    def __init__(self):\n        raise RuntimeError('no weights')\n", "Run", "own.py:3"),
        ("run = 5\n", "run", "is no function but int"),
        ("import no_such_package\n", "run", "No module named 'no_such_package' (own.py:1)"),
        ("def run(:\n", "run", "SyntaxError"),
        ("def load():\n    return {}['weights']\nload()\n", "run", "KeyError: 'weights' (own.py:2)"),
        ("import json\njson.loads('no')\n", "run", "(own.py:2)"),
        ("raise SystemExit('no')\n", "run", "SystemExit: no (own.py:1)"),
        ("raise KeyboardInterrupt('no')\n", "run", "KeyboardInterrupt: no (own.py:1)"),
        ("import asyncio\nraise asyncio.CancelledError('no')\n", "run", "CancelledError: no (own.py:2)"),
        (
            "class Run:\n    def __call__(self, payloads): ...\n    def set_up(self, device):\n        1 / 0\n",
            "Run",
            "own.py:4",
        ),
    ],
)
def test_what_is_wrong_with_a_handler_is_said_with_its_line(
    write: Write, tmp_path: Path, text: str, attribute: str, said: str
) -> None:
    name = write(text)

    message = refusal(f"{name}:{attribute}", tmp_path).replace(f"{tmp_path}/{name}", "own")

    assert said in message
    assert len(message.splitlines()) == 1


def test_a_module_that_is_not_there_is_named_with_the_folder_that_was_searched(tmp_path: Path) -> None:
    message = refusal("no_such_module.inner:run", tmp_path)

    assert "there is no module 'no_such_module'" in message
    assert str(tmp_path) in message


def test_a_users_files_shadow_neither_the_library_nor_ours(tmp_path: Path) -> None:
    for name in ("random", "colorsys", "client", "broker", "worker", "numpy", "millstream"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('shadowed')\n")
    # One module that is imported already, and one that is not.
    (tmp_path / "own.py").write_text("import colorsys, random\n\n\ndef run(payloads):\n    return [random.__file__]\n")
    program = (
        "from millstream.worker.models.custom import load_handler; import sys; "
        "print(sys.argv[1] in load_handler('own:run', sys.argv[1])([0])[0])"
    )

    done = subprocess.run(
        [sys.executable, "-P", "-c", program, tmp_path], check=False, capture_output=True, text=True, cwd=tmp_path
    )

    assert (done.stdout, done.stderr) == ("False\n", "")


def test_names_of_handlers_are_written_as_in_a_configuration() -> None:
    assert name_of(Scale) == name_of(Scale()) == f"{__name__}:Scale"
    assert name_of(name_of) == "millstream.worker.models.custom:name_of"
