"""The disjoint parts of a text by role, and the hash that identifies a document.

`splits` {role: share} of a text gives each role a stretch of its documents, in the order of ROLES. A document that
repeats an earlier one exactly is left out, so that no text lies in two roles. Biographies are disjoint by their own
construction and need no `splits`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, get_args

from coppice.data.sources import builtin_documents, describe, document_reader
from coppice.errors import UserError

Role = Literal["calibration", "recovery", "validation", "evaluation"]
ROLES = get_args(Role)


def documents(text: Mapping[str, Any], role: str, seed: int = 0) -> Iterator[str]:
    """The documents of `text` for `role`, in order. The built-in stream is endless and depends on `seed`.

    Raises UserError where the source is missing, empty or broken, naming file, line or key, or has no share for `role`.
    """
    text = {key: value for key, value in text.items() if value is not None}
    if "builtin" in text:
        yield from builtin_documents(text, role, seed)
        return
    read = document_reader(text)
    count = sum(1 for _ in distinct_documents(read()))
    if not count:
        raise UserError(f"{describe(text)} holds no documents.")
    start, stop = role_bounds(text, role, count)
    if start == stop:
        raise UserError(f"{describe(text)} has {count} documents, too few to give the role {role!r} any.")
    yield from islice(distinct_documents(read()), start, stop)


def role_bounds(text: Mapping[str, Any], role: str, count: int) -> tuple[int, int]:
    """First and past-the-last document of `role` among `count`: shares laid end to end in the order of ROLES.

    Raises UserError for a role without a share, an unknown role, and shares that are not positive or exceed 1 together.
    """
    splits = text.get("splits") or {}
    for name, share in splits.items():
        if name not in ROLES:
            raise UserError(f"{describe(text)} has a split {name!r}; choose from {', '.join(ROLES)}.")
        if not share > 0:
            raise UserError(f"{describe(text)} gives {name!r} the share {share}; a share is more than 0.")
    if role not in splits:
        raise UserError(
            f"{describe(text)} has no share for the role {role!r}; give it one, as in `splits: {{{role}: 0.5}}`."
        )
    if (total := sum(splits.values())) > 1 + 1e-9:
        raise UserError(f"The splits of {describe(text)} add up to {total:g}; shares may not exceed 1 together.")
    before = sum(splits.get(name, 0) for name in ROLES[: ROLES.index(role)])
    # Sums such as 0.1 + 0.2 may fall just below the integer that they mean.
    return int(count * before + 1e-6), min(count, int(count * (before + splits[role]) + 1e-6))


def distinct_documents(source: Iterable[str]) -> Iterator[str]:
    """The documents of `source` that are not blank and not exact repetitions of an earlier one."""
    seen: set[int] = set()
    for document in source:
        if document.strip() and (key := document_hash(document)) not in seen:
            seen.add(key)
            yield document


def document_hash(document: str) -> int:
    """64 bits of the document's BLAKE2b digest, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big", signed=True)
