"""`snakemake --logger coppice`: the progress of a run as a person reads it, instead of Snakemake's record of every job.

On a terminal a line a stage, changed in place; with `--quiet` failures alone. Elsewhere, and in dry runs, Snakemake's
own output stays as it is, unless `--logger-coppice-show lines` asks for an occasional line. Snakemake finds this
package by its name.
"""

# Annotations are evaluated here: Snakemake makes command line options of the types in `LogHandlerSettings`.
import logging
import os
import shutil
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.settings import LogHandlerSettingsBase

from snakemake_logger_plugin_coppice.progress import Progress, failure_sentence, interrupted, job_name, job_weight

SECONDS_BETWEEN_LINES = 60
# What of Snakemake's `--quiet` asks for silence about jobs.
SILENCED = {"ALL", "PROGRESS", "RULES"}
# What Snakemake says at Ctrl-C, while it waits for its jobs, which the terminal or the cluster interrupts.
INTERRUPTED = "Terminating processes on user request"


@dataclass
class LogHandlerSettings(LogHandlerSettingsBase):
    show: str = field(
        default="auto",
        metadata={
            "help": "What is shown: `live` (a line a stage, changed in place), `lines` (a line a minute), `snakemake` "
            "(Snakemake's own output), or `auto`: live on a terminal, snakemake elsewhere.",
            "choices": ["auto", "live", "lines", "snakemake"],
        },
    )


