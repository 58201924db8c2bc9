"""Functions that the rules share: names as patterns, names as paths, and what a node is made from."""

import json
from contextlib import suppress
from math import ceil, inf
from os.path import relpath
from shlex import join, quote
from urllib.parse import urlencode, urlsplit

from coppice import laws
from coppice.planning import resources as needs
from coppice.study import tree
from coppice.errors import UserError
from coppice.files import fingerprint, read_json, sha256
from coppice.methods.contracts import KINDS
from coppice.models.sources import dense_files, locate
from coppice.records.node_name import NodeName
from coppice.study.loading import effective, load_study
from coppice.study.schema import FileText, HubModel

# Patterns


def alternation(names):
    """A pattern that matches one of the names; one that matches nothing when there are none."""
    return f"(?:{'|'.join(map(re.escape, names))})" if names else "(?!)"


def part_pattern(training):
    """Parts of a node's path: the steps that train or those that do not, with the seed that may follow."""
    return alternation([step for step in STUDY.steps if tree.trains(STUDY, step) == training]) + r"(?:@\d+)?"


def node_pattern():
    """A node: a model and its steps."""
    return rf"{alternation(STUDY.models)}(?:/{alternation(STUDY.steps)}(?:@\d+)?)*"


def evaluation_pattern(kind):
    """The evaluations of a kind."""
    return alternation([name for name, evaluation in STUDY.evaluations.items() if evaluation.kind == kind])


# Paths


def checkpoint(node):
    return f"{RESULTS}/models/{node}/manifest.json"


def checkpoints():
    return [checkpoint(node) for node in NODES]


def metrics():
    return [
        f"{RESULTS}/evaluations/{node}/{name}/metrics.json" for node in NODES for name in tree.evaluations(STUDY, node)
    ]


def tokens(model, use):
    return f"{RESULTS}/tokens/{model}/{use}/manifest.json"


def fits():
    """All that the fits write: the report and the tracker read more than fit.json."""
    files = ("fit.json", "points.parquet", "samples.parquet", "fit.svg")
    return [f"{RESULTS}/laws/{law}/{file}" for law in STUDY.laws for file in files]


def everything():
    return [*checkpoints(), *metrics(), *fits(), f"{RESULTS}/report/index.html", f"{RESULTS}/tracking/runs.json"]


def options(name, paths):
    """`--name DIR` for the folder of each path."""
    return [word for path in paths for word in (name, os.path.dirname(path))]


# Roots and tokens


def files_of_model(name):
    """The files of a local or shipped model: its config, its tokenizer and its weights."""
    model = STUDY.models[name]
    if isinstance(model, HubModel):
        return []
    return [relpath(file) for file in dense_files(locate(model.model_dump()))]


def files_of_text(name):
    text = STUDY.texts[name]
    return [text.path] if isinstance(text, FileText) else []


def model_files(wildcards):
    return here(files_of_model(wildcards.model))


def model_source(wildcards):
    return STUDY.models[wildcards.model].model_dump_json()


def text_files(wildcards):
    return here(files_of_text(token_use(wildcards).text))


def token_use(wildcards):
    return USES[wildcards.use]


def text_source(wildcards):
    return STUDY.texts[token_use(wildcards).text].model_dump_json(exclude_none=True)


def text_role(wildcards):
    return token_use(wildcards).role


def text_windows(wildcards):
    return token_use(wildcards).windows or 0


def text_length(wildcards):
    return token_use(wildcards).length


def text_packing(wildcards):
    return [] if token_use(wildcards).pack else ["--no-pack"]


# Nodes


def made_node(wildcards):
    """The node that a job makes. Its name must be one of the study's."""
    name = f"{wildcards.parent}/{wildcards.part}"
    if name not in NODES:
        raise WorkflowError(f"{name} is no node of the study {STUDY.study}; `coppice study` prints its tree.")
    return NODES[name]


def node_seed(wildcards):
    return made_node(wildcards).seed


def node_step(wildcards):
    """The step that makes a node, as JSON. On how many GPUs changes nothing of the node, and is a resource."""
    name = made_node(wildcards).step
    step = STUDY.steps[name]
    told = step.options.model_dump(mode="json", exclude={"gpus"})
    return json.dumps({"name": name, "method": step.method, "options": told})


def source_files(method):
    """The files of a method and of its solvers: a changed one makes the nodes that rest on it anew and no others.

    They are relative to the working directory, so that a project that moves as a whole stays done.
    """
    return [relpath(file) for file in method.files]


def method_content(wildcards):
    """The content of the files of a method and of its solvers."""
    return content(source_files(tree.method_of(STUDY, made_node(wildcards).step)))


