"""Where files go that no rule declares, under a storage provider of Snakemake: weights, tokens and items.

They lie next to the results. The settings of the storage plugin hold for them too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from shlex import quote
from typing import Protocol
from urllib.parse import urlencode, urlsplit

from coppice.errors import UserError
from coppice.storage import VARIABLE


class S3Settings(Protocol):
    """What is read of the settings of Snakemake's storage plugin for S3."""

    endpoint_url: str | None
    region: str | None
    access_key: str | None
    secret_key: str | None
    token: str | None


def storage_environment(
    provider: str, prefix: str, s3: S3Settings | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """The environment variables that name the store.

    environment: the variables as they are; a store that it names stays. Credentials stay out of the address, which logs
    may show. Raises UserError for a prefix that shells would misread, and for a provider whose store must be named.
    """
    if prefix and quote(prefix) != prefix:
        raise UserError(
            f"The storage prefix {prefix!r} holds a blank or another character that a shell interprets, and the "
            "commands of jobs name files below it; choose a prefix of letters, digits and the characters . _ - /"
        )
    if VARIABLE in environment:
        return {}
    if provider == "fs":
        return {VARIABLE: os.path.abspath(prefix)}
    if provider == "s3":
        return _s3_environment(prefix, s3)
    raise UserError(
        f"Set {VARIABLE} to where weights are to be stored next to the results of the storage provider {provider}: a "
        "folder, or an address that Apache Arrow reads, as gs://bucket/prefix."
    )


def _s3_environment(prefix: str, settings: S3Settings | None) -> dict[str, str]:
    options: dict[str, str] = {"allow_bucket_creation": "true"}
    if settings is None:
        return {VARIABLE: f"{prefix.rstrip('/')}?{urlencode(options)}"}
    if settings.endpoint_url:
        server = urlsplit(settings.endpoint_url)
        options |= {"region": str(settings.region), "scheme": server.scheme, "endpoint_override": server.netloc}
    credentials = {
        "AWS_ACCESS_KEY_ID": settings.access_key,
        "AWS_SECRET_ACCESS_KEY": settings.secret_key,
        "AWS_SESSION_TOKEN": settings.token,
    }
    named = {name: value for name, value in credentials.items() if value}
    return {VARIABLE: f"{prefix.rstrip('/')}?{urlencode(options)}", **named}
