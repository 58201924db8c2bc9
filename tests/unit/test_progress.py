"""The logger plugin: what it says of a run's events, and when it leaves the output to Snakemake."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yte
from snakemake.settings.enums import Quietness
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

from snakemake_logger_plugin_coppice import LogHandler, LogHandlerSettings
from snakemake_logger_plugin_coppice.progress import Progress, job_name, job_weight


class Terminal(io.StringIO):
    """What a person sees: text in which lines can be taken back."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines: list[str] = []
        for part in self.getvalue().replace("\r", "").replace("\x1b[J", "\x1b[J\n").splitlines():
            if part.endswith("F\x1b[J"):
                del lines[-int(part[2:-4]) :]
            else:
                lines.append(part)
        return lines


def handler(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, show: str = "auto", **told: Any) -> LogHandler:
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("sys.excepthook", sys.excepthook)  # which the handler replaces
    monkeypatch.setenv("TERM", "xterm")
    common = {"dryrun": False, "verbose": False, "debug_dag": False, "quiet": None, "printshellcmds": False}
    return LogHandler(SimpleNamespace(**{**common, **told}), LogHandlerSettings(show=show))


def tell(shown: LogHandler, event: LogEvent | None, text: str | None = None, at: float = 0.0, **fields: Any) -> None:
    level = fields.pop("level", logging.INFO)
    record = logging.LogRecord("snakemake", level, "", 0, text, None, None)
    record.__dict__ |= {"event": event, "created": at, **fields}
    shown.handle(record)


def start(shown: LogHandler, job: int, rule: str, node: str, at: float) -> None:
    log = f"results/demo/logs/{rule}/{node}.log"
    tell(shown, LogEvent.JOB_INFO, at=at, jobid=job, rule_name=rule, log=[log], output=[node], shellcmd="coppice")


def run_that_fails(shown: LogHandler, folder: Path) -> None:
    """Two compressions, of which one fails."""
    log = folder / "logs" / "compress" / "medium" / "rtn-3.log"
    log.parent.mkdir(parents=True)
    log.write_text("Traceback\nerror: bits is 1; take 2 or more.\n")
    tell(shown, None, "Building DAG of jobs...")
    tell(shown, LogEvent.WORKFLOW_STARTED, "a banner")
    tell(shown, LogEvent.RUN_INFO, "Job stats", stats={"compress": 2, "all": 1, "total": 3})
    start(shown, 1, "compress", "medium/svd-80", 10)
    start(shown, 2, "compress", "medium/rtn-3", 10)
    tell(shown, None, "Select jobs to execute...", at=11)
    tell(shown, LogEvent.JOB_FINISHED, "Finished jobid: 1", at=18, job_id=1)
    fields = {"jobid": 2, "rule_name": "compress", "log": [str(log)], "output": []}
    tell(shown, LogEvent.JOB_ERROR, "Error in rule", at=20, level=logging.ERROR, **fields)
    tell(shown, None, "Exiting because a job execution failed.", at=21, level=logging.ERROR)
    tell(shown, None, "Complete log(s): x.log", at=21)


def test_snakemake_finds_the_plugin() -> None:
    assert LoggerPluginRegistry().get_plugin("coppice").log_handler is LogHandler


@pytest.mark.parametrize(
    ("told", "terminal", "expected"),
    [
        ({}, True, "live"),
        ({}, False, "snakemake"),
        ({"dryrun": True}, True, "snakemake"),
        ({"verbose": True}, True, "snakemake"),
        ({"quiet": {Quietness.PROGRESS, Quietness.RULES}}, True, "failures"),
        ({"quiet": {Quietness.ALL}}, False, "failures"),
        ({"quiet": {Quietness.HOST}}, True, "live"),
        ({"show": "lines"}, False, "lines"),
        ({"show": "snakemake"}, True, "snakemake"),
    ],
)
def test_when_it_speaks(monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], terminal: bool, expected: str) -> None:
    shown = handler(monkeypatch, Terminal() if terminal else io.StringIO(), **told)
    shown.close()
    assert shown.view == expected
    assert shown.writes_to_stream == (expected != "snakemake")


def test_a_line_a_stage_changed_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stream = Terminal()
    shown = handler(monkeypatch, stream)
    run_that_fails(shown, tmp_path)
    shown.close()
    screen = stream.screen()
    assert screen[0] == "Building DAG of jobs..."
    assert "bits is 1; take 2 or more. (log:" in screen[1]
    assert screen[1].startswith("FAILED compress medium/rtn-3: ")
    # Drawn once at the end, below the failure and above what follows the run.
    assert [line for line in screen if "1 of 2 jobs done, 1 failed" in line] == [screen[3]]
    assert screen[4].split() == ["compress", "1/2", "8", "s", "each", "1", "failed"]
    assert screen[-1] == "Complete log(s): x.log"
    assert "banner" not in stream.getvalue()
    assert "Select jobs" not in stream.getvalue()


def test_quiet_says_failures_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stream = io.StringIO()
    shown = handler(monkeypatch, stream, quiet={Quietness.PROGRESS, Quietness.RULES})
    run_that_fails(shown, tmp_path)
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["FAILED", "Exiting"]


LEAVE = "Stopped with 0 of 1 jobs done. What is done stays; the same command goes on from there."


