"""Redis over TLS: a round trip with certificates on both sides, and what is said where they do not fit."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import engines
import pytest
from workers import LONG_S, spec, working

from millstream.broker.contract.errors import BrokerUnavailable, ConfigError
from millstream.broker.transport.connection import Connection, find_url, is_transient, translated
from millstream.client import Client

pytestmark = pytest.mark.redis7  # the servers in the wheels have no TLS


@dataclass(frozen=True)
class Tls:
    """A server that speaks TLS on `port`, and plain on `plain`; the folder of the certificates."""

    certificates: Path
    port: int
    plain: int

    def url(
        self,
        host: str = "localhost",
        port: int | None = None,
        *,
        client: bool = True,
        but: Mapping[str, str] | None = None,
    ) -> str:
        """With the right files, `but` for these options; an empty one leaves the option out."""
        files = {"ssl_ca_certs": "ca.pem"}
        if client:
            files |= {"ssl_certfile": "client.pem", "ssl_keyfile": "client.key"}
        named = {name: str(self.certificates / file) for name, file in {**files, **(but or {})}.items() if file}
        return f"rediss://{host}:{port or self.port}?{urlencode(named)}"


def certify(folder: Path, name: str, *words: str) -> None:
    """A certificate NAME.pem with its key NAME.key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.fail("no openssl: apt install openssl")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
    subprocess.run(
        [openssl, "req", "-x509", *key, "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2", *words],
        cwd=folder,
        capture_output=True,
        check=True,
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a CA, of a server called localhost, of a client; and a CA that nobody knows."""
    folder = tmp_path_factory.mktemp("certificates")
    by_ca = ("-CA", "ca.pem", "-CAkey", "ca.key")
    certify(folder, "ca")
    certify(folder, "stranger")
    certify(folder, "server", *by_ca, "-addext", "subjectAltName=DNS:localhost")
    certify(folder, "client", *by_ca)
    return folder


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Tls]:
    """A server that asks its clients for certificates, too."""
    plain = engines.free_port()
    flags = ["--port", str(plain), "--tls-auth-clients", "yes"]
    for flag, file in (("cert-file", "server.pem"), ("key-file", "server.key"), ("ca-cert-file", "ca.pem")):
        flags += [f"--tls-{flag}", str(certificates / file)]
    home = tmp_path_factory.mktemp("tls")
    with engines.serving(engines.binary_of("redis7"), home, *flags, flag="--tls-port") as port:
        yield Tls(certificates, port, plain)


def fault(url: str) -> BrokerUnavailable:
    """How a server at `url` cannot be used."""
    connection = Connection(url, name="tests")
    with pytest.raises(BrokerUnavailable) as caught, translated(connection.safe_url):
        connection.client.ping()
    connection.close()
    return caught.value


def test_a_worker_and_a_client_meet_over_tls(tls: Tls) -> None:
    url = tls.url()
    assert find_url(url, None, {}) == url

    with working(url, spec("mill")), Client(url, prefix="ms") as client:
        assert client.submit("mill", ["a", "b"]).result(timeout=LONG_S) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "host"),
    [({"ssl_ca_certs": "stranger.pem"}, "localhost"), ({"ssl_ca_certs": ""}, "localhost"), ({}, "127.0.0.1")],
    ids=["another CA", "no CA", "another host name"],
)
def test_a_server_that_does_not_prove_who_it_is_gets_nothing(tls: Tls, options: dict[str, str], host: str) -> None:
    error = fault(tls.url(host, but=options))

    assert "has a TLS certificate that cannot be verified" in str(error)
    assert "ssl_ca_certs" in error.hint
    assert "host" in error.hint
    assert not is_transient(error)


def test_a_missing_client_certificate_is_named_as_what_may_be_missing(tls: Tls) -> None:
    error = fault(tls.url(client=False))

    assert "ssl_certfile" in error.hint


def test_a_certificate_with_another_ones_key_is_refused(tls: Tls) -> None:
    error = fault(tls.url(but={"ssl_keyfile": "server.key"}))

    assert "ssl_keyfile" in error.hint
    assert not is_transient(error)


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_a_file_that_is_not_there_is_named_at_once(tls: Tls, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option}.*nowhere\.pem"):
        Connection(tls.url(but={option: "nowhere.pem"}))


def test_plain_to_a_tls_port_says_rediss(tls: Tls) -> None:
    assert "rediss://" in fault(f"redis://localhost:{tls.port}").hint


def test_tls_to_a_plain_port_says_so(tls: Tls) -> None:
    assert "TLS" in fault(tls.url(port=tls.plain)).hint
