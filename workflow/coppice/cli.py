"""`coppice <stage>`: argument parsing only; each stage's module is imported only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from importlib import import_module

from coppice.errors import UserError
from coppice.recovery.distributed import is_launched, launch, local_device, report

STAGES = {
    "study": ("coppice.study.loading", "check a study and print its tree"),
    "plan": ("coppice.planning.stage", "predict what a study will take: time, memory, GPU hours, disk"),
    "root": ("coppice.models.sources", "bring a dense model into a study"),
    "tokenize": ("coppice.data.stage", "pack a text into windows of tokens"),
    "calibrate": ("coppice.calibration.stage", "gather statistics of a node's activations or gradients"),
    "compress": (
        "coppice.compression.stage",
        "make a node by pruning, decomposing, quantizing or compensating its parent",
    ),
    "recover": ("coppice.recovery.stage", "make a node by training its parent"),
    "evaluate": ("coppice.evaluation.stage", "measure a node's quality or cost"),
    "tables": ("coppice.results.collection", "gather a study's results in Parquet"),
    "fit": ("coppice.laws.stage", "fit a law to the tables"),
    "report": ("coppice.report.stage", "write a study's page"),
    "track": ("coppice.tracking", "mirror a study to MLflow"),
    "salvage": ("coppice.tracking.salvage", "gather, report and track what a run with failures achieved"),
    "summary": ("coppice.report.summary", "print a study's results"),
    "show": ("coppice.report.show", "show a node's lineage, sizes and metrics"),
    "recommend": (
        "coppice.decisions.stage",
        "recommend nodes, tokens and next runs from a study's tables and laws, with their uncertainty",
    ),
    "methods": ("coppice.methods.catalogue", "list the registered methods"),
    "fetch": ("coppice.storage", "bring a study's manifests, tables and logs here from where they are stored"),
    "export": ("coppice.export.stage", "write a node in a form that other programs read, and check its logits"),
}
RUNS_MODELS = ("calibrate", "compress", "recover", "evaluate")


def main(words: list[str] | None = None) -> int:
    """Runs one stage. Exit code 0, or 1 after a last line `error: <sentence>`."""
    try:
        words = sys.argv[1:] if words is None else words
        arguments = parse(words)
        if arguments.stage in RUNS_MODELS:
            claim_devices(arguments)
            if processes(arguments) > 1 and not is_launched():
                launch(words, processes(arguments))
                return 0
            prepare_device(arguments)
        import_module(STAGES[arguments.stage][0]).run(arguments)
        sys.stdout.flush()  # here, so that a closed pipe is noticed
    except UserError as error:
        return report_failure(str(error))
    except KeyboardInterrupt:
        print("error: Interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    except BrokenPipeError as error:
        return 1 if is_output_unread() else report_fault(error)
    except Exception as error:
        return report_fault(error)
    return 0


def is_output_unread() -> bool:
    """Whether the reader of the output has closed it, as `head` does; the rest of the output is then discarded."""
    try:
        print(flush=True)  # an empty line shows it
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def report_fault(error: Exception) -> int:
    """Prints the traceback for the log, and a last line that the tables can read. Exit code 1."""
    traceback.print_exception(error)
    return report_failure(f"{type(error).__name__}: {error}".splitlines()[0])


def report_failure(sentence: str) -> int:
    """Prints the error as the last line; one of several processes leaves that to its launcher. Exit code 1."""
    if is_launched():
        report(sentence)
    else:
        print(f"error: {sentence}", file=sys.stderr)
    return 1


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments of the stage that the words name; only that stage's module is imported."""
    parser = argparse.ArgumentParser(prog="coppice", description="Compress language models and measure what is left.")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, (module, description) in STAGES.items():
        subparser = stages.add_parser(stage, help=description, description=description)
        if words and words[0] == stage:
            import_module(module).add_arguments(subparser)
        if stage in RUNS_MODELS:
            subparser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
            subparser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser.parse_args(words)


def processes(arguments: argparse.Namespace) -> int:
    """How many processes the stage runs in: one, but for a step that trains on several GPUs."""
    of_step = getattr(arguments, "step", {}).get("options", {}).get("gpus", 1)
    return getattr(arguments, "gpus", None) or of_step


def claim_devices(arguments: argparse.Namespace) -> None:
    """Claims free GPUs for the job, where Coppice may choose them (see `devices`).

    Raises UserError where fewer are free than the step requests.
    """
    if arguments.device == "auto" and not is_launched():
        from coppice.recovery.devices import claim

        claim(processes(arguments))
    elif arguments.device.startswith("cuda:") and processes(arguments) > 1:
        raise UserError(
            f"--device {arguments.device} is one, but the step requests {processes(arguments)} GPUs; pass auto or cuda."
        )


def prepare_device(arguments: argparse.Namespace) -> None:
    """Hands the threads to every library that makes its own, and resolves `auto` to a device.

    Raises UserError when the device cannot be used.
    """
    if arguments.threads < 1:
        raise UserError(f"--threads {arguments.threads} is not a number of threads; pass 1 or more.")
    if is_launched():
        arguments.threads = max(1, arguments.threads // processes(arguments))
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(arguments.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_launched():
        arguments.device = local_device(arguments.device)
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {arguments.device} cannot be used ({reason}); pass auto, cpu or cuda.") from error


if __name__ == "__main__":
    sys.exit(main())
