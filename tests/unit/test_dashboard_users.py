"""Who may use the dashboard: the file of users, and signing in."""

from __future__ import annotations

from pathlib import Path

import pytest
from dashboards import basic

from millstream.broker.contract.errors import ConfigError, InvalidRequest
from millstream.gateway.dashboard import sign_in as sign_ins
from millstream.gateway.dashboard.sign_in import MOST_REMEMBERED, MOST_WRONG, WRONG_WITHIN_S, SignIn
from millstream.gateway.dashboard.users import User, new_line, read_users

LINE = new_line("ada", "operator", "correct horse")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    path.write_text(f"# the mill\n\n{LINE}\n{new_line('bob', 'viewer', 'just looking')}\n")
    path.chmod(0o600)
    return path


def header(name: str, password: str) -> str:
    return basic(name, password)["Authorization"]


def test_a_users_line_gives_name_and_role_and_no_password(file: Path) -> None:
    users = read_users(file)

    assert {name: user.role for name, user in users.items()} == {"ada": "operator", "bob": "viewer"}
    assert users["ada"].has_password("correct horse")
    assert not users["ada"].has_password("wrong horse")
    assert "correct horse" not in LINE
    assert new_line("ada", "operator", "correct horse") != LINE, "a salt for each line"


@pytest.mark.parametrize(
    ("name", "role", "password"),
    [("", "viewer", "long enough"), ("a b", "viewer", "long enough"), ("a:b", "viewer", "long enough"),
     ("#a", "viewer", "long enough"), ("a", "admin", "long enough"), ("a", "viewer", "short")],
)  # fmt: skip
def test_a_user_that_cannot_be_written_is_refused(name: str, role: str, password: str) -> None:
    with pytest.raises(InvalidRequest):
        new_line(name, role, password)


@pytest.mark.parametrize(
    "text",
    ["", "# nobody\n", "ada operator", "ada operator secret", LINE.replace("operator", "admin"), f"{LINE} more",
     LINE[:-1]],
)  # fmt: skip
def test_a_file_without_users_or_with_a_malformed_line_is_refused_and_shows_no_secret(file: Path, text: str) -> None:
    file.write_text(text)

    with pytest.raises(ConfigError) as refused:
        read_users(file)

    assert str(file) in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_change_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)

    with pytest.raises(ConfigError, match="can be changed by other users"):
        read_users(file)


def test_a_missing_file_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_users(tmp_path / "none")


def test_only_the_right_name_and_password_sign_in(file: Path) -> None:
    door = SignIn(read_users(file))

    found = door.check(header("ada", "correct horse"), 0.0)

    assert isinstance(found, User)
    assert (found.name, found.role) == ("ada", "operator")
    for wrong in (
        header("ada", "just looking"),
        header("eve", "correct horse"),
        header("", ""),
        "",
        "Basic !",
        "Bearer x",
    ):
        assert door.check(wrong, 0.0) == "unknown"


def test_an_unknown_name_is_checked_as_long_as_a_known_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    original = User.has_password

    def has_password(user: User, text: str) -> bool:
        checked.append(user.name)
        return original(user, text)

    monkeypatch.setattr(User, "has_password", has_password)
    door = SignIn(read_users(file))

    door.check(header("eve", "any password"), 0.0)

    assert checked == [""]


def test_no_password_is_right_for_an_unknown_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(User, "has_password", lambda *_: True)

    assert SignIn(read_users(file)).check(header("eve", "any password"), 0.0) == "unknown"


def test_a_right_password_is_checked_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    door = SignIn(read_users(file))
    door.check(header("ada", "correct horse"), 0.0)
    monkeypatch.setattr(User, "has_password", lambda *_: pytest.fail("checked again"))

    assert door.remembered(header("ada", "correct horse"))
    assert isinstance(door.check(header("ada", "correct horse"), 0.0), User)
    assert not door.remembered(header("ada", "correct horsf"))


def test_after_many_wrong_passwords_no_other_is_checked_for_a_minute(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = SignIn(read_users(file))
    known = header("bob", "just looking")
    door.check(known, 0.0)
    monkeypatch.setattr(User, "has_password", lambda user, text: text == "correct horse")
    for at in range(MOST_WRONG):
        assert door.check(header("ada", f"guess {at}"), float(at)) == "unknown"

    assert door.check(header("ada", "correct horse"), 10.0) == "too many"
    assert isinstance(door.check(known, 10.0), User), "who is in stays in"
    assert isinstance(door.check(header("ada", "correct horse"), WRONG_WITHIN_S), User)


def test_the_memory_of_right_passwords_is_bounded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(User, "has_password", lambda *_: True)
    door = SignIn(read_users(file))

    for at in range(MOST_REMEMBERED + 5):
        door.check(header("ada", f"{at}"), 0.0)

    assert not door.remembered(header("ada", "0"))
    assert door.remembered(header("ada", f"{MOST_REMEMBERED + 4}"))
    assert len(vars(door)["_right"]) == sign_ins.MOST_REMEMBERED
