"""Memory and disk of a job: more for more parameters, by what the stage holds of them."""

from __future__ import annotations

import pytest
from manifests import manifest as whole_manifest

from coppice.methods.declaration import Resources
from coppice.methods.registry import method as registered
from coppice.planning.resources import (
    CUDA,
    HEADROOM,
    LIBRARIES,
    RUNS_MODELS,
    device_bytes,
    disk_bytes,
    expected_bytes,
    likely_widths,
    memory_bytes,
    moments_bytes,
)
from coppice.records.manifest import Manifest


def resources_of(name: str) -> Resources:
    return registered(name).resources


def manifest(total: float, blocks: float | None = None, stored: float | None = None) -> Manifest:
    """The manifest of a dense model of so many parameters."""
    blocks = 0.8 * total if blocks is None else blocks
    parameters = {"total": int(total), "blocks": int(blocks), "decoder_linears": int(blocks)}
    return whole_manifest(
        parameters=parameters | {"nonzero": int(total)},
        dense=parameters,
        stored_bytes=int(2 * total if stored is None else stored),
    )


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
    assert large > manifest(1e9).stored_bytes
    assert large > 1.2 * expected_bytes(stage, manifest(1e9))


def test_training_holds_weights_gradients_and_two_moments() -> None:
    one_token = {"length": 1, "batch_size": 1}
    full = expected_bytes("recover", manifest(1e9), one_token) - LIBRARIES["recover"]
    # By hand: 16 bytes a parameter, and the checkpoint that is written; activations of one token are little.
    assert full == pytest.approx(16e9 + 2e9, rel=0.01)
    frozen = (
        expected_bytes("recover", manifest(1e9), {**one_token, "resources": resources_of("lora")})
        - LIBRARIES["recover"]
    )
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


def test_the_dense_root_is_measured_beside_what_was_trained_of_a_tenth_of_it() -> None:
    small = manifest(1e8).model_copy(update={"dense": manifest(1e9).dense})
    full = (
        expected_bytes("recover", small, {"length": 1, "batch_size": 1, "resources": resources_of("full")})
        - LIBRARIES["recover"]
    )
    # 4 bytes of either are more than the 16 of the small one.
    assert full == pytest.approx(4e8 + 4e9 + 2e8, rel=0.01)


# Llama 3.1 70B: 80 blocks of hidden size 8192 with 28,672 neurons.
LARGE = manifest(70.6e9, 68.5e9)
LONG = {"length": 2048, "batch_size": 32, "micro_batch_size": 1, "gradient_checkpointing": True}


@pytest.mark.parametrize(("method", "models"), [("lora", 1), ("full", 1), ("heal", 2), ("scratch", 2)])
def test_every_process_of_a_recovery_loads_whole_models_on_the_host(method: str, models: int) -> None:
    asked = memory_bytes("recover", LARGE, {**LONG, "resources": resources_of(method), "gpus": 8})
    # In float32: the model, beside it a teacher or the weights that are drawn.
    loaded = 8 * models * 4 * 70.6e9
    assert loaded < asked
    # The one more is the checkpoint, which all of them read.
    assert asked == pytest.approx(HEADROOM * (loaded + 2 * 70.6e9), rel=0.02)


def test_a_gpu_holds_its_share_and_not_what_processes_load_on_the_host() -> None:
    lora = {**LONG, "resources": resources_of("lora")}
    one, eight = (device_bytes("recover", LARGE, {**lora, "gpus": gpus}) for gpus in (1, 8))
    # The model and, in the end, the dense root are divided; a micro-batch is on every GPU.
    models = (4 + 4 + 2) * 70.6e9
    assert one - models > 1e9
    assert eight - models == pytest.approx(8 * (one - models), rel=0.01)
    assert expected_bytes("recover", LARGE, {**lora, "gpus": 8}) > 2 * eight
    # A batch without micro-batches is divided.
    whole = {**lora, "micro_batch_size": None}
    assert device_bytes("recover", LARGE, {**whole, "gpus": 8}) == device_bytes("recover", LARGE, whole)


