"""The memory and disk space of a job: bytes by stage, from the manifest of the model that it reads.

With P parameters of the model, D of its dense root and S bytes stored, computing in float32 (a GPU computes in 16 bits,
so that these are upper bounds there), a job holds at its largest

    root         2 S: the weights as they are stored, and those written
    calibrate    4 P, 16 per entry of a block's second moments, and twice the hidden states of all windows; or, for
                 gradients, 8 per weight of the blocks' linears and the activations of a batch
    compress     8 P + S: the model, and what takes its place or the one from before; and 32 (n^2 + m n) for the factors
                 of the widest linear [m, n] in float64
    recover      16 P + S: weights, gradients and two moments; 4 P + S where most weights stay frozen; the
                 activations of a micro-batch on each GPU; 4 D for a teacher. At the end 4 P + 4 D + S, as the dense
                 root is measured too. On n GPUs n times 4 P on the host, as every process loads whole models before
                 they are divided; n (4 P + 4 D) with a teacher, n 8 P where weights are initialized again
    evaluate     4 P + S, and the logits of a batch; 12 P + 2 S for a connectivity: two models, and one between them

plus Python and its libraries, once for each process. Where results are stored elsewhere and inputs are fetched, its
disk holds the stored bytes of all checkpoints that it reads, and

    calibrate    4 per entry of all blocks' second moments
    compress     S for what it writes, and the second moments that it reads
    recover      S for what it writes, or 24 P: two states of weights and two moments, the newest and the one before

Sizes of the blocks are not in a manifest. They are taken as those of common decoders with as many parameters: a hidden
size of 128 times the number of blocks (Kaplan et al., arXiv 2001.08361, find losses flat around it), 3.5 times as many
neurons. By these, second moments are a quarter too few of a model with many neurons (Qwen2.5-7B), and right within a
tenth of Llama 3.1; the headroom of the request covers either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from coppice.methods.declaration import Resources

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
HEADROOM = 1.3  # of what is requested over what is expected

BATCH_TOKENS = 8192  # of `calibrate`
LOGITS = 1 << 26  # that `evaluate` computes at once


class Counts(Protocol):
    """Parameters of a node's model."""

    @property
    def total(self) -> float: ...

    @property
    def decoder_linears(self) -> float: ...


class DenseCounts(Protocol):
    """Parameters of the dense model at the root of its path."""

    @property
    def total(self) -> float: ...

    @property
    def blocks(self) -> float: ...


class ModelSize(Protocol):
    """What a job's needs follow from: a manifest has it, as has an estimate of a node without a checkpoint."""

    @property
    def parameters(self) -> Counts: ...

    @property
    def dense(self) -> DenseCounts: ...

    @property
    def stored_bytes(self) -> float: ...


class Widths(NamedTuple):
    """Of a decoder: hidden size, neurons of a block, blocks, and rows of the embedding."""

    hidden: float
    intermediate: float
    layers: float
    vocabulary: float


def memory_bytes(stage: str, manifest: ModelSize, options: Mapping[str, Any] | None = None) -> int:
    """Bytes to request for a job of `stage` on the model of `manifest`: `expected_bytes`, with headroom.

    The host's memory where the job runs on the CPU; it suffices for a job on a GPU too, and bounds that of the GPU.
    """
    libraries = processes(options or {}) * CUDA if stage in RUNS_MODELS else 0
    return int(HEADROOM * expected_bytes(stage, manifest, options)) + libraries


def expected_bytes(stage: str, manifest: ModelSize, options: Mapping[str, Any] | None = None) -> int:
    """Peak bytes of a job of `stage` on the model of `manifest`, all its processes together.

    options: fields of its step (length, batch_size, micro_batch_size, gradient_checkpointing, gpus ...), its
    calibration (windows, length) or its evaluation (length), as far as they are known; `resources` of its method, and
    `kind` of the statistics or the evaluation. Without them, the largest that is usual, on one GPU.
    """
    held = RUNS_MODELS[stage](manifest, options or {}) if stage in RUNS_MODELS else 0
    return int(processes(options or {}) * LIBRARIES[stage] + held)


def device_bytes(stage: str, manifest: ModelSize, options: Mapping[str, Any]) -> float:
    """Peak bytes of all GPUs of a job together, were everything in float32; of a stage that runs a model."""
    return (training_bytes if stage == "recover" else RUNS_MODELS[stage])(manifest, options)


def disk_bytes(stage: str, manifest: ModelSize, fetched: float, options: Mapping[str, Any]) -> int:
    """Disk space to request for a job of `stage` on the model of `manifest`, with headroom.

    fetched: stored bytes of all checkpoints that it reads. options: as those of `expected_bytes`, and the `kinds` of
    statistics that a step reads. Without them, the most that is usual.
    """
    return int(HEADROOM * (fetched + FILES[stage](manifest, options)))


def of_method(options: Mapping[str, Any]) -> Resources:
    """What the method of a step declares."""
    return options.get("resources", Resources())