@pytest.mark.parametrize("expected", [True, False])
def test_ctrl_c_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expected: bool) -> None:
    """One that Snakemake waits for after, and one that ends it at once, with Python's last words."""
    stream = Terminal()
    shown = handler(monkeypatch, stream)
    tell(shown, LogEvent.RUN_INFO, "Job stats", stats={"compress": 1, "total": 1})
    start(shown, 1, "compress", "medium/rtn-3", 10)
    if expected:
        tell(shown, None, "Terminating processes on user request, this might take some time.")
    else:
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    said = ["Stopping: the running jobs are interrupted."] if expected else [LEAVE]
    assert stream.screen()[2:] == said
    # Jobs that end by it, and what Snakemake makes of that.
    log = tmp_path / "a.log"
    log.write_text("error: Interrupted; run the same command again to go on.\n")
    tell(shown, LogEvent.JOB_ERROR, level=logging.ERROR, jobid=1, rule_name="compress", log=[str(log)], output=[])
    tell(shown, LogEvent.ERROR, "At least one job did not complete successfully.", level=logging.ERROR)
    assert stream.screen()[2:] == said
    shown.close()
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert stream.screen()[2:] == ([*said, LEAVE] if expected else said)


def test_a_job_that_tells_of_ctrl_c_before_snakemake_does_has_not_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream = Terminal()
    shown = handler(monkeypatch, stream)
    tell(shown, LogEvent.RUN_INFO, "Job stats", stats={"compress": 1, "total": 1})
    start(shown, 1, "compress", "medium/rtn-3", 10)
    log = tmp_path / "logs" / "compress" / "a.log"
    log.parent.mkdir(parents=True)
    log.write_text("error: Interrupted; run the same command again to go on.\n")
    tell(shown, LogEvent.JOB_ERROR, level=logging.ERROR, jobid=1, rule_name="compress", log=[str(log)], output=[])
    shown.close()
    assert stream.screen()[0] == "Interrupted: compress a"
    assert "failed" not in stream.getvalue()


def test_lines_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    shown = handler(monkeypatch, stream, "lines")
    tell(shown, LogEvent.RUN_INFO, "Job stats", at=1000, stats={"compress": 100, "total": 100})
    for job in range(100):
        start(shown, job, "compress", str(job), 1000 + 3 * job)
        tell(shown, LogEvent.JOB_FINISHED, "", at=1003 + 3 * job, job_id=job)
    lines = stream.getvalue().splitlines()
    # By hand: 300 seconds with a line a minute, the first job's and the last one's.
    assert len(lines) == 6
    assert "1 of 100 jobs done, 3 s so far, about 5.0 min left" in lines[0]
    assert "100 of 100 jobs done, 5.0 min so far" in lines[-1]


def test_an_error_of_its_own_ends_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stream = Terminal()
    shown = handler(monkeypatch, stream)
    monkeypatch.setattr(Progress, "lines", lambda *_: 1 / 0)
    run_that_fails(shown, tmp_path)
    shown.close()
    screen = stream.screen()
    # One sentence, then failures alone.
    [sentence] = [line for line in screen if "cannot be shown (ZeroDivisionError" in line]
    assert "The run goes on" in sentence
    assert [line.split()[0] for line in screen[screen.index(sentence) + 1 :]] == ["FAILED", "Exiting"]
    # A terminal that is gone.
    monkeypatch.setattr(stream, "write", lambda text: 1 / 0)
    tell(shown, None, "more", level=logging.ERROR)
    assert shown.view == "nothing"
    tell(shown, None, "more", level=logging.ERROR)


def test_a_run_needs_no_plugin() -> None:
    profiles = Path(__file__).parents[2] / "profiles"
    for name in ("default", "gpu"):
        text = (profiles / name / "profile.yaml").read_text()
        assert yte.process_yaml(text, require_use_yte=True)["logger"] == "coppice"
        hidden = text.replace("snakemake_logger_plugin_coppice", "snakemake_logger_plugin_absent")
        assert "logger" not in yte.process_yaml(hidden, require_use_yte=True)


def test_remaining_time_by_stage_and_tokens() -> None:
    progress = Progress()
    progress.plan({"compress": 4, "recover": 3, "report": 1, "total": 8}, 0)
    for job in (0, 1):
        progress.start(job, "compress", "", 1, 0)
        progress.finish(job, 10)
    progress.start(2, "recover", "", 1000, 10)
    progress.finish(2, 110)
    progress.start(3, "recover", "", 2000, 110)
    progress.start(4, "compress", "", 1, 110)
    left, untimed = progress.remaining(115)
    # By hand: 0.1 s a token, so 195 s of the running recovery and 150 s of one of the usual 1500 tokens; compressions
    # take 10 s: 5 s of the running one, and one more waits. So far 130 s of work in 115 s.
    assert left == pytest.approx((195 + 150 + 5 + 10) / (130 / 115))
    assert untimed == ["report"]


def test_a_job_that_is_tried_again_has_not_failed() -> None:
    progress = Progress()
    progress.plan({"compress": 1}, 0)
    for _ in range(2):
        progress.start(1, "compress", "", 1, 0)
        progress.fail(1)
    progress.start(1, "compress", "", 1, 0)
    progress.finish(1, 1)
    assert progress.heading(1) == "1 of 1 jobs done, 1 s so far"


def test_names_and_weights_of_jobs() -> None:
    assert job_name(["results/demo/logs/compress/medium/rtn-3.log"], []) == "medium/rtn-3"
    assert job_name([], ["out.txt"]) == "out.txt"
    assert job_weight("""coppice recover --step '{"options": {"tokens": 96000, "length": 64}}'""") == 96_000
    assert job_weight(None) == 1


def test_a_quiet_run_that_is_stopped_counts_no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --quiet Snakemake does not report which jobs are done."""
    shown = handler(monkeypatch, stream := io.StringIO(), quiet={Quietness.PROGRESS})
    tell(shown, LogEvent.RUN_INFO, stats={"compress": 2, "total": 2})
    start(shown, 1, "compress", "a", 1.0)
    shown.stop()
    shown.close()
    assert stream.getvalue() == "Stopped. What is done stays; the same command goes on from there.\n"
