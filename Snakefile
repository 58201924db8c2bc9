"""Coppice: a study as a tree of compressed and recovered models. The stages are in rules/, the package in workflow/."""

import sys
from os import environ, pathsep
from pathlib import Path

from snakemake.utils import min_version

min_version("9.20")

# Snakemake merges a --configfile into what the directive `configfile:` names. A study replaces the default study instead
# of adding to it, so the default is read only when none is given; --config changes single keys of either.
if not workflow.configfiles:

    configfile: "config/config.yaml"


# Jobs run this interpreter and this package, whether or not an environment is activated.
PACKAGE = str(Path(workflow.basedir) / "workflow")
sys.path.insert(0, PACKAGE)
environ["PATH"] = f"{Path(sys.executable).parent}{pathsep}{environ['PATH']}"
environ["PYTHONPATH"] = f"{PACKAGE}{pathsep}{environ.get('PYTHONPATH', '')}"


include: "rules/common.smk"


environ.update(store_variables())

STUDY = checked_study(config)
JOBS = JobGraph(STUDY)
RESULTS = f"results/{STUDY.study}"


pathvars:
    results=RESULTS,
    logs=f"{RESULTS}/logs",
    benchmarks=f"{RESULTS}/benchmarks",


wildcard_constraints:
    model=patterns.alternation(STUDY.models),
    node=patterns.node(STUDY),
    calibration=patterns.alternation(STUDY.calibrations),


localrules:
    all,


rule all:
    default_target: True
    input:
        in_results([job.output for job in JOBS.jobs if job.stage in ("root", "compress", "recover", "evaluate")]),
        in_results([*JOBS.fits, JOBS.report.output, JOBS.track.output]),


for stage in "root tokens calibrate compress recover evaluate tables laws report track".split():

    include: f"rules/{stage}.smk"
