"""What a person sees on a terminal while the real Snakefile runs with the default profile, and when Ctrl-C stops it."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.nodes import save_text, save_tokenizer
from tests.tiny import tiny_model

ROWS = 24
ESCAPE = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])")
CTRL_C = b"\x03"


class Screen:
    """What a terminal shows, with what scrolled out above: text, ends of lines, and the escape sequences in use.

    Lines that are too long are wrapped, and wrapped again when its width changes. `at` is where what comes next is
    written: a line and a place in it, both the last ones but after going up, which only a removal may follow.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self.at: tuple[int, int] | None = None
        self.rest = ""
        self.cursor = True

    def read(self, text: str) -> None:
        """Takes what a program wrote; an escape sequence that is not whole waits for its end."""
        text = self.rest + text
        whole = text.rfind("\x1b") if re.search(r"\x1b(\[[?0-9;]*)?$", text) else len(text)
        self.rest, place = text[whole:], 0
        for escape in ESCAPE.finditer(text[:whole]):
            self.write(text[place : escape.start()])
            self.obey(*escape.groups())
            place = escape.end()
        self.write(text[place:whole])

    def obey(self, argument: str, name: str) -> None:
        match name:
            case "F":  # up so many rows, to their first column
                rows = [(i, j * self.columns) for i, line in enumerate(self.lines) for j in range(self.height(line))]
                self.at = rows[max(len(rows) - 1 - int(argument), len(rows) - ROWS, 0)]
            case "J":  # removes what follows
                line, place = self.at or (len(self.lines) - 1, len(self.lines[-1]))
                self.lines[line:] = [self.lines[line][:place]]
                self.at = None
            case "h" | "l" if argument == "?25":
                self.cursor = name == "h"
            case "m":  # colour
                pass
            case _:
                raise AssertionError(f"an escape sequence that the display does not use: {argument}{name}")

    def write(self, text: str) -> None:
        assert not (text and self.at), "text over what is there"
        for part in re.findall(r"\r\n|\r|[^\r]+", text):
            if part == "\r\n":
                self.lines.append("")
            elif part == "\r":
                self.lines[-1] = ""  # what comes is longer than what it covers
            else:
                assert "\n" not in part
                self.lines[-1] += part

    def height(self, line: str) -> int:
        return max(1, ceil(len(line) / self.columns))

    def text(self) -> str:
        return "\n".join(self.lines)

    def headings(self) -> list[str]:
        """The first lines of the displays that are to be seen; but for leftovers there is one."""
        return re.findall(r"^\d+ of \d+ jobs done.*$", self.text(), re.MULTILINE)


