from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.servers import QUIET

# `make test` gives each worker a file at a time, in the order of the tests. The first of these is a chain that keeps
# one core busy for minutes: were it last, the other worker would wait.
LONGEST = (
    "test_interruptions.py", "test_stories.py", "test_watch.py", "test_composition.py", "test_postgresql.py",
    "test_storage.py", "test_distributed.py", "test_bad_input.py", "test_terminal.py", "test_dag.py",
)  # fmt: skip
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
STARTUP = Path(__file__).with_name("workflow") / "startup"
ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# Debian's Chromium, without what it would ask of the network by itself.
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
)  # fmt: skip


def pytest_configure() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and so would the processes that tests interrupt.

    There is a worker for each core: threads would wait for those of the other one, on matrices too small for two.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(ONE_THREAD)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those of many tests, so that workers end together."""
    tests = Counter(item.path for item in items)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path.name, len(places)), -tests[item.path], item.path))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public models and texts that lie beside the repository; tests that need them are skipped elsewhere."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the public models and texts in ../shared/data")
    return SHARED_DATA


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """A headless browser of Playwright's; tests are skipped where Chromium is absent.

    It ends with a file's tests: as long as Playwright runs so does its event loop, and no other can run in the thread.
    """
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs the program chromium (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def forks() -> Iterator[dict[str, str]]:
    """The environment in which jobs are forks of one process, which has imported torch once."""
    address = f"coppice-{uuid4()}"
    command = [sys.executable, str(STARTUP / "forks.py"), address]
    # Threads of OpenMP and BLAS would not outlive a fork.
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | OFFLINE | QUIET | ONE_THREAD) as server:
        assert server.stdout.readline() == b"Ready.\n"
        yield {"FORKS": address, "PYTHONPATH": str(STARTUP)}
        server.terminate()


@pytest.fixture(scope="session")
def without_messages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Snakefile whose rules have no messages: Snakemake then prints what a job reads, writes and asks for."""
    folder = tmp_path_factory.mktemp("without_messages")
    shutil.copyfile(ROOT / "Snakefile", folder / "Snakefile")
    shutil.copytree(ROOT / "rules", folder / "rules")
    for name in ("workflow", "config", "envs", "resources"):
        (folder / name).symlink_to(ROOT / name)
    for file in (folder / "rules").glob("*.smk"):
        text = file.read_text()
        file.write_text(re.sub(r'^    message:\n        ".*"\n', "", text, flags=re.MULTILINE))
    return folder / "Snakefile"
