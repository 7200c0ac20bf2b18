"""docs/protocol.md says of the wire what the code does."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from millstream.broker.config.canary import CanaryPlan
from millstream.broker.config.route import RouteSpec
from millstream.broker.config.spec import Runtime
from millstream.broker.contract import codec, entry_codec, errors
from millstream.broker.contract.codec import encode_reply
from millstream.broker.contract.entry_codec import FIELDS, OPTIONAL
from millstream.broker.contract.errors import ModelFailed
from millstream.broker.contract.job import Reply
from millstream.broker.contract.keys import ServiceKeys, routes_key, services_key
from millstream.broker.contract.stages import Stages
from millstream.broker.queue import substitutes
from millstream.broker.queue.admission import limit_fields
from millstream.broker.queue.scripts import NAMES, Name
from millstream.broker.roles import _SCRIPTS

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


def table(heading: str) -> list[Sequence[str]]:
    """The rows of the first table under `heading`, without its head."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\|(.*)\|$", section, re.MULTILINE)[2:]
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def test_every_field_of_an_entry_is_there_in_its_order_and_says_whether_it_may_be_left_out() -> None:
    rows = table("Entry")

    assert [name.strip("`") for name, *_ in rows] == list(FIELDS)
    assert {name.strip("`") for name, _, optional in rows if optional} == OPTIONAL


def test_every_field_of_a_replys_head_is_there_in_its_order() -> None:
    error = ModelFailed("no")
    full = Reply(
        np.ones((1, 1), np.float16), [1], {1: error}, error, 1, (0,), {"queue": 1.0}, "w", "v2", Stages("worker")
    )

    head = json.loads(encode_reply(full).partition(b"\n")[0])

    assert [name.strip("`") for name, _ in table("Reply")] == list(head)


def test_every_key_is_there() -> None:
    named = set(re.findall(r"`([^`]+)`", "".join(row[0] for row in table("Keys"))))
    keys = ServiceKeys("service")
    samples = {
        "client": "<client>",
        "job_id": "<job id>",
        "call": "<call>",
        "digest": "<digest>",
        "consumer": "<consumer>",
        "priority": "<priority>",
    }
    made = {services_key(), routes_key(), "ms:upstream:<url>", *keys.streams(), keys.bucket("<tenant>")}
    for name, method in inspect.getmembers(keys, inspect.ismethod):
        if name.startswith("_") or name in ("stream", "streams"):
            continue
        wanted = [each for each in inspect.signature(method).parameters.values() if each.default is each.empty]
        made.add(method(*(samples[each.name] for each in wanted)))

    assert named == made


def test_every_script_is_there_with_who_may_call_it() -> None:
    rows = {verb.strip("`"): who for verb, who, _ in table("Scripts")}

    assert set(rows) == set(get_args(Name))
    assert rows == _SCRIPTS


@pytest.mark.parametrize(
    "said",
    [
        f"at most {entry_codec.MAX_ROWS:,} ",
        f"at most {entry_codec.MAX_BODY >> 20} MiB, {codec.MAX_DEPTH} deep",
        f"at most {entry_codec.MAX_UNKNOWN} fields they do not know, of {entry_codec.MAX_UNKNOWN_BYTES:,} bytes",
        f"at most {substitutes.MAX_REPLY_BYTES >> 20} MiB: a larger one",
        f"leaves {substitutes.UNREAD_BYTES >> 20} MiB unread",
    ],
)
def test_the_bounds_are_those_of_the_code(said: str) -> None:
    assert said in " ".join(TEXT.replace("|", "").split()) + " "


def test_every_error_it_names_exists() -> None:
    codes = {cls.code for _, cls in inspect.getmembers(errors, inspect.isclass) if hasattr(cls, "code")}

    fields = {*RouteSpec.model_fields, *CanaryPlan.model_fields, *FIELDS, *NAMES, *limit_fields(Runtime())}
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", TEXT)) - {*fields, "retry_after", "in_flight"}
    assert named <= codes
    assert {"reply_too_large", "reader_too_slow", "unsupported_version", "mixed_models"} <= named
