"""What only Snakemake knows: from wildcards to jobs, from jobs to paths, resources by the attempt, storage settings.

The jobs themselves are those of `coppice.planning.jobs`, which `coppice plan` reads too.
"""

import json
from os.path import relpath
from shlex import join

from coppice.errors import UserError
from coppice.files import fingerprint
from coppice.models.contracts import KINDS
from coppice.planning import patterns, requests
from coppice.planning.jobs import JobGraph
from coppice.planning.storage_environment import storage_environment
from coppice.study.loading import effective, load_study

# Jobs


def job_of(wildcards):
    """The job whose output has these wildcards."""
    try:
        return JOBS.job(**dict(wildcards.items()))
    except UserError as error:
        raise WorkflowError(str(error)) from None


def in_results(paths):
    """Paths of the job graph, which are relative to the results, as Snakemake's."""
    return [f"{RESULTS}/{path}" for path in paths]


def outputs_read(job):
    """The outputs of other jobs that a job reads, by name."""
    return {name: in_results(paths) for name, paths in job.inputs.items()}


def job_inputs(wildcards):
    """What a job reads: outputs of others by name, files of models and texts, and source files of the package."""
    job = job_of(wildcards)
    return {**outputs_read(job), "files": local_inputs(job.files), "sources": source_inputs(job.source_files)}


def parameter(name):
    """A function for one of a job's parameters."""

    def value(wildcards):
        return job_of(wildcards).parameters[name]

    return value


def folder_options(option, paths):
    """`--option DIR` for the folder of each path."""
    return [word for path in paths for word in (option, os.path.dirname(path))]


def step_options(wildcards, input):
    """The options of `coppice compress` that name what only some steps read."""
    return [word for name in ("statistics", "tokens", "reference") for word in folder_options(f"--{name}", input[name])]


def measurement_options(wildcards, input):
    """The options of `coppice evaluate` that name the tokens of each protocol, and the node to compare with."""
    protocols = zip(job_of(wildcards).parameters["protocols"], input.tokens)
    tokens = [word for name, path in protocols for word in ("--tokens", f"{name}={os.path.dirname(path)}")]
    return [*folder_options("--other", input.get("other", [])), *tokens]


def budget_options(wildcards):
    """The option of `coppice recover` for the budgets that a recovery may reach."""
    budgets = job_of(wildcards).parameters["budgets"]
    return ["--budgets", ",".join(map(str, budgets))] if budgets else []


def state_folder(wildcards):
    """Where a recovery keeps what it resumes from; not an output, as those are deleted before a job starts."""
    return f"{RESULTS}/state/{job_of(wildcards).name}"


# Resources


def memory(wildcards, input, attempt):
    return requests.memory_megabytes(job_of(wildcards), own_checkpoint(input), attempt)


def disk(wildcards, input, attempt):
    own = own_checkpoint(input)
    others = {path for path in input if requests.MODELS in path} - {own}
    return requests.disk_megabytes(job_of(wildcards), own, others, attempt)


def minutes(wildcards, attempt):
    return attempt * requests.MINUTES[job_of(wildcards).stage]


def own_checkpoint(input):
    """The checkpoint of the model that a job loads."""
    [manifest] = input.get("parent") or input.get("model")
    return manifest


def recovery_gpus(wildcards):
    """A recovery asks for as many GPUs as its step names."""
    return job_of(wildcards).gpus


def all_cores():
    """The cores that a run may use. A cluster has none of its own; its profile says how many a job gets."""
    return workflow.resource_settings.cores or 1


# Results stored elsewhere, under a default storage provider


def stored_elsewhere():
    return workflow.storage_settings.default_storage_provider is not None


def local_inputs(files):
    """Files on this machine, in no storage. Where results are stored elsewhere their dates do not count: every checkout
    has its own."""
    return ancient(local(list(files))) if stored_elsewhere() else list(files)


def source_inputs(files):
    """Source files as inputs, where their dates count. Where results are stored elsewhere their content counts instead:
    a job with a local input would not run in a cluster's pod."""
    return [] if stored_elsewhere() else files


def source_hash_param():
    """A parameter that changes with the content of a job's source files, where their dates do not count."""
    return {"content": source_hash} if stored_elsewhere() else {}


def source_hash(wildcards):
    return job_of(wildcards).source_hash


def study_files():
    """The files of the study, its models and its texts, where results are stored elsewhere.

    What was written there for an older study is outdated. On one machine Snakemake's own records say so, but they do
    not travel. Of models and texts only the tables are recomputed, which compare their content.
    """
    if not stored_elsewhere():
        return []
    models = [file for model in STUDY.models for file in JOBS.node(model).files]
    texts = [text.path for text in STUDY.texts.values() if hasattr(text, "path")]
    return local([*config_files(), *models, *texts])


def store_variables():
    """The environment variables that say where files go that no rule declares."""
    if not stored_elsewhere():
        return {}
    provider, prefix = (
        getattr(workflow.storage_settings, f"default_storage_{name}") for name in ("provider", "prefix")
    )
    plugin = workflow.storage_provider_settings.get("s3")
    try:
        return storage_environment(provider, prefix or "", plugin and plugin.get_settings(None), environ)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


# Configuration


def checked_study(config):
    """The study of a config; a broken one ends the run with its sentence instead of a traceback."""
    try:
        return load_study(config)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def config_files():
    return [relpath(file) for file in workflow.configfiles]


def config_changes():
    """What --config changes, as JSON."""
    return json.dumps(dict(workflow.config_settings.config))


def tracking_uri():
    return STUDY.tracking.uri or "sqlite:///results/mlflow.db"


def salvage_command(logs):
    """The command that gathers, reports and tracks what a run with failures achieved."""
    fetch = ["--fetch"] if stored_elsewhere() else []
    words = [*config_files(), "--config", config_changes(), "--results", RESULTS, "--uri", tracking_uri(), *fetch]
    return f"python -m coppice salvage {join([*words, '--logs', *map(str, logs)])}"
