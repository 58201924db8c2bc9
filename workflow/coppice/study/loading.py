"""Reads, validates and explains a study; writes the effective one.

`load_study` turns a file (or its parsed content) into a `Study`, or raises one UserError that names every
problem with its place. `effective` is the way back: the study after defaults.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from coppice.errors import UserError
from coppice.files import atomic_write, json_object
from coppice.records.base import Json
from coppice.study import tree
from coppice.study.schema import Study, calibrations, evaluations, laws, models, names, recipes, steps, texts

# Sections whose files check references and files, in the order of the config.
SECTIONS = (models, texts, calibrations, steps, recipes, evaluations, laws)


def load_study(source: Path | str | Mapping[str, Any], where: str | None = None) -> Study:
    """The study of a YAML file, or of its parsed content; paths are relative to the working directory.

    Raises UserError with one sentence a problem: each names its place and what to do. `where` is what they call the
    whole; the file's name when left out.
    """
    if isinstance(source, Mapping):
        value, where = names.parse_exponents(source), where or "The study"
    else:
        value, where = names.parse_exponents(read_yaml(Path(source))), where or str(source)
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: It must be a mapping of keys to values.")
    _refuse(where, list(names.problems(value)))
    try:
        study = Study.model_validate(value)
    except ValidationError as error:
        raise UserError(_join_problems(where, [_sentence(details) for details in error.errors()])) from None
    _refuse(where, [problem for section in SECTIONS for problem in section.problems(study)])
    _refuse(where, [*tree.incompatibilities(study), *tree.missing_seed_pairs(study)])
    return study


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises UserError when it is missing or broken."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name the study's YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error


def _refuse(where: str, problems: list[str]) -> None:
    if problems:
        raise UserError(_join_problems(where, problems))


def _join_problems(where: str, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return "\n".join([f"{where} has {len(problems)} problems:", *(f"  - {line}" for line in problems)])


def _sentence(details: ErrorDetails) -> str:
    """One of pydantic's errors as a sentence that begins with its place."""
    # Parts in brackets are pydantic's own and not keys of the file.
    place = ".".join(str(part) for part in details["loc"] if not re.fullmatch(r"<.*>|\[key\]", str(part)))
    kind, message = details["type"], details["msg"]
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message if message[-1] in ".?" else f"{message}."
    if kind == "missing":
        return f"{place} is missing."
    if kind == "too_short":
        return f"{place} is empty; it needs at least one entry."
    if kind in ("value_error", "assertion_error", "alternatives"):
        return f"{place}: {message[0].lower()}{message[1:]}" if place else message
    if kind in ("model_type", "dict_type"):
        message = "Input should be a mapping of keys to values."
    return f"{place} is {_shorten(details['input'])}; {message.replace('Input', 'it', 1)}"


def _shorten(value: Any) -> str:
    """A value as JSON, 60 characters at most."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def effective(study: Study) -> Json:
    """The study as plain values after defaults; `load_study` reads it back as the same study."""
    return study.model_dump(mode="json")


def write_effective(study: Study, path: Path) -> None:
    """Writes the effective study as YAML."""
    text = yaml.safe_dump(effective(study), sort_keys=False, allow_unicode=True, width=120)
    with atomic_write(path) as temporary:
        temporary.write_text("# The effective study: what was requested, after defaults.\n" + text, encoding="utf-8")


def merge(value: Any, changes: Any) -> Any:
    """Mappings merged key by key, as Snakemake's --config does; anything else replaced."""
    if isinstance(value, Mapping) and isinstance(changes, Mapping):
        return {**value, **{key: merge(value.get(key), item) for key, item in changes.items()}}
    return changes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `coppice study`."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="the study, in YAML; later files add keys")
    parser.add_argument("--config", default={}, type=json_object, metavar="JSON", help="keys that override the files'")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the effective study here; print nothing")


def merge_files(files: Sequence[Path], changes: Mapping[str, Any]) -> Any:
    """YAML files merged, later ones on top, and then `changes`."""
    return reduce(merge, [*map(read_yaml, files), changes])


def run(arguments: argparse.Namespace) -> None:
    """`coppice study`."""
    study = load_study(merge_files(arguments.files, arguments.config), " and ".join(map(str, arguments.files)))
    if arguments.output:
        write_effective(study, arguments.output)
    else:
        print(tree.render_tree(study))
