"""Which of a machine's GPUs a job computes on: one that no other job has.

Snakemake counts GPUs and a scheduler hands them out, but jobs that share a machine, or one allocation of a scheduler,
see all that there are. Each claims its own by a lock on a file named after the device, held until the process ends,
however it ends. Folders of locks are a user's and an allocation's own.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from pathlib import Path
from typing import IO

from coppice.errors import UserError

# Identify the allocation of a scheduler, within which devices have names of their own.
ALLOCATIONS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
PAUSE = 0.5  # seconds between two looks for a free device

_claims: list[IO[str]] = []  # held open, and so locked, until the process ends


def visible() -> list[str]:
    """The devices that this process sees, by index or by what CUDA_VISIBLE_DEVICES calls them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def claim(count: int = 1) -> None:
    """Makes `count` devices that are free this job's own, and the only ones that CUDA sees; waits until there are.

    To be called before CUDA is used. Does nothing where there is no device, or one and no more. Raises UserError where
    there are fewer than `count`, but some.
    """
    devices = visible()
    if devices and len(devices) < count:
        raise UserError(
            f"The step asks for {count} GPUs (gpus), but this job sees {len(devices)}; set gpus to what one machine "
            "has, or run it on a machine that has more."
        )
    if len(devices) < 2:
        return
    told = False
    while len(taken := _lock(devices, count)) < count:
        if not told:
            print(f"All {len(devices)} GPUs are taken; waiting for {count}.", flush=True)
            told = True
        time.sleep(PAUSE)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)


def _lock(devices: list[str], count: int) -> list[str]:
    """Locks `count` free devices, or none, so that jobs that want several do not wait for each other."""
    folder = _folder()
    taken: dict[str, IO[str]] = {}
    for device in devices:
        if len(taken) == count:
            break
        file = open(folder / device.replace("/", "-"), "w")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken[device] = file
        except BlockingIOError:
            file.close()
    if len(taken) < count:
        for file in taken.values():
            file.close()
        return []
    _claims.extend(taken.values())
    return list(taken)


def _folder() -> Path:
    """Of the locks of this user in this allocation, or on this machine. Raises UserError where another user has it."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    own = runtime.is_absolute() and runtime.is_dir()
    base = runtime if own else Path(tempfile.gettempdir()) / f"coppice-{os.getuid()}"
    allocation = next((os.environ[name] for name in ALLOCATIONS if os.environ.get(name)), "machine")
    base.mkdir(exist_ok=True, mode=0o700)
    if base.stat().st_uid != os.getuid():
        raise UserError(f"{base} is another user's; remove it, or set TMPDIR to a folder of your own.")
    folder = base / "coppice-devices" / allocation
    folder.mkdir(parents=True, exist_ok=True)
    return folder
