"""Faults of jobs. $FAULTS is a folder of files <stage>.<fault>; the job that takes one away suffers it.

- kill: SIGKILL just before the last of its files is put in its place;
- interrupt: SIGINT, as by Ctrl-C, just before the first is;
- wait: it waits just before the first is, having made the file <stage>.waits;
- full: its files may not grow beyond a kilobyte, which the system refuses as it refuses to write to a full disk.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

LAST = ("manifest.json", "metrics.json", "study.yaml", "items.parquet", "fit.json", "index.html", "runs.json")


def begin():
    """From now on this process, which runs `python -m coppice <stage>`, suffers the faults of its stage."""
    faults = Path(os.environ["FAULTS"]) / sys.orig_argv[3]
    if taken(faults, "full"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    os.replace = suffer(faults, os.replace)


def suffer(faults, replace):
    def disturbed(source, target, **options):
        last = Path(target).name in LAST and not Path(target).parent.name.startswith(".partial-")
        if last and taken(faults, "kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if taken(faults, "interrupt"):
            os.kill(os.getpid(), signal.SIGINT)
        if taken(faults, "wait"):
            faults.with_suffix(".waits").touch()
            time.sleep(300)
        return replace(source, target, **options)

    return disturbed


def taken(faults, fault):
    """Whether a fault of a stage was there to be taken away."""
    try:
        faults.with_suffix(f".{fault}").unlink()
    except FileNotFoundError:
        return False
    return True