class LogHandler(LogHandlerBase):
    """Follows a run by its events.

    view: live, lines, failures, nothing, or snakemake, which leaves the output to Snakemake.
    drawn: the lengths of the lines that are changed in place; settled: what is drawn stays, as all is over.
    stopped: by Ctrl-C; left: the last sentence of a run that was stopped is said.
    """

    def __post_init__(self) -> None:
        self.stream = sys.stderr
        self.view = view(self.common_settings, self.settings.show if self.settings else "auto", self.stream)
        self.progress = Progress()
        self.drawn: list[int] = []
        self.over = self.settled = self.stopped = self.left = False
        self.said_at = 0.0
        self.closed = threading.Event()
        if self.view != "snakemake":
            self.other_errors = sys.excepthook
            sys.excepthook = self.end
        if self.view == "live":
            threading.Thread(target=self.tick, daemon=True).start()

    @property
    def writes_to_stream(self) -> bool:
        # Where this is false, Snakemake sets up its own output.
        return self.view != "snakemake"

    @property
    def writes_to_file(self) -> bool:
        return False

    @property
    def has_filter(self) -> bool:
        return True

    @property
    def has_formatter(self) -> bool:
        return True

    @property
    def needs_rulegraph(self) -> bool:
        return False

    def emit(self, record: logging.LogRecord) -> None:
        if self.view in ("snakemake", "nothing"):
            return
        try:
            self.follow(record)
        except Exception as error:  # a run does not end by what shows it
            self.show_less(error)

    def show_less(self, error: Exception) -> None:
        """After an error of its own: failures alone, with a sentence that says so; after another one nothing."""
        self.view = "nothing" if self.view == "failures" else "failures"
        with suppress(Exception):
            self.say(
                f"The progress cannot be shown ({type(error).__name__}: {error}). The run goes on; its log is in "
                ".snakemake/log, and `--logger-coppice-show snakemake` shows Snakemake's own words."
            )

    def follow(self, record: logging.LogRecord) -> None:
        """Takes an event into account, and shows what it changes."""
        progress, now = self.progress, record.created
        event = getattr(record, "event", None)
        if self.stopped and event in (LogEvent.JOB_INFO, LogEvent.JOB_ERROR, LogEvent.ERROR):
            return  # what is interrupted has not failed
        match event:
            case LogEvent.RUN_INFO:
                progress.plan(record.stats, now)
            case LogEvent.JOB_INFO:
                self.over = self.settled = False
                weight = job_weight(record.shellcmd)
                progress.start(record.jobid, record.rule_name, job_name(record.log, record.output), weight, now)
            case LogEvent.JOB_FINISHED:
                progress.finish(record.job_id, now)
                self.over = self.stopped or progress.done() == progress.total()
                self.say_progress(now)
            case LogEvent.JOB_ERROR:
                name = job_name(record.log, record.output)
                if interrupted(record.log):  # before Snakemake itself was
                    progress.running.pop(record.jobid, None)
                    self.say(f"Interrupted: {record.rule_name} {name}")
                else:
                    progress.fail(record.jobid)
                    self.say(failure_sentence(record.rule_name, name, record.log))
            case LogEvent.ERROR if "CalledProcessError" not in str(record.msg):
                self.say(str(record.msg))  # a command that failed has its own event, with its log
            case LogEvent.SHELLCMD if self.common_settings.printshellcmds:
                self.say(str(record.msg))
            case None if str(record.msg).startswith(INTERRUPTED):
                self.stop()
                self.answer("Stopping: the running jobs are interrupted.")
            case None:
                self.repeat(record)
            case _:
                return
        self.draw()

    def stop(self) -> None:
        """Ctrl-C: what is drawn stays, and nothing is drawn any more."""
        self.over = True
        self.draw()
        self.stopped = True

    def take_leave(self) -> None:
        """The last sentence of a run that was stopped, once."""
        if not self.left:
            self.left = True
            # With --quiet Snakemake does not report which jobs are done.
            counted = self.view != "failures" and self.progress.totals
            done = f" with {self.progress.done()} of {self.progress.total()} jobs done" if counted else ""
            self.answer(f"Stopped{done}. What is done stays; the same command goes on from there.")

    def answer(self, text: str) -> None:
        """Writes text over the `^C` that a terminal shows of the key."""
        self.say(f"\r{text}" if self.stream.isatty() else text)

    def end(self, kind: type[BaseException], error: BaseException, trace: object) -> None:
        """Python's last words; none at a Ctrl-C that Snakemake does not expect: before its jobs, or a second one."""
        if not issubclass(kind, KeyboardInterrupt):
            return self.other_errors(kind, error, trace)
        with self.lock:
            if not self.stopped:
                self.stop()
            self.take_leave()

    def repeat(self, record: logging.LogRecord) -> None:
        """Snakemake's own words: warnings always, the rest before and after the jobs."""
        if record.levelno >= logging.ERROR and not self.progress.running:
            self.over = True
        about_jobs = self.progress.totals and not self.over
        if record.levelno >= logging.WARNING or (self.view != "failures" and not about_jobs):
            self.say(str(record.msg))

    def say(self, text: str) -> None:
        """Writes text above what is changed in place."""
        self.erase()
        if text not in ("", "None"):
            self.stream.write(f"{text}\n")
        self.stream.flush()

    def say_progress(self, now: float) -> None:
        """A line of progress: one a minute, and one when all is done."""
        if self.view == "lines" and (now - self.said_at >= SECONDS_BETWEEN_LINES or self.over):
            self.said_at = now
            self.say(f"{time.strftime('%H:%M:%S')} {self.progress.line(now)}")

    def draw(self) -> None:
        """Redraws the stages in place."""
        if self.view != "live" or not self.progress.totals or self.settled:
            return
        columns, rows = size_of(self.stream)
        lines = [line[: columns - 1] for line in self.progress.lines(time.time(), columns - 1)][: max(rows - 1, 1)]
        self.erase()
        self.stream.write("".join(f"{line}\n" for line in lines))
        self.stream.flush()
        # What is drawn once all is over stays: what follows may be another program's.
        self.drawn, self.settled = ([], True) if self.over else ([len(line) for line in lines], False)

    def erase(self) -> None:
        """Removes what was drawn: up so many rows, then to the end of the screen.

        A terminal that became narrower since has wrapped lines that are now too long, as nearly all do.
        """
        if self.drawn:
            columns, _ = size_of(self.stream)
            rows = sum(max(1, ceil(length / columns)) for length in self.drawn)
            self.stream.write(f"\x1b[{rows}F\x1b[J")
            self.drawn = []

    def tick(self) -> None:
        """Draws once a second while jobs run."""
        while not self.closed.wait(1):
            with self.lock:
                if self.drawn and self.progress.running:
                    try:
                        self.draw()
                    except Exception as error:  # as in `emit`
                        self.show_less(error)

    def close(self) -> None:
        self.closed.set()
        if self.stopped:
            self.take_leave()
        super().close()


def size_of(stream: object) -> tuple[int, int]:
    """Columns and rows of the terminal that a stream writes to; its standard output may go elsewhere."""
    with suppress(OSError):  # of a stream that is no terminal, or has no number
        size = os.get_terminal_size(stream.fileno())
        if all(size):  # a terminal that nobody told its size says 0
            return size
    return shutil.get_terminal_size()


def view(common: object, asked: str, stream: object) -> str:
    """What to show, by what Snakemake was told and where its output goes."""
    if common.dryrun or common.verbose or common.debug_dag or asked == "snakemake":
        return "snakemake"
    if SILENCED & {quietness.name for quietness in common.quiet or ()}:
        return "failures"
    if asked != "auto":
        return asked
    return "live" if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" else "snakemake"
