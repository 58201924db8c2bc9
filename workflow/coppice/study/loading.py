"""Reads, validates and explains a study; writes the effective one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from coppice.errors import UserError
from coppice.files import atomic_write
from coppice.study import tree
from coppice.study.schema import (
    Study,
    _badly_named,
    _readable_numbers,
    _references,
    _refuse,
    _sentence,
    _sources,
)


def load_study(source: Path | str | Mapping[str, Any], where: str | None = None) -> Study:
    """The study of a YAML file, or of what a YAML reader made of one; paths are relative to the working directory.

    Raises UserError with one sentence a problem: each names its place and what to do. `where` is what they call the
    whole; the file's name when left out.
    """
    given = isinstance(source, Mapping)
    where = where or ("The study" if given else str(source))
    value = _readable_numbers(source if given else read_yaml(Path(source)))
    problems = list(_badly_named(value)) if isinstance(value, Mapping) else ["It must be a mapping of keys to values."]
    _refuse(where, problems)
    try:
        study = Study.model_validate(value)
    except ValidationError as error:
        _refuse(where, [_sentence(details) for details in error.errors()])
    _refuse(where, [*_references(study), *_sources(study)])
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


def effective(study: Study) -> dict[str, Any]:
    """The study as plain values after defaults; `load_study` reads it back as the same study."""
    return study.model_dump(mode="json")


def write_effective(study: Study, path: Path) -> None:
    """Writes the effective study as YAML."""
    text = yaml.safe_dump(effective(study), sort_keys=False, allow_unicode=True, width=120)
    with atomic_write(path) as temporary:
        temporary.write_text("# The effective study: what was asked for, after defaults.\n" + text, encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `coppice study`."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="the study, in YAML; later files add keys")
    parser.add_argument("--config", default={}, type=json.loads, metavar="JSON", help="keys that win over the files'")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the effective study here; print nothing")


def merged_files(files: Sequence[Path], changes: Mapping[str, Any]) -> Any:
    """What YAML files say together, later ones on top, and then `changes`."""
    return reduce(_merged, [*map(read_yaml, files), changes])


def run(arguments: argparse.Namespace) -> None:
    """`coppice study`."""
    study = load_study(merged_files(arguments.files, arguments.config), " and ".join(map(str, arguments.files)))
    if arguments.output:
        write_effective(study, arguments.output)
    else:
        print(tree.render_tree(study))


def _merged(value: Any, changes: Any) -> Any:
    """Mappings merged key by key, as Snakemake's --config does; anything else replaced."""
    if isinstance(value, Mapping) and isinstance(changes, Mapping):
        return {**value, **{key: _merged(value.get(key), item) for key, item in changes.items()}}
    return changes
