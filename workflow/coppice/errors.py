"""Errors whose text is a sentence for the user: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something that the user can mend; the command line prints its sentence and exits with 1."""


@contextmanager
def error_context(name: str) -> Iterator[None]:
    """Puts the name of what a UserError is about, such as a linear, before its sentence."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the nearest known name, or a list of all when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."
