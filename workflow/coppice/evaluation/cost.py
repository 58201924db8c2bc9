"""What running a node costs: time to read a prompt, time to write a token, memory.

Prefill is one forward pass over `batch` random prompts of `prompt` tokens; decoding is `generate` greedy passes of one
token each with the key/value cache that prefill left. Times are medians over repeats after warm-up; the spread is the
interquartile range. Memory is the largest that was held while running, on CUDA what was allocated, on the CPU the
resident memory of the process above what it was before the model was loaded.

Sizes are in the node's manifest. Where linears keep packed integers and compute with the
dequantized matrix, time and memory are those of that simulation, and are marked as such.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROCESS = Path("/proc/self")


def measure(
    model: PreTrainedModel,
    *,
    batch: int,
    prompt: int,
    generate: int,
    repeats: int,
    warmup: int,
    baseline_memory: int,
    simulated: bool,
    seed: int = 0,
) -> list[Json]:
    """Rows of metrics: latency and throughput of prefill and decoding, and peak memory.

    `baseline_memory`: resident bytes before the model was loaded. Raises UserError where prompt and generated tokens
    exceed the model's context.
    """
    context = model.config.max_position_embeddings
    if prompt + generate > context:
        raise UserError(
            f"A prompt of {prompt} tokens and {generate} generated ones exceed the model's context of {context}; "
            "shorten `prompt` or `generate`."
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).to(model.device)
    for _ in range(warmup):
        time_generation(model, tokens, generate)
    reset_peak_memory(model)
    times = [time_generation(model, tokens, generate) for _ in range(repeats)]
    peak = peak_memory(model, baseline_memory)
    prefill, decode = zip(*times, strict=True)
    per_token = [seconds / generate for seconds in decode]
    rows: list[Json] = [
        median_row("prefill_latency", prefill, "s"),
        median_row("prefill_throughput", [batch * prompt / seconds for seconds in prefill], "tokens/s"),
        median_row("decode_latency", per_token, "s/token"),
        median_row("decode_throughput", [batch / seconds for seconds in per_token], "tokens/s"),
        {"metric": "peak_memory", "value": peak, "spread": None, "unit": "bytes"},
    ]
    settings: Json = {"batch": batch, "prompt": prompt, "generate": generate, "repeats": repeats, "warmup": warmup}
    return [{**row, "simulated": simulated, "settings": settings} for row in rows]


def median_row(metric: str, values: Sequence[float], unit: str) -> Json:
    """Median of repeated measurements, and their interquartile range (None for one alone)."""
    spread = None
    if len(values) > 1:
        low, _, high = quantiles(values, n=4, method="inclusive")
        spread = high - low
    return {"metric": metric, "value": median(values), "spread": spread, "unit": unit}


def time_generation(model: PreTrainedModel, tokens: Tensor, generate: int) -> tuple[float, float]:
    """Seconds of prefill over `tokens` [batch, prompt], and of `generate` decoding passes after it."""
    with torch.inference_mode():
        started = now(model)
        output = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        read = now(model)
        for _ in range(generate):
            next_tokens = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=next_tokens, past_key_values=output.past_key_values, use_cache=True)
        return read - started, now(model) - read


def now(model: PreTrainedModel) -> float:
    """Seconds on a steady clock, once the device has done all of its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def is_simulated(model: PreTrainedModel) -> bool:
    """Whether some module computes with something else than what it stores, or only as if with few bits."""
    from coppice.models.modules import PackedForm

    return hasattr(model.model, "cache_settings") or any(
        isinstance(module, PackedForm) or hasattr(module, "quantized_activations") for module in model.modules()
    )


def reset_peak_memory(model: PreTrainedModel) -> None:
    """Restarts the measurement of `peak_memory`, where the system can."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        return
    # Where this is refused, the peak includes that of loading the model.
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def peak_memory(model: PreTrainedModel, baseline: int) -> int:
    """The most bytes held since `reset_peak_memory`: allocated on CUDA, else resident above `baseline`."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    return max(0, resident_bytes("VmHWM") - baseline)


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process in bytes: now (VmRSS) or at its largest (VmHWM)."""
    try:
        status = (PROCESS / "status").read_text()
        return 1024 * int(status.split(f"{field}:")[1].split()[0])
    except (OSError, IndexError):
        # Systems without /proc report the largest only.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
