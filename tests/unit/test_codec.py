"""What is encoded is decoded again; what nobody encoded is Malformed, and never another error."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from millstream.broker.contract.codec import (
    MAX_DEPTH,
    decode_inputs,
    decode_reply,
    encode_inputs,
    encode_reply,
    origin_of,
)
from millstream.broker.contract.entry_codec import (
    FIELDS,
    MAX_BODY,
    MAX_MS,
    MAX_ROWS,
    MAX_TOKENS,
    MAX_UNKNOWN,
    MAX_UNKNOWN_BYTES,
    decode_entry,
    encode_entry,
    salvage,
)
from millstream.broker.contract.errors import (
    DeadlineExceeded,
    InputTooLong,
    Malformed,
    MillstreamError,
    ModelFailed,
    NewerVersion,
    QueueFull,
    to_wire,
)
from millstream.broker.contract.job import Job, Json, Reply
from millstream.broker.contract.stages import Stages

ids = st.text("0123456789abcdef", min_size=32, max_size=32)
names = st.from_regex(r"[A-Za-z0-9_.-]{0,64}", fullmatch=True)
times = st.integers(0, MAX_MS)
jobs = st.builds(
    Job,
    id=ids,
    at=times,
    op=names,
    rows=st.integers(0, MAX_ROWS),
    tokens=st.integers(0, MAX_TOKENS),
    deadline=times,
    queue_by=times,
    client=names,
    tenant=names,
    trace=st.from_regex(r"[\x20-\x7e]{0,128}", fullmatch=True),
    call=st.from_regex(r"([0-9a-f]{32})?", fullmatch=True),
    body=st.binary(max_size=200),
)
texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    scalars | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=10
)
errors = st.builds(ModelFailed, texts, hint=texts) | st.builds(
    DeadlineExceeded, texts, phase=st.sampled_from(["queue", "total"]), retry_after=st.floats(0, 1e6) | st.none()
)
shapes = arrays.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=8)
vectors = (
    arrays.arrays(np.float32, shapes, elements=st.floats(width=32, allow_nan=False))
    | arrays.arrays(np.float16, shapes, elements=st.floats(width=16, allow_nan=False))
    | arrays.arrays(np.uint8, shapes)
)
stages = st.builds(
    Stages,
    worker=st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    attempts=st.integers(0, 10).map(lambda halves: halves / 2),
    **dict.fromkeys(Stages._fields[2:], times),
)
some_values = st.none() | st.lists(json_values, max_size=5)
replies = st.builds(
    Reply,
    vectors=st.none() | vectors,
    values=st.none(),
    errors=st.dictionaries(st.integers(0, 100), errors, max_size=3),
    error=st.none() | errors,
    tokens=st.integers(0, 2**40),
    truncated=st.lists(st.integers(0, 100), max_size=5).map(tuple),
    timings=st.dictionaries(texts, st.integers(0, 10**6).map(float), max_size=3),
    fingerprint=texts,
    version=texts,
    stages=st.none() | stages,
).flatmap(
    lambda reply: st.just(reply) if reply.vectors is not None else some_values.map(lambda v: reply._replace(values=v))
)


def flat(job: Job) -> list[bytes]:
    """An encoded entry as the server gives it back."""
    return [part if isinstance(part, bytes) else str(part).encode() for part in encode_entry(job)]


JOB = Job("0123456789abcdef" * 2, 5, "embed", 2, 9, 8, 7, "client", "tenant", "trace", b"{}", "c" * 32)


@given(jobs)
def test_an_entry_comes_back_as_it_was(job: Job) -> None:
    assert decode_entry(flat(job)) == job


def test_what_says_nothing_is_left_out() -> None:
    bare = JOB._replace(deadline=0, queue_by=0, client="", tenant="", trace="", call="")

    assert flat(bare)[0::2] == [b"v", b"id", b"at", b"op", b"rows", b"tokens", b"body"]
    assert [name.decode() for name in flat(JOB)[0::2]] == list(FIELDS)


@given(jobs)
def test_an_entry_with_empty_fields_as_older_clients_write_it_is_read(job: Job) -> None:
    written = dict(zip(flat(job)[0::2], flat(job)[1::2], strict=True))
    absent = {"deadline": b"0", "queue_by": b"0"}
    older = [(name.encode(), written.get(name.encode(), absent.get(name, b""))) for name in FIELDS]

    assert decode_entry([part for pair in older for part in pair]) == job


@given(st.lists(json_values, min_size=1), st.dictionaries(texts, json_values, max_size=3))
def test_inputs_and_options_come_back_as_they_were(inputs: list[Json], options: dict[str, Json]) -> None:
    assert decode_inputs(encode_inputs(inputs, options), len(inputs)) == (inputs, options)


def test_a_body_shows_a_text_as_it_is() -> None:
    assert encode_inputs(["水车"], {}).decode() == '{"inputs":["水车"]}'


@pytest.mark.parametrize("unsendable", ["\ud800", float("nan"), object()])
def test_what_json_cannot_carry_is_refused_before_it_is_sent(unsendable: Json) -> None:
    with pytest.raises((ValueError, TypeError)):
        encode_inputs([unsendable], {})


def nested(levels: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    """A body of so many levels in all."""
    inner = levels - 2
    return b'{"inputs":[' + opening * inner + b"1" * (closing != b"]") + closing * inner + b"]}"


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_a_body_is_nested_so_deep_and_no_deeper(opening: bytes, closing: bytes) -> None:
    inputs, _ = decode_inputs(nested(MAX_DEPTH, opening, closing), 1)
    assert inputs

    for levels in (MAX_DEPTH + 1, 900, 100_000):
        with pytest.raises(Malformed, match=f"more than {MAX_DEPTH} deep"):
            decode_inputs(nested(levels, opening, closing), 1)


def test_options_that_no_worker_would_take_are_not_sent() -> None:
    deep: Json = "bottom"
    for _ in range(MAX_DEPTH):
        deep = [deep]

    with pytest.raises(ValueError, match="deep"):
        encode_inputs(["a"], {"option": deep})


@pytest.mark.parametrize("text", ["[" * 1000, '"[' * 1000, "\\" * 99 + '"{[', '{"' * 500 + "\\"])
def test_brackets_in_a_text_are_no_depth(text: str) -> None:
    assert decode_inputs(encode_inputs([text, text], {}), 2) == ([text, text], {})


def test_a_body_may_be_as_wide_as_it_likes() -> None:
    rows: list[Json] = [[[]], {"a": []}] * 1000

    assert decode_inputs(encode_inputs(rows, {}), 2000) == (rows, {})


jsons = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(alphabet='[]{}",\\a', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=80,
)


@given(st.lists(jsons, min_size=20, max_size=40))
def test_no_shallow_body_is_taken_for_a_deep_one(inputs: list[Json]) -> None:
    assert decode_inputs(encode_inputs(inputs, {}), len(inputs)) == (inputs, {})


@given(replies)
def test_a_reply_comes_back_as_it_was(reply: Reply) -> None:
    again = decode_reply(encode_reply(reply))

    assert (again.vectors is None) == (reply.vectors is None)
    if reply.vectors is not None and again.vectors is not None:
        np.testing.assert_array_equal(again.vectors, reply.vectors)
        assert again.vectors.dtype == reply.vectors.dtype
        assert not again.vectors.flags.writeable
    assert (again.values, again.tokens, again.truncated) == (reply.values, reply.tokens, reply.truncated)
    assert (again.fingerprint, again.version) == (reply.fingerprint, reply.version)
    assert again.stages == reply.stages
    assert again.timings == reply.timings
    assert {row: told(error) for row, error in again.errors.items()} == {
        row: told(error) for row, error in reply.errors.items()
    }
    assert told(again.error) == told(reply.error)


def test_only_a_reply_of_other_vectors_than_float32_names_their_type() -> None:
    plain = encode_reply(Reply(vectors=np.array([[1.5, 2.0]], np.float32)))
    half = encode_reply(Reply(vectors=np.array([[1.5, 2.0]], np.float16)))

    assert plain == b'{"v":1,"tokens":0,"shape":[1,2]}\n' + np.array([1.5, 2.0], "<f4").tobytes()
    assert half == b'{"v":1,"tokens":0,"shape":[1,2],"dtype":"float16"}\n' + np.array([1.5, 2.0], "<f2").tobytes()


def told(error: MillstreamError | None) -> object:
    return error and (type(error), to_wire(error))


def test_a_newline_in_a_value_does_not_end_the_head() -> None:
    vectors = np.frombuffer(b"\n\n\n\n" * 4, dtype="<f4").reshape(2, 2)

    again = decode_reply(encode_reply(Reply(vectors=vectors, error=QueueFull("two\nlines"))))

    assert again.vectors is not None
    assert again.vectors.tobytes() == b"\n\n\n\n" * 4
    assert str(again.error) == "two\nlines"


# -- entries that nobody of ours wrote -----------------------------------------------------------------------------

BAD_NUMBERS = [b"", b"-1", b"1.0", b"1e3", b" 1", b"1 ", b"nan", b"inf", b"0x10", b"1_0", b"9" * 400, b"\xd9\xa1"]
BAD_VALUES = {
    "v": [b"", b"0", b"2", b"1 ", b"02", b"2" * 400, b"x" * 5000],
    "id": [b"", b"0" * 31, b"0" * 33, b"g" * 32, b"A" * 32, b"0" * 32 + b"\n", b"\xff" * 32, b"../" + b"0" * 29],
    "at": [*BAD_NUMBERS, str(MAX_MS + 1).encode()],
    "rows": [*BAD_NUMBERS, str(MAX_ROWS + 1).encode()],
    "tokens": [*BAD_NUMBERS, str(MAX_TOKENS + 1).encode()],
    "deadline": [*BAD_NUMBERS, str(MAX_MS + 1).encode()],
    "queue_by": [*BAD_NUMBERS, str(MAX_MS + 1).encode()],
    "op": [b"a b", b"\xff", b"x" * 65, b"a\n", b"{x}"],
    "client": [b"a:b", b"\xff\xfe", b"x" * 65, b"a\n", b"*"],
    "tenant": [b"a b", b"\xff", b"x" * 65, b"a\n"],
    "trace": [b"\x00", b"\x7f", b"\xc3\xa9", b"x" * 129, b"a\n"],
    "call": [b"0" * 31, b"0" * 33, b"g" * 32, b"A" * 32, b"0" * 32 + b"\n", b"../" + b"0" * 29],
    "body": [b"x" * (MAX_BODY + 1)],
}
BAD = [
    pytest.param(name, value, id=f"{name}={value[:12]!r}") for name, values in BAD_VALUES.items() for value in values
]


def test_every_field_has_its_bad_values() -> None:
    assert set(BAD_VALUES) == set(FIELDS)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_field_makes_the_entry_malformed(name: str, value: bytes) -> None:
    fields = flat(JOB)
    fields[2 * FIELDS.index(name) + 1] = value

    with pytest.raises(Malformed):
        decode_entry(fields)


@pytest.mark.parametrize(
    "changed",
    [
        lambda fields: [],
        lambda fields: fields[2:],
        lambda fields: fields[:-1],
        lambda fields: [*fields, b"more"],
        lambda fields: [*fields, *fields[-2:]],
        lambda fields: [*fields[:2], *fields],
        lambda fields: fields[2:4] + fields[:2] + fields[4:],
        lambda fields: [b"\xff", *fields[1:]],
        lambda fields: [*fields[:6], b"\0".join(fields[6:10]), *fields[10:]],
        lambda fields: [*fields[:4], b"\0".join(fields[4:7]), *fields[7:]],
    ],
)
def test_missing_more_or_reordered_fields_make_the_entry_malformed(
    changed: Callable[[list[bytes]], list[bytes]],
) -> None:
    with pytest.raises(Malformed):
        decode_entry(changed(flat(JOB)))


@given(st.lists(st.binary(max_size=40), max_size=40))
def test_no_fields_raise_anything_but_malformed(fields: list[bytes]) -> None:
    assume(fields[0::2] != [name.encode() for name in FIELDS])

    with pytest.raises(Malformed):
        decode_entry(fields)
    assert salvage(fields) == ("", "", "")


@given(st.sampled_from(range(len(FIELDS))), st.binary(max_size=200))
def test_no_value_raises_anything_but_malformed(field: int, value: bytes) -> None:
    fields = flat(JOB)
    fields[2 * field + 1] = value

    try:
        decode_entry(fields)
    except Malformed:
        return


# -- entries of newer clients --------------------------------------------------------------------------------------

new_names = st.from_regex(r"[a-z][a-z0-9_]{0,31}", fullmatch=True).filter(lambda name: name not in FIELDS)
new_fields = st.lists(st.tuples(new_names.map(str.encode), st.binary(max_size=200)), max_size=MAX_UNKNOWN)


@given(jobs, new_fields, st.data())
def test_fields_that_nobody_knows_yet_are_passed_over_wherever_they_stand(
    job: Job, added: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    written = flat(job)
    pairs = list(zip(written[0::2], written[1::2], strict=True))
    for new in added:
        pairs.insert(data.draw(st.integers(1, len(pairs))), new)

    assert decode_entry([part for pair in pairs for part in pair]) == job


@pytest.mark.parametrize(
    "added",
    [
        [(f"new{at}".encode(), b"") for at in range(MAX_UNKNOWN + 1)],
        [(b"new", b"x" * MAX_UNKNOWN_BYTES)],
        [(b"New", b"")],
        [(b"x" * 33, b"")],
        [(b"\xff", b"")],
        [(b"", b"")],
    ],
    ids=["too many", "too large", "no word", "too long a name", "no text", "no name"],
)
def test_what_nobody_knows_is_bounded(added: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(Malformed) as malformed:
        decode_entry([*(part for pair in added for part in pair), *flat(JOB)])

    assert not isinstance(malformed.value, NewerVersion)


@given(st.lists(st.binary(max_size=40), max_size=40))
def test_an_entry_of_a_newer_version_is_told_apart_whatever_else_it_holds(rest: list[bytes]) -> None:
    with pytest.raises(NewerVersion, match="version 2"):
        decode_entry([b"v", b"2", *rest])


# -- bodies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b'{"inputs":["\xff"]}',
        b"[]",
        b"null",
        b'{"inputs":"ab"}',
        b'{"inputs":{"0":"a","1":"b"}}',
        b'{"inputs":["a","b"],"options":[]}',
        b'{"inputs":["a","b"],"options":null}',
        b'{"options":{}}',
        b'{"inputs":["a"]}',
        b'{"inputs":["a","b","c"]}',
        b'{"inputs":["a","b"]',
        b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"inputs":[' + b"9" * 5000 + b',"b"]}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_a_body_that_is_not_two_inputs_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        decode_inputs(body, 2)


def test_a_body_without_inputs_is_malformed_whatever_the_entry_says() -> None:
    with pytest.raises(Malformed):
        decode_inputs(b'{"inputs":[]}', 0)


@pytest.mark.parametrize("text", [b'"\\ud800"', b'["\\uDFFF"]', b'{"\\ud800":1}', b'"\xed\xa0\x80"'])
def test_a_lone_surrogate_in_a_body_is_malformed(text: bytes) -> None:
    with pytest.raises(Malformed):
        decode_inputs(b'{"inputs":[' + text + b"]}", 1)


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert decode_inputs(b'{"inputs":["\\ud83d\\ude00"]}', 1) == (["\U0001f600"], {})


# -- replies that nobody of ours wrote -----------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_malformed(blob: bytes) -> None:
    try:
        decode_reply(blob)
    except Malformed:
        return


HEADS = ["v", "error", "errors", "values", "truncated", "timings", "tokens", "shape", "dtype"]
wild = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.sampled_from(["code"]), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(HEADS), wild), st.binary(max_size=16))
def test_no_head_raises_anything_but_malformed_and_what_is_decoded_is_sound(head: dict[str, Json], data: bytes) -> None:
    try:
        reply = decode_reply(json.dumps(head).encode() + b"\n" + data)
    except Malformed:
        return

    assert reply.values is None or isinstance(reply.values, list)
    assert all(isinstance(row, int) and row >= 0 for row in [*reply.truncated, *reply.errors])
    assert all(isinstance(name, str) and isinstance(ms, int | float) for name, ms in reply.timings.items())
    assert reply.error is None or isinstance(reply.error, MillstreamError)
    assert reply.vectors is None or reply.vectors.ndim == 2


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"[]",
        b'{"tokens":1e999}',
        b'{"tokens":NaN}',
        b'{"shape":[1,3]}',
        b'{"shape":[-1,-1]}',
        b'{"shape":[99999999999999999999999,2]}',
        b'{"shape":[2]}',
        b'{"shape":"2"}',
        b'{"shape":[1,1],"dtype":"float64"}',
        b'{"shape":[1,1],"dtype":"object"}',
        b'{"shape":[1,2],"dtype":[]}',
        b'{"shape":[1,2],"dtype":"float16"}',
        b'{"error":5}',
        b'{"v":2}',
        b'{"shape":[-1,2]}',
        b'{"shape":[1,-1]}',
        b'{"shape":[1,2],"values":[1]}',
        b'{"values":[NaN]}',
        b'{"values":[{"score":-Infinity}]}',
        b'{"values":[1e999]}',
        b'{"values":[1E+400]}',
        b'{"values":[-1' + b"0" * 310 + b".0]}",
        b'{"tokens":-1}',
        b'{"tokens":"3"}',
        b'{"timings":{"queue":"nan"}}',
        b'{"fingerprint":5}',
        b'{"fingerprint":"' + b"x" * 513 + b'"}',
        b'{"version":[]}',
        b'{"errors":{"x":{}}}',
        b'{"errors":{"-1":{}}}',
        b'{"errors":[]}',
        b'{"values":{"0":1}}',
        b'{"truncated":["a"]}',
        b'{"truncated":[-1]}',
        b'{"truncated":5}',
        b'{"timings":{"queue":"soon"}}',
        b'{"timings":[]}',
        b"[" * 100_000,
    ],
    ids=lambda head: repr(head[:30]),
)
def test_a_reply_nobody_of_ours_wrote_is_malformed(head: bytes) -> None:
    with pytest.raises(Malformed):
        decode_reply(head + b"\n" + b"\0" * 8)


def test_an_error_says_to_wait_no_longer_than_anybody_can() -> None:
    for forged in (b"1" + b"0" * 400, b"-1", b"1e300", b'"soon"', b"true0"[:4]):
        error = decode_reply(b'{"error":{"code":"queue_full","retry_after":' + forged + b"}}").error
        assert isinstance(error, QueueFull)
        assert error.retry_after in (None, 1.0)


def test_a_number_that_only_looks_huge_is_a_value() -> None:
    values: list[Json] = [1e-300, 1e99, "e999", "0" * 400, 10**299]

    assert decode_reply(encode_reply(Reply(values=values))).values == values


@given(replies, st.dictionaries(st.from_regex(r"[a-z]{6,9}", fullmatch=True), json_values, max_size=3))
def test_what_a_newer_worker_adds_to_a_reply_is_passed_over(reply: Reply, added: dict[str, Json]) -> None:
    assume(not added.keys() & {*HEADS, "fingerprint", "version"})
    head, _, data = encode_reply(reply).partition(b"\n")
    newer = json.dumps({**json.loads(head), **added}).encode() + b"\n" + data

    again = decode_reply(newer)

    assert (again.values, again.tokens, again.fingerprint) == (reply.values, reply.tokens, reply.fingerprint)


def test_a_reply_names_what_made_it_in_its_own_words_or_in_those_of_its_worker() -> None:
    own = encode_reply(Reply(values=[1], fingerprint='we"ights', version="v2"))
    workers = encode_reply(Reply(values=[1]), origin_of('we"ights', "v2"))

    assert own == workers
    again, bare = decode_reply(own), decode_reply(encode_reply(Reply(values=[1])))
    assert (again.fingerprint, again.version) == ('we"ights', "v2")
    assert (bare.fingerprint, bare.version) == ("", "")
    assert origin_of("") == ""


@pytest.mark.parametrize(
    "value", [1, [], ["w"] * 9, ["w", 0, -1, *[0] * 6], ["w" * 129, *[0] * 8], ["w", 0, 1.5, *[0] * 6]]
)
def test_malformed_stages_of_a_reply_cost_no_answer(value: Json) -> None:
    reply = decode_reply(json.dumps({"v": 1, "values": [1], "tokens": 1, "stages": value}).encode())

    assert (reply.values, reply.stages) == ([1], None)


# -- what is left of a malformed entry -----------------------------------------------------------------------------


def test_a_malformed_entry_can_still_be_answered_where_id_and_client_are_sound() -> None:
    fields = flat(JOB)
    fields[2 * FIELDS.index("rows") + 1] = b"many"

    assert salvage(fields) == (JOB.id, "client", "c" * 32)
    assert salvage([b"id", JOB.id.encode()]) == (JOB.id, "", "")


@pytest.mark.parametrize(
    ("name", "value"), [("id", b"../etc"), ("client", b"a:b"), ("client", b"\xff"), ("call", b"a:b")]
)
def test_an_id_client_or_call_that_is_not_sound_names_no_key(name: str, value: bytes) -> None:
    fields = flat(JOB)
    fields[2 * FIELDS.index(name) + 1] = value

    assert salvage(fields) == ("", "", "")


def test_input_too_long_stays_what_it_is_through_a_reply() -> None:
    again = decode_reply(encode_reply(Reply(errors={1: InputTooLong("9 tokens")})))

    assert isinstance(again.errors[1], InputTooLong)
