"""Memory of a job: more for more parameters, by what the stage holds of them."""

from __future__ import annotations

from typing import Any

import pytest

from coppice.needs import LIBRARIES, RUNS_MODELS, expected_bytes, likely_widths, memory_bytes


def manifest(total: float, blocks: float | None = None, stored: float | None = None) -> dict[str, Any]:
    blocks = 0.8 * total if blocks is None else blocks
    parameters = {"total": int(total), "blocks": int(blocks), "decoder_linears": int(blocks)}
    return {
        "parameters": parameters,
        "dense": {key: parameters[key] for key in ("total", "blocks")},
        "stored_bytes": int(2 * total if stored is None else stored),
    }


def test_widths_of_a_common_decoder() -> None:
    # Llama 2 7B: hidden size 4096, 32 blocks, 6.48e9 parameters in them, two tables of 32,000 rows.
    widths = likely_widths(manifest(6.74e9, 6.48e9))
    assert widths.hidden == pytest.approx(4096, rel=0.05)
    assert widths.layers == pytest.approx(32, rel=0.05)
    assert widths.vocabulary == pytest.approx(2 * 32_000, rel=0.05)


@pytest.mark.parametrize("stage", RUNS_MODELS)
def test_memory_grows_with_the_model_and_has_room(stage: str) -> None:
    small, large = (memory_bytes(stage, manifest(total)) for total in (1e6, 1e9))
    assert LIBRARIES[stage] < small < large
    # All but the headroom is above what is stored.
    assert large > manifest(1e9)["stored_bytes"]
    assert large > 1.2 * expected_bytes(stage, manifest(1e9))


def test_training_holds_weights_gradients_and_two_moments() -> None:
    one_token = {"length": 1, "batch_size": 1}
    full = expected_bytes("recover", manifest(1e9), one_token) - LIBRARIES["recover"]
    # By hand: 16 bytes a parameter, and the checkpoint that is written; activations of one token are little.
    assert full == pytest.approx(16e9 + 2e9, rel=0.01)
    frozen = expected_bytes("recover", manifest(1e9), {**one_token, "method": "lora"}) - LIBRARIES["recover"]
    # The dense root is loaded beside it.
    assert frozen == pytest.approx(4e9 + 4e9 + 2e9, rel=0.01)


def test_options_change_what_is_held() -> None:
    wide = {"length": 2048, "batch_size": 32}
    whole = expected_bytes("recover", manifest(1e9), wide)
    assert expected_bytes("recover", manifest(1e9), {**wide, "micro_batch_size": 1}) < whole / 5
    assert expected_bytes("recover", manifest(1e9), {**wide, "gradient_checkpointing": True}) < whole
    moments, gradients = (
        expected_bytes("calibrate", manifest(1e9), {"kind": kind}) for kind in ("moments", "gradients")
    )
    assert moments < gradients == expected_bytes("calibrate", manifest(1e9))


def test_a_stage_without_a_model_holds_its_libraries() -> None:
    assert memory_bytes("tables", manifest(1e12)) < 1e9
