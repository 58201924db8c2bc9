"""What a job requests from a scheduler: memory, disk space and minutes, by the checkpoints that it reads.

A first attempt requests these, and each further one as much more. Memory and disk are whole gigabytes, so that jobs
with equal requests can be one array.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from math import ceil
from pathlib import Path

from coppice.errors import UserError
from coppice.planning import resources
from coppice.planning.jobs import Job
from coppice.records.manifest import Manifest
from coppice.records.node_name import NodeName

# A recovery resumes from its state when its time is over.
MINUTES = {"calibrate": 120, "compress": 480, "recover": 1440, "evaluate": 480, "fit": 60}
# Megabytes for a model whose manifest cannot be read yet: in a dry run, or where results are stored elsewhere.
UNREAD_MEGABYTES = 8_000
MODELS = "/models/"


def memory_megabytes(job: Job, checkpoint: str, attempt: int) -> int:
    """Memory of a job by the size of the model whose manifest is at `checkpoint`."""
    manifest = available_manifest(checkpoint)
    if manifest is None:
        return attempt * UNREAD_MEGABYTES
    return attempt * 1_000 * ceil(resources.memory_bytes(job.stage, manifest, job.options) / 1e9)


def disk_megabytes(job: Job, checkpoint: str, others: Iterable[str], attempt: int) -> int:
    """Disk space for what a job fetches and writes. others: manifests of the other checkpoints that it reads."""
    own, *rest = map(available_manifest, [checkpoint, *others])
    if own is None or None in rest:
        return attempt * UNREAD_MEGABYTES
    fetched = sum(manifest.stored_bytes for manifest in (own, *rest) if manifest is not None)
    needed = resources.disk_bytes(job.stage, own, fetched, job.options)
    return attempt * 1_000 * (1 + ceil(needed / 1e9))


def available_manifest(path: str) -> Manifest | None:
    """The manifest of a checkpoint, or of its root where the checkpoint does not exist yet.

    A root is seldom smaller than its descendants. None as long as neither exists, or where it is damaged, which the job
    itself will report.
    """
    before, _, below = path.rpartition(MODELS)
    node = NodeName(below.removesuffix("/manifest.json"))
    for name in (node, node.model):
        with suppress(UserError):
            return Manifest.read(Path(f"{before}{MODELS}{name}/manifest.json"))
    return None