def compress_input(wildcards):
    """What a step reads besides the parent.

    Statistics, or the tokens to gather them itself; for a step that compensates, what the linears computed before.
    """
    node = made_node(wildcards)
    method = tree.method_of(STUDY, node.step)
    calibration = tree.calibration(STUDY, node.step)
    statistics = f"{RESULTS}/statistics/{node.parent}/{calibration}"
    return {
        "statistics": [f"{statistics}/{kind}/manifest.json" for kind in tree.kinds(STUDY, node.step)],
        "tokens": (
            [tokens(node.model, f"calibration.{calibration}")] if tree.reads_windows(STUDY.steps[node.step]) else []
        ),
        "reference": [checkpoint(tree.reference(STUDY, node.parent))] if method.family == "compensate" else [],
        "method": code(source_files(method)),
    }


def step_sources(wildcards, input):
    """The options of `coppice compress` for what only some steps read."""
    return [
        *options("--statistics", input.statistics),
        *options("--tokens", input.tokens),
        *options("--reference", input.reference),
    ]


def recover_input(wildcards):
    """What a step that trains reads besides the parent."""
    node = made_node(wildcards)
    return {
        "dense": checkpoint(node.model),
        "tokens": tokens(node.model, f"recovery.{node.step}"),
        "validation": tokens(node.model, f"validation.{node.step}"),
        "method": code(source_files(tree.method_of(STUDY, node.step))),
    }


def calibration_tokens(wildcards):
    return tokens(NodeName(wildcards.node).model, f"calibration.{wildcards.calibration}")


def node_budgets(wildcards):
    """The option of `coppice recover` for the rungs of the ladder that a recovery may reach."""
    step = made_node(wildcards).step
    # A method that says itself how many tokens it trains on may train on more.
    trained = inf if hasattr(tree.method_of(STUDY, step).module, "tokens") else STUDY.steps[step].options.tokens
    budgets = [str(budget) for budget in sorted(set(STUDY.budgets)) if budget <= trained]
    return ["--budgets", ",".join(budgets)] if budgets else []


def node_state(wildcards):
    """Where a recovery keeps what it needs to go on after an interruption; no output, as those are deleted first."""
    return f"{RESULTS}/state/{made_node(wildcards).name}"


# Evaluations, laws, tracking


def evaluation_options(wildcards):
    """An evaluation as JSON; which nodes it measures is no part of how it measures.

    Options that are null are left out, so that one that is new and off measures nothing again.
    """
    evaluation = STUDY.evaluations[wildcards.evaluation]
    world = tree.world(STUDY, evaluation)
    described = {"world": STUDY.texts[world].model_dump(mode="json")} if world else {}
    asked = evaluation.model_dump(mode="json", exclude={"nodes", "world"})
    # Within a protocol null says something: all windows.
    return json.dumps({**{key: value for key, value in asked.items() if value is not None}, **described})


def token_sets():
    """The token sets that the nodes are calibrated, trained and measured on."""
    found = set()
    for name, node in NODES.items():
        if node.step and tree.trains(STUDY, node.step):
            found |= {tokens(node.model, f"{use}.{node.step}") for use in ("recovery", "validation")}
        elif node.step and (calibration := tree.calibration(STUDY, node.step)):
            found.add(tokens(node.model, f"calibration.{calibration}"))
        for evaluation in tree.evaluations(STUDY, name):
            protocols = tree.protocols(STUDY.evaluations[evaluation])
            found |= {tokens(node.model, f"evaluation.{evaluation}.{protocol}") for protocol in protocols}
    return sorted(found)


def twin_checkpoint(wildcards):
    """The node that was made alike but with the study's seed."""
    return checkpoint(NodeName(wildcards.node).with_study_seed)


def evaluation_tokens(wildcards):
    """The tokens of each protocol, in the order of the protocols."""
    model = NodeName(wildcards.node).model
    protocols = tree.protocols(STUDY.evaluations[wildcards.evaluation])
    return [tokens(model, f"evaluation.{wildcards.evaluation}.{protocol}") for protocol in protocols]


def protocol_sources(wildcards, input):
    """The options of `coppice evaluate` for its tokens."""
    protocols = tree.protocols(STUDY.evaluations[wildcards.evaluation])
    return [
        word
        for protocol, path in zip(protocols, input.tokens)
        for word in ("--tokens", f"{protocol}={os.path.dirname(path)}")
    ]


def law_name(wildcards):
    return STUDY.laws[wildcards.law].law


def law_sources(wildcards):
    """The files of the law and of the engine.

    A changed law is fitted anew, as is one that rests on it; a changed engine fits all of them anew.
    """
    folder = Path(laws.__file__).parent
    found, waiting = {folder / "__init__.py"}, {law_name(wildcards).replace("-", "_"), "stage"}
    while waiting:
        file = folder / f"{waiting.pop()}.py"
        if file.is_file() and file not in found:
            found.add(file)
            waiting |= law_modules(file.read_text(encoding="utf-8"))
    return sorted(map(relpath, found))


