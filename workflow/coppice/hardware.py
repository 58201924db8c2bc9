"""The devices that the roofline and the plan know by name, with the source of each figure.

Peaks are dense: a data sheet's figure with sparsity is halved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DeviceName = Literal["H200", "H100-SXM", "A100-80G", "A100-40G", "A6000", "L40", "i9-13900K"]

TOOL = "figures of the roofline tool of arXiv 2402.16363"
# Tables of NVIDIA's data sheets, each row with its link.
DATASHEETS = "github.com/astroC86/gpu-datasheet"


@dataclass(frozen=True, kw_only=True)
class Device:
    """bandwidth of the memory [bytes/s]; float16, int8: dense peaks [operations/s]; memory of a GPU [bytes], or None.

    source: of bandwidth and peaks. memory_source: of the memory.
    """

    bandwidth: float
    float16: float
    int8: float
    source: str
    memory: float | None = None
    memory_source: str | None = None


DEVICES: dict[str, Device] = {
    "H200": Device(
        bandwidth=4.8e12,
        float16=1979e12 / 2,
        int8=3958e12 / 2,
        source=f"NVIDIA H200 datasheet, as transcribed at {DATASHEETS}; peaks halved, which are with sparsity",
        memory=141e9,
        memory_source=f"NVIDIA H200 datasheet, as transcribed at {DATASHEETS}",
    ),
    "H100-SXM": Device(
        bandwidth=3072e9,
        float16=989.5e12,
        int8=1979e12,
        source=TOOL,
        memory=80e9,
        memory_source=f"NVIDIA H100 datasheet, as transcribed at {DATASHEETS}",
    ),
    "A100-80G": Device(
        bandwidth=2039e9,
        float16=312e12,
        int8=624e12,
        source=TOOL,
        memory=80e9,
        memory_source=f"NVIDIA A100 datasheet, as transcribed at {DATASHEETS}",
    ),
    "A100-40G": Device(
        bandwidth=1555e9,
        float16=312e12,
        int8=624e12,
        source=TOOL,
        memory=40e9,
        memory_source=f"NVIDIA A100 datasheet, as transcribed at {DATASHEETS}",
    ),
    "A6000": Device(
        bandwidth=768e9,
        float16=154.8e12,
        int8=309.7e12,
        source=TOOL,
        memory=48e9,
        memory_source="sysrqmts.com/es/gpus/compare/nvidia-rtx-a6000-vs-nvidia-tesla-p40",
    ),
    "L40": Device(
        bandwidth=864e9,
        float16=181e12,
        int8=362e12,
        source=TOOL,
        memory=48e9,
        memory_source="yobitel.com/knowledge-base/nvidia-l40",
    ),
    # 8 cores, 5.4 GHz, 32 operations a cycle; no figure for integers is published, so they save bytes only.
    "i9-13900K": Device(bandwidth=89.6e9, float16=8 * 5.4e9 * 32, int8=8 * 5.4e9 * 32, source=TOOL),
}
# Bytes of the devices that are GPUs.
GPU_MEMORY = {name: device.memory for name, device in DEVICES.items() if device.memory is not None}
