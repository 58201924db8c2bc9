"""Python imports this at its start where this folder is on PYTHONPATH: faults of jobs, and jobs that are forks.

The jobs of the stage $ALONE are new interpreters all the same.
"""

import os
import sys

if sys.orig_argv[1:3] == ["-m", "coppice"]:
    if "FORKS" in os.environ and sys.orig_argv[3] != os.environ.get("ALONE"):
        import forks

        forks.hand_over(os.environ["FORKS"])
    elif "FAULTS" in os.environ:
        import faults

        faults.begin()
