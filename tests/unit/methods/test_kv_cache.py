from __future__ import annotations

import pytest
from pydantic import ValidationError

from coppice.methods.registry import method
from coppice.models.modules.kv_cache import CacheSettings

# Read by tests/rows.py.
ROWS = [{"bits": 4, "group_size": 4, "window": 4}]


def test_gives_settings_of_the_cache():
    kivi = method("kv-cache")
    assert kivi.contract == "cache" and kivi.adds_traits == {"quantized-cache"}
    settings = kivi.cache.cache(kivi.validate_options({"bits": 2}))
    assert CacheSettings(**settings) == CacheSettings(2, 64, 64)


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"bits": 9}, {"bits": 2, "group_size": 0}, {"bits": 2, "window": 0}])
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        method("kv-cache").options(**wrong)
