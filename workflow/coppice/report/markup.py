"""Parts of the page's tables as HTML: sections, notes, lists and tables."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable
from html import escape

_LONG = 20  # rows: a longer table is folded


def section(title: str, content: str) -> str:
    name = re.sub(r"\W+", "-", title.lower())
    summary = f"<summary><h3>{escape(title)}</h3></summary>"
    return f'<details class="section" id="section-{name}">{summary}\n{content}\n</details>'


def note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>"


def table(titles: list[str], rows: Iterable[list[str]], texts: int | frozenset[int] = 1) -> str:
    """An HTML table; the first `texts` columns, or those at the places `texts`, are text and the others numbers."""
    left = frozenset(range(texts)) if isinstance(texts, int) else texts

    def cells(row: list[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if place in left else ''}>{breakable(escape(cell), tag)}</{tag}>"
            for place, cell in enumerate(row)
        )

    def breakable(text: str, tag: str) -> str:
        """The text; a title may break after an underscore, because long names of metrics would widen the table."""
        return text.replace("_", "_<wbr>") if tag == "th" else text

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{cells(titles, 'th')}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def foldable(titles: list[str], rows: list[list[str]], texts: int | frozenset[int] = 1) -> str:
    """The table, folded if it is long."""
    text = table(titles, rows, texts)
    return fold(f"{len(rows)} rows", text) if len(rows) > _LONG else text


def fold(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def image(svg: str, description: str) -> str:
    """A figure as an image of its own, so that its styles and ids stay apart from the page's."""
    content = b64encode(svg.encode()).decode()
    return f'<img alt="{escape(description)}" src="data:image/svg+xml;base64,{content}">'


def by_path(names: Iterable[str]) -> list[str]:
    """Each node once, in the order of the tree."""
    return sorted(set(names), key=lambda name: name.split("/"))


def bullet_list(sentences: list[str]) -> str:
    """A list; empty without sentences."""
    if not sentences:
        return ""
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"
