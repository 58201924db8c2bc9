"""What a job needs: bytes of memory by stage, from the manifest of the model that it reads.

With P parameters of the model, D of its dense root and S bytes stored, computing in float32 (a GPU computes in 16 bits,
so that these are upper bounds there), a job holds at its largest

    root         2 S: the weights as they are stored, and those written
    calibrate    4 P, 16 per entry of a block's second moments, and twice the hidden states of all windows; or, for
                 gradients, 8 per weight of the blocks' linears and the activations of a batch
    compress     8 P + S: the model, and what takes its place or the one from before; and 32 (n^2 + m n) for the factors
                 of the widest linear [m, n] in float64
    recover      16 P + S: weights, gradients and two moments; 4 P + S where most weights stay frozen; the
                 activations of a micro-batch; 4 D for a teacher
    evaluate     4 P + S, and the logits of a batch

beside Python and its libraries. Sizes of the blocks are not in a manifest; they are taken as those of common decoders
with as many parameters: a hidden size of 128 times the number of blocks (Kaplan et al., arXiv 2001.08361, find losses
flat around it), 3.5 times as many neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

MEGABYTE = 1_000_000
# Bytes of Python and the libraries that a stage imports: measured, torch without CUDA.
LIBRARIES = {
    "study": 60 * MEGABYTE,
    "tokenize": 60 * MEGABYTE,
    "root": 400 * MEGABYTE,
    "calibrate": 430 * MEGABYTE,
    "compress": 430 * MEGABYTE,
    "recover": 550 * MEGABYTE,
    "evaluate": 540 * MEGABYTE,
    "tables": 220 * MEGABYTE,
    "fit": 250 * MEGABYTE,
    "report": 250 * MEGABYTE,
    "track": 310 * MEGABYTE,
}
CUDA = 2_000 * MEGABYTE  # more of the host's memory where torch brings CUDA's libraries
HEADROOM = 1.3

BATCH_TOKENS = 8192  # of `calibrate`
LOGITS = 1 << 26  # that `evaluate` computes at once
FROZEN = frozenset({"lora", "heal"})  # methods under which most weights stay as they are
TAUGHT = frozenset({"heal"})  # methods with the dense root as teacher


class Widths(NamedTuple):
    """Of a decoder: hidden size, neurons of a block, blocks, and rows of the embedding."""

    hidden: float
    intermediate: float
    layers: float
    vocabulary: float


def memory_bytes(stage: str, manifest: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> int:
    """Bytes to ask for a job of `stage` on the model of `manifest`: `expected_bytes`, with room on top.

    The host's memory where the job runs on the CPU; it suffices for a job on a GPU too, and bounds that of the GPU.
    """
    return int(HEADROOM * expected_bytes(stage, manifest, options)) + (CUDA if stage in RUNS_MODELS else 0)


def expected_bytes(stage: str, manifest: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> int:
    """Peak bytes of a job of `stage` on the model of `manifest`.

    options: fields of its step (length, batch_size, micro_batch_size, gradient_checkpointing ...), its calibration
    (windows, length) or its evaluation (length), as far as they are known; `method` of the step and `kind` of the
    statistics beside them. Without them, the largest that is usual.
    """
    held = RUNS_MODELS[stage](manifest, options or {}) if stage in RUNS_MODELS else 0
    return int(LIBRARIES[stage] + held)


def likely_widths(manifest: Mapping[str, Any]) -> Widths:
    """The sizes of a common decoder with as many parameters as the dense root: 12 h^2 in a block of h / 128 of them."""
    dense = manifest["dense"]
    hidden = (dense["blocks"] * 128 / 12) ** (1 / 3)
    return Widths(hidden, 3.5 * hidden, hidden / 128, (dense["total"] - dense["blocks"]) / hidden)


def root_bytes(manifest: Mapping[str, Any], options: Mapping[str, Any]) -> float:
    return 2 * manifest["stored_bytes"]


def calibrate_bytes(manifest: Mapping[str, Any], options: Mapping[str, Any]) -> float:
    widths = likely_widths(manifest)
    weights = 4 * manifest["parameters"]["total"]
    tokens = options.get("windows", 256) * options.get("length", 512)
    moments = 16 * (3 * widths.hidden**2 + widths.intermediate**2) + 2 * 4 * tokens * widths.hidden
    gradients = 8 * manifest["parameters"]["decoder_linears"] + activation_bytes(widths, min(tokens, BATCH_TOKENS))
    return weights + {"moments": moments, "blocks": moments, "gradients": gradients}.get(
        options.get("kind"), max(moments, gradients)
    )


def compress_bytes(manifest: Mapping[str, Any], options: Mapping[str, Any]) -> float:
    widths = likely_widths(manifest)
    solver = 8 * 4 * (widths.intermediate**2 + widths.intermediate * widths.hidden)
    return 8 * manifest["parameters"]["total"] + manifest["stored_bytes"] + solver


def recover_bytes(manifest: Mapping[str, Any], options: Mapping[str, Any]) -> float:
    parameters, method = manifest["parameters"]["total"], options.get("method")
    at_once = (options.get("micro_batch_size") or options.get("batch_size", 32)) * options.get("length", 512)
    trained = (4 if method in FROZEN else 16) * parameters
    teacher = 4 * manifest["dense"]["total"] if method in TAUGHT or method in FROZEN else 0
    recomputed = options.get("gradient_checkpointing", False)
    return trained + teacher + manifest["stored_bytes"] + activation_bytes(likely_widths(manifest), at_once, recomputed)


def evaluate_bytes(manifest: Mapping[str, Any], options: Mapping[str, Any]) -> float:
    # Logits, their logarithms, and a copy of either.
    logits = 4 * 4 * min(LOGITS, 16 * options.get("length", 2048) * likely_widths(manifest).vocabulary)
    return 4 * manifest["parameters"]["total"] + manifest["stored_bytes"] + logits


def activation_bytes(widths: Widths, tokens: float, recomputed: bool = False) -> float:
    """What a backward pass over so many tokens at once keeps of the forward pass, in float32.

    A block keeps about ten vectors of the hidden size and four of its neurons for each token, or its input alone where
    the rest is recomputed; the head the logits and three arrays like them.
    """
    block = 10 * widths.hidden + 4 * widths.intermediate
    blocks = widths.layers * widths.hidden + block if recomputed else widths.layers * block
    return 4 * tokens * (blocks + 4 * widths.vocabulary)


RUNS_MODELS = {
    "root": root_bytes,
    "calibrate": calibrate_bytes,
    "compress": compress_bytes,
    "recover": recover_bytes,
    "evaluate": evaluate_bytes,
}
