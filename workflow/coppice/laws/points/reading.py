"""Reads what a law is fitted to: the study's tables, or a file of points; and leaves out what cannot be fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from coppice.errors import UserError, did_you_mean
from coppice.laws.contracts import Law
from coppice.laws.engine.points import Points, count, select
from coppice.laws.options import LawOptions
from coppice.records.renamed import COLUMNS as RENAMED

_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".parquet": pd.read_parquet,
    ".jsonl": lambda path: pd.read_json(path, lines=True),
    ".csv": pd.read_csv,
}
_KEYS = {"nodes": ("node",), "metrics": ("node", "evaluation", "metric"), "curves": ("node", "tokens", "split")}
_COUNTED = ("parameters", "tokens")  # units of what is never zero or less


def read_points(law: Law, tables: Path | None, options: LawOptions) -> tuple[Points, list[str]]:
    """The points of a law that can be fitted, and sentences on those that were left out.

    tables: the folder of the study's tables; None where the option `file` names the points. Raises UserError for a
    file, a table or a column that does not exist, and as the law's `points` does.
    """
    raw = _read_file(law, options) if options.file else law.points(_read_tables(law, tables), options)
    return _leave_out(law, raw, options)


def _read_tables(law: Law, directory: Path | None) -> dict[str, pd.DataFrame]:
    """The columns that the law reads of each table."""
    if directory is None:
        raise UserError("The law reads a study's tables; pass --tables, or name a file of points in its options.")
    return {name: _read_table(Path(directory) / f"{name}.parquet", needed) for name, needed in law.needs.items()}


def _read_table(path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    with _explain_errors(path):
        stored = {RENAMED.get(name, name): name for name in pq.read_schema(path).names}
        missing = [column for column in needed if column not in stored]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]!r}: it was written by another version; remove it, and make the "
                "tables again (`snakemake tables`)."
            )
        frame = pd.read_parquet(path, columns=[stored[column] for column in needed]).rename(columns=RENAMED)
        return _without_repeats(frame.reset_index(drop=True), path)


def _without_repeats(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table with each row once. Raises UserError where two rows of a key differ."""
    key = [column for column in _KEYS.get(path.stem, ()) if column in table]
    if not key or not (repeated := table.duplicated(key)).any():
        return table
    # Lists, such as the traits of a node, have no hash.
    if table[~table.astype(str).duplicated()].duplicated(key).any():
        name = ", ".join(f"{column} {table.at[repeated.idxmax(), column]!s}" for column in key)
        raise UserError(
            f"{path} holds two different rows of {name}; remove it, and make the tables again (`snakemake tables`)."
        )
    return table[~repeated].reset_index(drop=True)


def _read_file(law: Law, options: LawOptions) -> Points:
    """The points of the file that the options name, with the law's columns."""
    path = Path(str(options.file))
    if path.suffix not in _READERS:
        raise UserError(f"{path} must be one of {', '.join(_READERS)}.")
    with _explain_errors(path):
        frame = _READERS[path.suffix](path)
    points = {}
    for name, kind in law.columns.items():
        column = options.columns.get(name, name)
        if column not in frame.columns:
            raise UserError(
                f"{path} has no column {column!r}.{did_you_mean(column, list(frame.columns))} The law needs a column "
                f"for {name!r}; name it as {{{name}: <column>}} in the option `columns`."
            )
        try:
            points[name] = frame[column].to_numpy(dtype=kind)
        except (TypeError, ValueError):
            raise UserError(f"The column {column!r} of {path} holds values that are not numbers.") from None
    return points


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    """Turns what readers of files raise into a sentence."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); write it again.") from error


def _leave_out(law: Law, points: Points, options: LawOptions) -> tuple[Points, list[str]]:
    """The points without those that cannot be fitted, and sentences on those."""
    total, notes = count(points), []

    def keep(points: Points, rows: np.ndarray, reason: str) -> Points:
        if rows.all():
            return points
        notes.append(f"{np.sum(~rows)} of {total} points {reason} and were left out.")
        return select(points, rows)

    numbers = [name for name, kind in law.columns.items() if kind is float]
    finite = np.isfinite([points[name] for name in numbers])
    points = keep(points, np.all(finite, axis=0), "hold a value that is not finite")
    counted = [name for name, unit in law.units.items() if unit in _COUNTED and name in law.columns]
    above = np.ones(count(points), bool)
    for name in counted:
        above &= points[name] > 0
    points = keep(points, above, "have no parameters or tokens")
    repeated = pd.DataFrame(points).duplicated().to_numpy(dtype=bool)
    points = keep(points, ~repeated, "repeat another one")
    if law.form is not None and options.residuals == "logarithmic":
        points = keep(points, np.asarray(points[law.form.target] > 0), "have no logarithm")
    return points, notes
