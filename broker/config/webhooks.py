"""The section `webhooks` of config.yaml: the receivers that calls may name, and the secret that signs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from millstream.broker.config.fields import HomePath, Settings
from millstream.broker.contract.errors import ConfigError
from millstream.broker.contract.webhook_urls import read_allowed

SHORTEST_SECRET = 16
"""Characters that a secret has at least."""

MOST_SECRETS = 4
"""Secrets that one file has at most: each signs each announcement."""

_MOST_BYTES = 4_096

AllowedUrl = Annotated[str, AfterValidator(read_allowed)]


class WebhookSettings(Settings):
    """Receivers and secret of webhooks. Without `allow` no call may have a webhook, and this host sends none."""

    allow: tuple[AllowedUrl, ...] = ()
    secret_file: HomePath | None = None


def read_secrets(file: Path) -> list[str]:
    """Returns the secrets in `file`, one a line. Raises ConfigError; no message quotes a secret."""
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(_MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"the file {file} cannot be read: {reason}", hint=_NAMED_BY) from None
    secrets = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(secrets) <= MOST_SECRETS or min(map(len, secrets)) < SHORTEST_SECRET:
        raise ConfigError(f"the file {file} has no valid secret", hint=_VALID)
    return secrets


_NAMED_BY = "webhooks.secret_file in config.yaml names it"
_VALID = f"one secret of at least {SHORTEST_SECRET} characters a line, at most {MOST_SECRETS}: openssl rand -hex 32"