def processes(options: Mapping[str, Any]) -> int:
    """A recovery runs in one on each of its GPUs."""
    return options.get("gpus", 1)


def likely_widths(manifest: ModelSize) -> Widths:
    """The sizes of a common decoder with as many parameters as the dense root: 12 h^2 in a block of h / 128 of them."""
    dense = manifest.dense
    hidden = (dense.blocks * 128 / 12) ** (1 / 3)
    return Widths(hidden, 3.5 * hidden, hidden / 128, (dense.total - dense.blocks) / hidden)


def root_bytes(manifest: ModelSize, options: Mapping[str, Any]) -> float:
    return 2 * manifest.stored_bytes


def calibrate_bytes(manifest: ModelSize, options: Mapping[str, Any]) -> float:
    widths = likely_widths(manifest)
    weights = 4 * manifest.parameters.total
    tokens = options.get("windows", 256) * options.get("length", 512)
    moments = 16 * moment_entries(widths) + 2 * 4 * tokens * widths.hidden
    gradients = 8 * manifest.parameters.decoder_linears + activation_bytes(widths, min(tokens, BATCH_TOKENS))
    by_kind = {"moments": moments, "blocks": moments, "gradients": gradients}
    return weights + by_kind.get(options.get("kind", ""), max(moments, gradients))


def compress_bytes(manifest: ModelSize, options: Mapping[str, Any]) -> float:
    widths = likely_widths(manifest)
    solver = 8 * 4 * (widths.intermediate**2 + widths.intermediate * widths.hidden)
    return 8 * manifest.parameters.total + manifest.stored_bytes + solver


def recover_bytes(manifest: ModelSize, options: Mapping[str, Any]) -> float:
    return max(training_bytes(manifest, options), loading_bytes(manifest, options))


def training_bytes(manifest: ModelSize, options: Mapping[str, Any]) -> float:
    """What the processes of a recovery hold together once the model is divided among them."""
    parameters, dense, method = manifest.parameters.total, manifest.dense.total, of_method(options)
    # A micro-batch on each of the GPUs; without its size, the batch is divided among them.
    micro_batch = options.get("micro_batch_size")
    at_once = processes(options) * micro_batch if micro_batch else options.get("batch_size", 32)
    recomputed = options.get("gradient_checkpointing", False)
    activations = activation_bytes(likely_widths(manifest), at_once * options.get("length", 512), recomputed)
    trained = (4 if method.frozen_base else 16) * parameters + (4 * dense if method.teacher else 0)
    measured = 4 * (parameters + dense)  # the dense root, for its held-out loss, next to the trained model
    return max(trained, measured) + manifest.stored_bytes + activations


def loading_bytes(manifest: ModelSize, options: Mapping[str, Any]) -> float:
    """What the processes of a recovery hold on the host while each loads whole models, before they are divided."""
    parameters, dense, method = manifest.parameters.total, manifest.dense.total, of_method(options)
    extra = (dense if method.teacher else 0) + (parameters if method.redraws else 0)
    # The dense root is loaded in the end, when the model is gone.
    return processes(options) * 4 * max(parameters + extra, dense) + manifest.stored_bytes


def evaluate_bytes(manifest: ModelSize, options: Mapping[str, Any]) -> float:
    # Logits, their logarithms, and a copy of either.
    logits = 4 * 4 * min(LOGITS, 16 * options.get("length", 2048) * likely_widths(manifest).vocabulary)
    models, checkpoints = (3, 2) if options.get("kind") == "connectivity" else (1, 1)
    return 4 * models * manifest.parameters.total + checkpoints * manifest.stored_bytes + logits


def calibrate_files(manifest: ModelSize, options: Mapping[str, Any]) -> float:
    return moments_bytes(likely_widths(manifest)) if options.get("kind", "moments") == "moments" else 0


def compress_files(manifest: ModelSize, options: Mapping[str, Any]) -> float:
    read = moments_bytes(likely_widths(manifest)) if "moments" in options.get("kinds", ["moments"]) else 0
    return manifest.stored_bytes + read


def recover_files(manifest: ModelSize, options: Mapping[str, Any]) -> float:
    state = 0 if of_method(options).small_state else 12 * manifest.parameters.total
    return max(manifest.stored_bytes, 2 * state)


def evaluate_files(manifest: ModelSize, options: Mapping[str, Any]) -> float:
    return 0


def moments_bytes(widths: Widths) -> float:
    """Stored bytes of statistics of the kind `moments`; those of other kinds are few."""
    return 4 * widths.layers * moment_entries(widths)


def moment_entries(widths: Widths) -> float:
    """Of the second moments of a block's four distinct inputs."""
    return 3 * widths.hidden**2 + widths.intermediate**2


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
FILES = {
    "calibrate": calibrate_files,
    "compress": compress_files,
    "recover": recover_files,
    "evaluate": evaluate_files,
}