def law_points(wildcards):
    """The file of the points, where the law's options name one instead of the tables."""
    points = STUDY.laws[wildcards.law].options.get("file")
    return [points] if points else []


def law_files(wildcards):
    """What a fit reads besides the tables."""
    return [*code(law_sources(wildcards)), *here(law_points(wildcards))]


def law_content(wildcards):
    """The content of the files of a law."""
    return content([*law_sources(wildcards), *law_points(wildcards)])


def law_modules(text):
    """What a module's text imports from the package of laws: modules, and other names among them."""
    packages = re.findall(r"^\s*from coppice\.laws import (.+)$", text, re.MULTILINE)
    modules = re.findall(r"^\s*from coppice\.laws\.(\w+) import", text, re.MULTILINE)
    return {name for names in packages for name in re.findall(r"\w+", names)} | set(modules)


def law_options(wildcards):
    return json.dumps(STUDY.laws[wildcards.law].options)


def tracking_uri():
    return STUDY.tracking.uri or "sqlite:///results/mlflow.db"


# Resources: what a scheduler of a cluster must know. What a machine has is said by the profiles.

# A first attempt; each further one gets as many more. A recovery goes on from its state.
MINUTES = {"calibrate": 120, "compress": 480, "recover": 1440, "evaluate": 480, "fit": 60}
# Megabytes of a model whose manifest cannot be read yet: in a dry run, or where results are stored elsewhere.
UNREAD = {"mem_mb": 8_000, "disk_mb": 8_000}


def memory(stage):
    """A function for the memory of a stage's jobs, by the size of the model that they read, in megabytes.

    In whole gigabytes, as the disk is: jobs that ask for the same can be one array.
    """

    def megabytes(wildcards, input, attempt):
        read = model_manifest(own_checkpoint(input))
        if read is None:
            return attempt * UNREAD["mem_mb"]
        return attempt * 1_000 * ceil(needs.memory_bytes(stage, read, job_options(stage, wildcards)) / 1e9)

    return megabytes


def disk(stage):
    """A function for the room that a stage's jobs need for what they fetch and write, in megabytes."""

    def megabytes(wildcards, input, attempt):
        own, *others = map(model_manifest, [own_checkpoint(input), *other_checkpoints(input)])
        if own is None or None in others:
            return attempt * UNREAD["disk_mb"]
        fetched = sum(read["stored_bytes"] for read in (own, *others))
        needed = needs.disk_bytes(stage, own, fetched, job_options(stage, wildcards))
        return attempt * 1_000 * (1 + ceil(needed / 1e9))

    return megabytes


def minutes(stage):
    """A function for the time that a stage's jobs may take, in minutes."""

    def limit(wildcards, attempt):
        return attempt * MINUTES[stage]

    return limit


def own_checkpoint(input):
    """The checkpoint of the model that a job is about."""
    return input.parent if hasattr(input, "parent") else input.model


def other_checkpoints(input):
    """What a job reads beside it: a reference, a twin, the dense root."""
    return {path for path in input if f"{RESULTS}/models/" in path} - {own_checkpoint(input)}


def model_manifest(path):
    """The manifest of a checkpoint that a job reads, or of its root where that is not at hand.

    A root is seldom smaller than what is made of it. A model may be not yet made, or made in a pod. None as long as
    neither is there, or broken, as the job will say.
    """
    models = f"{RESULTS}/models/"
    before, _, node = path.rpartition(models)
    for name in (node, f"{node.partition('/')[0]}/manifest.json"):
        with suppress(UserError):
            return read_json(Path(f"{before}{models}{name}"))
    return None


def job_options(stage, wildcards):
    """What a job's memory and disk depend on besides the model."""
    if stage == "calibrate":
        calibration = STUDY.calibrations[wildcards.calibration]
        return {"windows": calibration.windows, "length": calibration.length, "kind": wildcards.kind}
    if stage in ("compress", "recover"):
        name = made_node(wildcards).step
        step = STUDY.steps[name]
        return {**step.options.model_dump(mode="json"), "method": step.method, "kinds": tree.kinds(STUDY, name)}
    return {"kind": STUDY.evaluations[wildcards.evaluation].kind}


def all_cores():
    """The cores that a run may use. A cluster has none of its own; its profile says how many a job gets."""
    return workflow.resource_settings.cores or 1


def recovery_gpus(wildcards):
    """A recovery asks for as many GPUs as its step names."""
    return STUDY.steps[made_node(wildcards).step].options.gpus


# Results elsewhere, under a default storage provider


def stored_elsewhere():
    return workflow.storage_settings.default_storage_provider is not None


def here(files):
    """Files that lie where Snakemake runs, in no storage. There their dates do not count: every checkout has its own."""
    return ancient(local(files)) if stored_elsewhere() else files


