"""Which of a machine's GPUs a job computes on: one that no other job uses.

Snakemake counts GPUs and a scheduler assigns them, but jobs that share a machine, or one allocation of a scheduler, see
all of them. Each claims its own by a lock on a file named after the device, held until the process ends, however it
ends. Every user and every allocation has its own folder of locks.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from coppice.errors import UserError

# Identify the allocation of a scheduler, within which devices have their own names.
ALLOCATIONS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
MACHINE = "machine"  # in place of an allocation, without a scheduler
PAUSE = 0.5  # seconds between two searches for a free device
# Neither XDG_RUNTIME_DIR nor TMPDIR, which some jobs of a user have and others do not (of cron, for instance).
LOCKS = Path("/tmp")

_claims: list[IO[str]] = []  # held open, and so locked, until the process ends


def visible_devices() -> list[str]:
    """The devices that this process sees, by index or by what CUDA_VISIBLE_DEVICES calls them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None:
        return [name.strip() for name in names.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def claim(count: int = 1) -> None:
    """Reserves `count` devices for this job, the only ones that CUDA then sees; waits until that many are free.

    To be called before CUDA is used. A job that sees a single device computes on it, whether or not others do; other
    jobs on the machine see that it is taken. Raises UserError where the machine has devices, but fewer than `count`.
    """
    devices = visible_devices()
    if devices and len(devices) < count:
        raise UserError(
            f"The step requests {count} GPUs (gpus), but this job sees {len(devices)}; set gpus to what one machine "
            "has, or run it on a machine that has more."
        )
    if len(devices) < 2:
        if devices and _allocation() == MACHINE:
            _lock(devices, 1)
        return
    announced = False
    while len(taken := _lock(devices, count)) < count:
        if not announced:
            print(f"All {len(devices)} GPUs are taken; waiting for {count}.", flush=True)
            announced = True
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
        for lock in taken.values():
            lock.close()
        return []
    _claims.extend(taken.values())
    return list(taken)


def _folder() -> Path:
    """Of this user's locks in this allocation, or on this machine. Raises UserError where another user owns it."""
    base = LOCKS / f"coppice-{os.getuid()}"
    base.mkdir(exist_ok=True, mode=0o700)
    if base.lstat().st_uid != os.getuid():
        raise UserError(f"{base} belongs to another user; its owner or an administrator can remove it.")
    folder = base / "devices" / _allocation()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _allocation() -> str:
    return next((os.environ[name] for name in ALLOCATIONS if os.environ.get(name)), MACHINE)