class Terminal:
    """A run in the foreground of a terminal of its own, as a person starts it there."""

    def __init__(self, command: dict[str, Any], columns: int) -> None:
        self.master, slave = pty.openpty()
        self.screen = Screen(columns)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.drawn = 0  # how often something was taken back
        self.resize(columns)
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        foreground = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
        environment = {name: value for name, value in command["env"].items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(command["args"], **streams, **foreground, env=environment | {"TERM": "xterm"})
        os.close(slave)

    def resize(self, columns: int) -> None:
        """Changes the width, at once for the screen and for the program, which gets SIGWINCH."""
        self.screen.columns = columns
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))

    def press(self, key: bytes) -> None:
        os.write(self.master, key)

    def until(self, condition: Callable[[], bool]) -> None:
        """Reads what is written until a condition holds."""
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, self.screen.text()
            assert self.read(), f"ended: {self.screen.text()}"

    def read(self) -> bool:
        """Takes what was written since, waiting for a short while; False at the end of the run."""
        if not select.select([self.master], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # whoever wrote is gone
            return False
        self.drawn += data.count(b"\x1b[J")
        self.screen.read(self.decoder.decode(data))
        return bool(data)

    def next_drawing(self) -> None:
        """Waits until the display was drawn again, down to its last stage; a second later it is drawn again."""
        before, whole = self.drawn, re.compile(r"^  tables .*\n\Z", re.MULTILINE)
        self.until(lambda: self.drawn > before and whole.search(self.screen.text()) is not None)

    def end(self) -> int:
        """Reads to the end; the exit code. Nothing that the run started is left, and the cursor waits for a prompt."""
        deadline = time.monotonic() + 300
        while self.read():
            assert time.monotonic() < deadline, self.screen.text()
        code = self.process.wait(60)
        os.close(self.master)
        assert processes(self.process.pid) == []
        assert self.screen.cursor
        assert self.screen.lines[-1] == self.screen.rest == ""
        return code


def processes(session: int) -> list[str]:
    """The commands of the processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # one that ended meanwhile
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                found.append((folder / "cmdline").read_text())
    return found


def study() -> dict[str, Any]:
    """A dense model that is measured: a chain of jobs of which two at most run side by side."""
    return {
        "study": "seen",
        "models": {"tiny": {"path": "tiny"}},
        "texts": {"words": {"path": "words.txt", "splits": {"evaluation": 1.0}}},
        "evaluations": {
            "quality": {"kind": "quality", "perplexity": {"words": {"text": "words", "length": 16, "windows": 8}}}
        },
    }


@pytest.fixture(scope="module")
def started(
    snakemake_command: Callable, forks: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Terminal]:
    """Starts the command of these tests, always the same, on a terminal of so many columns; in `folder`, its study."""
    folder = tmp_path_factory.mktemp("terminal")
    tiny_model().save_pretrained(folder / "tiny")
    save_tokenizer(folder / "tiny")
    save_text(folder / "words.txt", documents=60)
    (folder / "faults").mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump(study(), sort_keys=False))
    environment = {**forks, "FAULTS": str(folder / "faults"), "ALONE": "tokenize"}  # which the terminal interrupts
    words = ["tables", "--configfile", str(folder / "study.yaml")]

    def start(columns: int, *more: str) -> Terminal:
        return Terminal(snakemake_command(folder, *words, *more, environment=environment), columns)

    start.folder = folder
    return start


def display(screen: Screen) -> list[str]:
    """The lines of the display, from its heading on."""
    lines = screen.lines[screen.lines.index(screen.headings()[-1]) :]
    return lines[: next(place for place, line in enumerate(lines) if place and not line.startswith("  "))]


def stages(shown: list[str]) -> dict[str, str]:
    """What a display says of each stage."""
    return dict(re.match(r"  (\w+) +(\d.*)$", line).groups() for line in shown if re.match(r"  \w+ +\d+/", line))


def after(screen: Screen, shown: list[str]) -> list[str]:
    """What was written below the display."""
    lines = screen.text().splitlines()
    return lines[lines.index(shown[-1]) + 1 :]


def test_ctrl_c_ends_a_run_with_a_sentence_and_the_same_command_goes_on(started: Callable[..., Terminal]) -> None:
    folder = started.folder
    (folder / "faults" / "tokenize.wait").touch()
    run = started(100)
    screen = run.screen
    run.until((folder / "faults" / "tokenize.waits").exists)
    run.until(lambda: "2 of 5 jobs done" in screen.text() and "tiny/evaluation.quality.words (" in screen.text())

    # A narrower window wraps the line of the job under way, and a wider one gives it room again: nothing is left over.
    for columns in (50, 90):
        run.next_drawing()
        run.resize(columns)
        run.next_drawing()
        assert len(screen.headings()) == 1
        assert all(len(line) < columns for line in display(screen))
    assert re.match(r"0/1 +tiny/evaluation\.quality\.words \(\d+ s\)$", stages(display(screen))["tokenize"])
    assert any("coppice tokenize" in command for command in processes(run.process.pid))

    run.press(CTRL_C)
    assert run.end() == 1
    # The display stays, and what is written below it is said once.
    assert len(screen.headings()) == 1
    stopping, log, elapsed, stopped = after(screen, display(screen))
    assert stopping == "Stopping: the running jobs are interrupted."
    assert (log.partition(":")[0], elapsed.partition(":")[0]) == ("Complete log(s)", "Elapsed time")
    assert stopped == "Stopped with 2 of 5 jobs done. What is done stays; the same command goes on from there."
    assert not re.search("fail|Traceback", screen.text(), re.IGNORECASE)
    # The lock is gone, and nobody waited for tables of what is done.
    assert list((folder / ".snakemake" / "locks").glob("*")) == []
    assert not (folder / "results" / "seen" / "tables").exists()

    # On a narrow terminal no line is wrapped, and the heading is whole.
    run = started(40)
    assert run.end() == 0
    assert len(run.screen.headings()) == 1
    shown = display(run.screen)
    assert " ".join(shown).startswith("3 of 3 jobs done, ")
    assert {stage: said.split()[0] for stage, said in stages(shown).items()} == dict.fromkeys(
        ("tokenize", "evaluate", "tables"), "1/1"
    )
    assert all(len(line) < 40 for line in shown)
    assert set(pd.read_parquet(folder / "results/seen/tables/metrics.parquet").node) == {"tiny"}


def test_a_job_that_fails_is_a_sentence_above_the_display(started: Callable[..., Terminal]) -> None:
    folder = started.folder
    (folder / "words.txt").write_text("w5 w6\n")  # too short for the windows that are asked for
    # Tables of what is done come after the last drawing; they are not for this test.
    run = started(100, "--no-hooks")
    assert run.end() == 1
    [heading] = run.screen.headings()
    assert "0 of 3 jobs done, 1 failed, " in heading
    shown = display(run.screen)
    assert {stage: said.split()[0] for stage, said in stages(shown).items()} == dict.fromkeys(
        ("tokenize", "evaluate", "tables"), "0/1"
    )
    assert stages(shown)["tokenize"].endswith("1 failed")
    [sentence] = [line for line in run.screen.lines if line.startswith("FAILED")]
    assert sentence.startswith("FAILED tokenize tiny/evaluation.quality.words: ")
    assert "words.txt has 0 windows of 16 tokens" in sentence
    assert run.screen.lines.index(sentence) < run.screen.lines.index(heading)
    assert after(run.screen, shown)[-1] == "At least one job did not complete successfully."