def code(files):
    """Source files as inputs, where their dates count.

    Where results lie elsewhere they do not: a change is `noticed` by its content. A job with a local input would run
    beside Snakemake there, and not in a cluster's pod.
    """
    return [] if stored_elsewhere() else files


def study_files():
    """The files of the study, its models and its texts where results lie elsewhere.

    What was made there of an older study is outdated. On one machine Snakemake's own records say so, but they do not
    travel. Of models and texts only the tables are made again, which compare their content.
    """
    if not stored_elsewhere():
        return []
    models = [file for name in STUDY.models for file in files_of_model(name)]
    texts = [file for name in STUDY.texts for file in files_of_text(name)]
    return local([*config_files(), *models, *texts])


def noticed(content):
    """A parameter that changes with the content of a job's source files, where their dates do not count."""
    return {"content": content} if stored_elsewhere() else {}


def content(files):
    return fingerprint({file: sha256(file) for file in files})


def store_variables():
    """The environment's variables that say where files travel to that no rule declares, beside the results.

    The settings of the storage plugin hold for them too. Credentials stay out of the address, which logs may show.
    """
    if not stored_elsewhere():
        return {}
    settings = workflow.storage_settings
    prefix = settings.default_storage_prefix or ""
    if prefix and quote(prefix) != prefix:
        raise SystemExit(
            f"error: The storage prefix {prefix!r} holds a blank or another sign that a shell reads, and jobs' commands "
            "name files below it; choose a prefix of letters, digits and the signs . _ - /"
        )
    if "COPPICE_STORE" in environ:
        return {}
    if settings.default_storage_provider == "fs":
        return {"COPPICE_STORE": os.path.abspath(prefix)}
    if settings.default_storage_provider == "s3":
        return s3_variables(prefix)
    raise SystemExit(
        "error: Set COPPICE_STORE to where weights are to be stored beside the results of the storage provider "
        f"{settings.default_storage_provider}: a folder, or an address that Apache Arrow reads, as gs://bucket/prefix."
    )


def s3_variables(prefix):
    plugin = workflow.storage_provider_settings.get("s3")
    settings = plugin and plugin.get_settings(None)
    options, keys = {"allow_bucket_creation": "true"}, {}
    if settings and settings.endpoint_url:
        server = urlsplit(settings.endpoint_url)
        options |= {"region": settings.region, "scheme": server.scheme, "endpoint_override": server.netloc}
    if settings:
        keys = {
            "AWS_ACCESS_KEY_ID": settings.access_key,
            "AWS_SECRET_ACCESS_KEY": settings.secret_key,
            "AWS_SESSION_TOKEN": settings.token,
        }
    given = {name: value for name, value in keys.items() if value}
    return {"COPPICE_STORE": f"{prefix.rstrip('/')}?{urlencode(options)}", **given}


# Configuration


def checked_study(config):
    """The study of a config; a broken one ends the run with its sentence, and with no line of a traceback."""
    try:
        return load_study(config)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def config_files():
    return [relpath(file) for file in workflow.configfiles]


def config_changes():
    """What --config changes, as JSON."""
    return json.dumps(dict(workflow.config_settings.config))


def partial_results(logs):
    """The command that gathers, shows and tracks what a run with failures achieved; its tables are dated 1970.

    Where nothing failed but tracking itself, tables and report are whole, and stay as they are. Who stops a run by
    Ctrl-C does not wait for them, and what is interrupted has not failed.
    """
    said = "".join(Path(log).read_text() for log in logs)
    failed = set(re.findall(r"Error in rule (\w+)", said))
    if "Terminating processes on user request" in said or failed == {"track"}:
        return "true"
    study = f"{RESULTS}/study.yaml"
    gather = [
        *([["fetch", "--results", RESULTS]] if stored_elsewhere() else []),
        ["study", *config_files(), "--config", config_changes(), "--output", study],
        ["tables", "--study", study, "--results", RESULTS, "--output", f"{RESULTS}/tables", "--partial"],
    ]
    show = ["report", "--study", study, "--results", RESULTS, "--output", f"{RESULTS}/report"]
    track = ["track", "--study", study, "--results", RESULTS, "--uri", tracking_uri()]
    track += ["--output", f"{RESULTS}/tracking/runs.json"]
    *gathered, shown, tracked = (f"python -m coppice {join(words)}" for words in (*gather, show, track))
    return " && ".join([*gathered, told_page(shown), tracked])


def told_page(command):
    """The command that makes the page, and says where it lies or how to learn why there is none.

    Its own failure is quiet: the sentence that counts is that of the job that failed.
    """
    page = quote(f"What there is, and what failed, is told in {RESULTS}/report/index.html.")
    none = quote(f"There is no page of this run; what says why: {command}")
    return f"{{ if {command} 2> /dev/null; then echo {page}; else echo {none}; fi >&2; }}"
