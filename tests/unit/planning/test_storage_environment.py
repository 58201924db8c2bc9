from __future__ import annotations

from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest

from coppice.errors import UserError
from coppice.planning.storage_environment import storage_environment


def s3(**changes: str | None) -> SimpleNamespace:
    fields = {"endpoint_url": None, "region": None, "access_key": None, "secret_key": None, "token": None}
    return SimpleNamespace(**fields | changes)


def test_a_folder_is_the_prefix_itself(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_environment("fs", "shared", None, {}) == {"COPPICE_STORE": str(tmp_path / "shared")}


def test_credentials_stay_out_of_the_address() -> None:
    settings = s3(endpoint_url="http://localhost:9000", region="eu", access_key="name", secret_key="secret")
    found = storage_environment("s3", "s3://bucket/prefix/", settings, {})
    address = urlsplit(found.pop("COPPICE_STORE"))
    assert f"{address.scheme}://{address.netloc}{address.path}" == "s3://bucket/prefix"
    assert parse_qs(address.query) == {
        "allow_bucket_creation": ["true"],
        "region": ["eu"],
        "scheme": ["http"],
        "endpoint_override": ["localhost:9000"],
    }
    assert found == {"AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "secret"}


def test_without_settings_of_the_plugin_the_environment_is_left_to_say_more() -> None:
    assert storage_environment("s3", "s3://bucket", None, {}) == {
        "COPPICE_STORE": "s3://bucket?allow_bucket_creation=true"
    }


def test_a_store_that_is_named_stays() -> None:
    assert storage_environment("s3", "s3://bucket", s3(), {"COPPICE_STORE": "elsewhere"}) == {}


def test_a_prefix_that_a_shell_would_misread_is_refused() -> None:
    with pytest.raises(UserError, match="choose a prefix of letters, digits"):
        storage_environment("fs", "my results", None, {})


def test_another_provider_needs_a_named_store() -> None:
    with pytest.raises(UserError, match=r"Set COPPICE_STORE to where weights are to be stored.*provider gcs"):
        storage_environment("gcs", "gcs://bucket", None, {})
