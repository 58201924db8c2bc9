"""Where a study's results lie: the one place that spells the paths below `results/<study>`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TABLES = ("nodes", "metrics", "items", "curves", "costs", "comparisons", "signals", "failures")


@dataclass(frozen=True)
class ResultsLayout:
    """The paths of one study's results. root: the folder `results/<study>`; `Path()` for paths relative to it."""

    root: Path

    @property
    def study(self) -> Path:
        """The effective study."""
        return self.root / "study.yaml"

    @property
    def models(self) -> Path:
        return self.root / "models"

    def checkpoint(self, node: str) -> Path:
        """The folder of a node's checkpoint."""
        return self.models / node

    def manifest(self, node: str) -> Path:
        return self.checkpoint(node) / "manifest.json"

    def curve(self, node: str) -> Path:
        """The losses along a recovery."""
        return self.checkpoint(node) / "curve.parquet"

    @property
    def nodes(self) -> list[str]:
        """The nodes that have results so far."""
        return sorted(path.parent.relative_to(self.models).as_posix() for path in self.models.rglob("manifest.json"))

    def token_sets(self, model: str) -> Path:
        """The folder of a model's token sets."""
        return self.root / "tokens" / model

    def tokens(self, model: str, use: str) -> Path:
        """The manifest of a token set."""
        return self.token_sets(model) / use / "manifest.json"

    def statistics(self, node: str, calibration: str, kind: str) -> Path:
        """The manifest of one kind of statistics."""
        return self.root / "statistics" / node / calibration / kind / "manifest.json"

    def evaluation(self, node: str, evaluation: str) -> Path:
        """The folder of what one evaluation measured of a node."""
        return self.root / "evaluations" / node / evaluation

    def metrics(self, node: str, evaluation: str) -> Path:
        return self.evaluation(node, evaluation) / "metrics.json"

    def metrics_of(self, node: str) -> list[Path]:
        """What the node's evaluations wrote so far; those of the nodes below lie deeper."""
        return sorted((self.root / "evaluations" / node).glob("*/metrics.json"))

    def items(self, node: str, evaluation: str) -> Path:
        return self.evaluation(node, evaluation) / "items.parquet"

    @property
    def tables(self) -> Path:
        return self.root / "tables"

    def table(self, name: str) -> Path:
        return self.tables / f"{name}.parquet"

    @property
    def laws(self) -> Path:
        return self.root / "laws"

    def law(self, name: str) -> Path:
        """The folder of a fitted law."""
        return self.laws / name

    def fit(self, name: str) -> Path:
        return self.law(name) / "fit.json"

    @property
    def fits(self) -> dict[str, Path]:
        """The laws fitted so far, by name."""
        return {path.parent.name: path for path in sorted(self.laws.glob("*/fit.json"))}

    @property
    def report(self) -> Path:
        """The folder of the page and its figures."""
        return self.root / "report"

    @property
    def page(self) -> Path:
        return self.report / "index.html"

    @property
    def tracking(self) -> Path:
        """What was mirrored to MLflow."""
        return self.root / "tracking" / "runs.json"

    def state(self, node: str) -> Path:
        """The folder of what an interrupted recovery resumes from; it is not an output of a job."""
        return self.root / "state" / node

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def log(self, stage: str, name: str) -> Path:
        """The log of a job: `logs/<stage>.log` where the job is the stage, otherwise `logs/<stage>/<name>.log`."""
        return self.logs / (f"{stage}.log" if name == stage else f"{stage}/{name}.log")

    def benchmark(self, stage: str, name: str) -> Path:
        """What Snakemake measured of a job."""
        return self.root / "benchmarks" / (f"{stage}.jsonl" if name == stage else f"{stage}/{name}.jsonl")
