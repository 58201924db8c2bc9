from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from coppice.methods.registry import method
from coppice.models.modules.kv_cache import CacheSettings

# Read by tests/rows.py.
ROWS = [{"bits": 4, "group_size": 4, "buffer": 4, "rank": 2, "decode_rank": 1}]


def test_gives_settings_of_the_cache():
    gear = method("gear")
    assert gear.contract == "cache" and gear.adds_traits == {"quantized-cache"}
    settings = gear.cache.cache(gear.validate_options({"bits": 2}))
    assert json.loads(json.dumps(settings)) == settings
    assert CacheSettings(**settings) == CacheSettings(2, 64, 64, 4, 2, 0.02, 3)
    whole_vectors = gear.cache.cache(gear.validate_options({"bits": 4, "group_size": -1}))
    assert (whole_vectors["group_size"], whole_vectors["window"]) == (-1, 20)


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"bits": 9}, {"bits": 2, "group_size": 0}, {"bits": 2, "outliers": 1.1}]
)
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        method("gear").options(**wrong)
