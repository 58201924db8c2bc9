"""Faults of jobs. $FAULTS is a folder of files <stage>.<fault>; the job that takes one away suffers it.

- kill: SIGKILL just before the last of its files is put in its place;
- interrupt: SIGINT, as by Ctrl-C, just before the first is;
- wait: it waits just before the first is, having made the file <stage>.waits.
"""

import os
import signal
import sys
import time
from pathlib import Path

LAST = ("manifest.json", "metrics.json", "study.yaml", "items.parquet", "fit.json", "index.html", "runs.json")


def begin():
    """From now on this process, which runs `python -m coppice <stage>`, suffers the faults of its stage."""
    os.replace = suffer(sys.orig_argv[3], Path(os.environ["FAULTS"]), os.replace)


def suffer(stage, faults, replace):
    def disturbed(source, target, **options):
        last = Path(target).name in LAST and not Path(target).parent.name.startswith(".partial-")
        if last and taken("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if taken("interrupt"):
            os.kill(os.getpid(), signal.SIGINT)
        if taken("wait"):
            (faults / f"{stage}.waits").touch()
            time.sleep(300)
        return replace(source, target, **options)

    def taken(fault):
        try:
            (faults / f"{stage}.{fault}").unlink()
        except FileNotFoundError:
            return False
        return True

    return disturbed
