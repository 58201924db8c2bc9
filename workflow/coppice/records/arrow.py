"""Records as rows of Parquet: schemas from annotated fields, and files that are whole or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, NotRequired, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from coppice.errors import UserError
from coppice.records.base import Column

_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def fields_of(record: type) -> dict[str, tuple[Any, Column | None]]:
    """The fields of a record by name, those of its bases included: the annotation without `Annotated`, and its column.

    Bases come last to first, as pydantic writes them.
    """
    fields = {}
    for name, hint in get_type_hints(record, include_extras=True).items():
        if get_origin(hint) is ClassVar:
            continue
        kind, *metadata = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        fields[name] = (kind, next((entry for entry in metadata if isinstance(entry, Column)), None))
    return fields


def arrow_type(kind: Any) -> pa.DataType:
    """The type of a column that holds values of an annotation; what is neither number nor text becomes JSON text."""
    if get_origin(kind) is NotRequired:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        members = set(get_args(kind)) - {NoneType}
        kind = float if members == {int, float} else members.pop()
    if get_origin(kind) is list:
        return pa.list_(arrow_type(get_args(kind)[0]))
    return _TYPES.get(kind, pa.string())


def field(record: type, name: str, column: str | None = None) -> pa.Field:
    """A column of a table that is a field of a record, under its own name or another one."""
    kind, meaning = fields_of(record)[name]
    if meaning is None:
        raise TypeError(f"{record.__name__}.{name} has no Column that describes it")
    return column_field(column or name, arrow_type(kind), meaning)


def column_field(name: str, kind: pa.DataType, column: Column) -> pa.Field:
    return pa.field(name, kind, metadata={"unit": column.unit, "description": column.text})


def schema_of(record: type) -> pa.Schema:
    """The schema of a file whose rows are the record."""
    return pa.schema([pa.field(name, arrow_type(kind)) for name, (kind, _) in fields_of(record).items()])


def write_parquet(path: Path, rows: Sequence[Any], schema: pa.Schema) -> None:
    """Rows as Zstandard-compressed Parquet, typed even without rows."""
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="zstd")


def read_parquet(path: Path, columns: Sequence[str], renamed: Mapping[str, str] | None = None) -> pa.Table:
    """The columns of a file. renamed: new names of columns by those that older versions wrote.

    Raises UserError where the file is missing, damaged, or lacks a column.
    """
    try:
        table = pq.ParquetFile(path).read()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole Parquet file; remove it and run again.") from error
    if renamed:
        table = table.rename_columns([renamed.get(name, name) for name in table.column_names])
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; remove it and run again.")
    return table.select(list(columns))