def test_every_process_has_libraries_of_its_own() -> None:
    one, four = (memory_bytes("recover", manifest(1e6), {**LONG, "gpus": gpus}) for gpus in (1, 4))
    assert four - one > 3 * (LIBRARIES["recover"] + CUDA)


def test_a_connectivity_holds_two_models_and_one_between_them() -> None:
    of_one = expected_bytes("evaluate", manifest(1e9))
    assert of_one == expected_bytes("evaluate", manifest(1e9), {"kind": "quality"})
    # Two more in float32, and another checkpoint in 16 bits.
    assert expected_bytes("evaluate", manifest(1e9), {"kind": "connectivity"}) - of_one == 8e9 + 2e9


# Of each shape blocks, hidden size, neurons, and parameters in the blocks and in all, by its config.
SHAPES = {
    "Llama-3.2-1B": (16, 2048, 8192, 0.97e9, 1.24e9),
    "Llama-3.1-8B": (32, 4096, 14336, 6.98e9, 8.03e9),
    "Llama-3.1-70B": (80, 8192, 28672, 68.5e9, 70.6e9),
    "Qwen2.5-0.5B": (24, 896, 4864, 0.358e9, 0.494e9),
    "Qwen2.5-7B": (28, 3584, 18944, 6.53e9, 7.62e9),
    "gemma-2-9b": (42, 3584, 14336, 8.3e9, 9.24e9),
}


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_disk_has_room_for_statistics_and_checkpoints(shape: str, width: int) -> None:
    layers, hidden, neurons, blocks, total = SHAPES[shape]
    stored = width * total
    moments = 4 * layers * (3 * hidden**2 + neurons**2)
    known = manifest(total, blocks, stored)
    gigabyte = 1e9  # which a rule adds
    calibrate = disk_bytes("calibrate", known, stored, {"kind": "moments"})
    assert stored + moments < calibrate + gigabyte
    # Parent and child; for one that compensates, a reference that is fetched as well.
    compress = {"kinds": ["moments"]}
    assert 2 * stored + moments < disk_bytes("compress", known, stored, compress) + gigabyte
    assert 3 * stored + moments < disk_bytes("compress", known, 2 * stored, compress) + gigabyte
    assert disk_bytes("compress", known, stored, {}) == disk_bytes("compress", known, stored, compress)
    # And no more than is likely.
    assert calibrate < 1.5 * (stored + moments)


def test_the_disk_has_no_room_for_statistics_that_are_not_read() -> None:
    known = manifest(1e9)
    assert disk_bytes("calibrate", known, 2e9, {"kind": "blocks"}) == pytest.approx(HEADROOM * 2e9)
    assert disk_bytes("compress", known, 2e9, {"kinds": ["blocks"]}) == pytest.approx(HEADROOM * 4e9)
    assert disk_bytes("compress", known, 2e9, {"kinds": []}) == pytest.approx(HEADROOM * 4e9)
    assert moments_bytes(likely_widths(known)) > 1e9


def test_the_disk_has_room_for_two_states_of_what_trains() -> None:
    # Model and dense root are fetched; a state is written while the one before is there: 12 bytes a parameter each.
    known = manifest(1e9)
    assert disk_bytes("recover", known, 4e9, {"resources": resources_of("full")}) == pytest.approx(HEADROOM * 28e9)
    # Of adapters there is little; the child is written.
    assert disk_bytes("recover", known, 4e9, {"resources": resources_of("lora")}) == pytest.approx(HEADROOM * 6e9)
    assert disk_bytes("evaluate", known, 2e9, {"kind": "quality"}) == pytest.approx(HEADROOM * 2e9)


def test_a_stage_without_a_model_holds_its_libraries() -> None:
    assert memory_bytes("tables", manifest(1e12)) < 1e9
