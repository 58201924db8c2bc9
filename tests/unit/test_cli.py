"""The command line: light until a stage is asked for, one last line when one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nodes import make, save_root
from tiny import logits, tiny_tokens

from coppice.cli import RUNS_MODELS, STAGES, main
from coppice.errors import UserError
from coppice.methods.registry import methods
from coppice.models.checkpoint import load_model

HEAVY = {"torch", "transformers", "pandas", "numpy", "pydantic", "mlflow", "datasets"}


def stage_that(monkeypatch: pytest.MonkeyPatch, does: Any) -> None:
    """Puts a stage `export` that needs no arguments in the place of the real one."""
    module = SimpleNamespace(add_arguments=lambda parser: None, run=does)
    monkeypatch.setattr("coppice.cli.import_module", lambda name: module)


def test_help_lists_all_stages_and_imports_none() -> None:
    script = (
        "import sys\nfrom coppice.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as ended: print('ended', ended.code)\n"
        "print('imported', *sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    shown, _, imported = result.stdout.partition("imported")
    assert "ended 0" in shown
    for stage, (module, description) in STAGES.items():
        assert stage in shown.split()
        assert description.split()[0] in shown
        assert module not in imported.split()
    assert not HEAVY & set(imported.split())


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([stage, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: coppice {stage} ")
    assert ("--device" in shown and "--threads" in shown) or stage not in RUNS_MODELS


def test_an_error_of_the_user_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", str(tmp_path / "none"), "--output", str(tmp_path / "dense")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/none/manifest.json does not exist.\n"
    assert not (tmp_path / "dense").exists()


def test_a_fault_shows_where_and_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: Any) -> None:
        raise ZeroDivisionError("first\nsecond")

    stage_that(monkeypatch, fails)
    assert main(["export"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: ZeroDivisionError: first"


# What is printed fits a buffer, overflows it, or has none; an empty variable counts as none.
@pytest.mark.parametrize(("words", "unbuffered"), [(["methods"], ""), (["methods", "--json"], ""), (["methods"], "1")])
def test_a_reader_who_leaves_early_is_no_error(words: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    script = "import sys\nfrom coppice.cli import main\nsys.exit(main())"
    command, environment = [sys.executable, "-c", script, *words], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(command, env=environment, check=False, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_broken_pipe_of_a_stage_s_own_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    stage_that(monkeypatch, fails)
    assert main(["export"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: BrokenPipeError: [Errno 32] Broken pipe"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["recommend", "--results", "r", "--max-bytes", "300k"],
            "--max-bytes: '300k' is not a number above zero; write",
        ),
        (["recommend", "--results", "r", "--tokens", "0"], "--tokens: '0' is not a number above zero; write one"),
        (["fit", "--law", "p2", "--output", "o", "--options", "{file}"], "--options: '{file}' is not JSON (Expecting"),
        (
            ["fit", "--law", "p2", "--output", "o", "--options", "[1]"],
            "--options: '[1]' does not map options to values; ",
        ),
    ],
)
def test_values_that_cannot_be_read_are_sentences(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert f"error: argument {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize("during", ["import", "run"])
def test_an_interruption_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], during: str
) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    stage_that(monkeypatch, interrupted)
    if during == "import":
        monkeypatch.setattr("coppice.cli.import_module", interrupted)
    assert main(["export"]) == 130
    assert capsys.readouterr().err == "error: Interrupted; run the same command again to go on.\n"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Threads are as they were after the test."""
    threads = torch.get_num_threads()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(variable, os.environ.get(variable, "1"))
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("stage", RUNS_MODELS)
def test_threads_and_device_reach_torch(stage: str, settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    stage_that(monkeypatch, lambda given: seen.append((given.device, torch.get_num_threads())))
    assert main([stage, "--threads", "3"]) == 0
    assert seen == [("cuda" if torch.cuda.is_available() else "cpu", 3)]
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--threads", "0"], "error: --threads 0 is not a number of threads; pass 1 or more."),
        (["--device", "abacus"], "error: --device abacus cannot be used"),
    ],
)
def test_impossible_settings_are_refused(
    words: list[str],
    sentence: str,
    settings: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage_that(monkeypatch, lambda given: pytest.fail("The stage ran."))
    assert main(["calibrate", *words]) == 1
    assert capsys.readouterr().err.startswith(sentence)


def test_an_error_of_the_user_in_a_stage_that_parses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(arguments: Any) -> None:
        raise UserError("This is wrong.")

    stage_that(monkeypatch, refuses)
    assert main(["export"]) == 1
    assert capsys.readouterr().err == "error: This is wrong.\n"


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed.keys() == methods().keys()
    for name, entry in listed.items():
        found = methods()[name]
        assert (entry["family"], entry["contract"]) == (found.family, found.contract)
        assert entry["source"]["title"] == found.source.title
        assert entry["options"]["properties"].keys() == found.options.model_fields.keys()
        assert set(entry["needs"]) == found.needs()
        assert entry["incompatible_with"] == dict(found.incompatible_with)
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, entry["family"]] for name, entry in listed.items()]
    # The titles of the sources stand in one column.
    titles = [entry["source"]["title"] for entry in listed.values()]
    assert len({line.index(title) for line, title in zip(lines, titles, strict=True)}) == 1


def test_export_writes_a_dense_checkpoint(tmp_path: Path) -> None:
    root = save_root(tmp_path / "root", num_hidden_layers=1)
    node = make(tmp_path / "node", root, "rtn", bits=4, group_size=16)
    assert main(["export", "--model", str(node), "--output", str(tmp_path / "dense")]) == 0
    tokens = tiny_tokens()
    expected = logits(load_model(node), tokens)
    assert torch.allclose(logits(load_model(tmp_path / "dense"), tokens), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["study", "study.yaml", "--config", "seed: 1"], "argument --config: 'seed: 1' is not JSON"),
        (["salvage", "study.yaml", "--config", "[]"], "argument --config: '[]' does not map names to values"),
        (["evaluate", "--evaluation", "[]"], "argument --evaluation: '[]' does not map names to values"),
        (["root", "--source", "3"], "argument --source: '3' does not map names to values"),
        (["tokenize", "--text", "null"], "argument --text: 'null' does not map names to values"),
    ],
)
def test_json_of_another_kind_is_refused_by_the_argument(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err
