"""Checks the tokenizer of a GGUF file: it is read back, and tokenizes samples by the rules of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unicodedata import normalize

from coppice.data.text import load_tokenizer
from coppice.errors import UserError
from coppice.export.gguf_tokenizer import BYTES, FAMILIES, SPACE, SPECIAL, WHOLE, WORDS, Vocabulary

# What the check tokenizes, with every special token within words.
SAMPLES = (
    "Hello, world! It's the dog's; they'LL say we've 3 cats.",
    "0 12 345 6789 1234567890 3.14e-10 ½ ² Ⅷ ٣٤",
    "  two   three\t\ttabs\n\n\nlines \r\n end   ",
    "\u00a0\u2003\u3000wide\u200bspaces\x85\x1c",
    "naïve Ελληνικά русский עברית العربية हिन्दी ไทย 中文 日本語 한국어",
    "😀👩\u200d👩\u200d👧 e\u0323\u030a zͤ \U0001f1e9\U0001f1ea \ufffd \U0010fffd",
    "def f(x): return {'a': [1, 2]}  # ---- ==== //// .... \\n <|x|> <0x41> ▁▁",
)


def check(path: Path, vocabulary: Vocabulary, folder: Path) -> None:
    """Reads the file's tokenizer back and compares it: its fields, and the tokens of `SAMPLES` by llama.cpp's rules.

    Raises UserError when a field is another one, or a sample's tokens are not those of the folder's tokenizer.
    """
    from tokenizers import normalizers

    found, tokenizer = read_back(path), load_tokenizer(folder)
    different = [name for name in Vocabulary._fields if getattr(found, name) != getattr(vocabulary, name)]
    if different:
        raise UserError(f"The tokenizer of {path.name} reads back with other {', '.join(different)}.")
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    texts = [*SAMPLES, *(f"a {content} b{content}{content}7" for content in special)]
    if isinstance(tokenizer.normalizer, normalizers.NFC):
        texts = [normalize("NFC", text) for text in texts]
    for text, tokens in zip(texts, tokenized(found, texts), strict=True):
        if tokens != tokenizer.encode(text).ids:
            raise UserError(f"The tokenizer of {path.name} gives other tokens than the node's for {text!r}.")


def read_back(path: Path) -> Vocabulary:
    """The vocabulary that a GGUF file holds."""
    from gguf import GGUFReader, Keys

    fields, keys = GGUFReader(path).fields, Keys.Tokenizer

    def value(key: str) -> Any:
        return fields[key].contents() if key in fields else None

    ids = {
        name: value(key)
        for name, key in zip(SPECIAL, (keys.BOS_ID, keys.EOS_ID, keys.UNK_ID, keys.PAD_ID), strict=True)
    }
    return Vocabulary(
        model=value(keys.MODEL),
        pre=value(keys.PRE),
        tokens=value(keys.LIST),
        types=value(keys.TOKEN_TYPE),
        ids={name: index for name, index in ids.items() if index is not None},
        adds={"bos": value(keys.ADD_BOS), "eos": value(keys.ADD_EOS)},
        template=value(keys.CHAT_TEMPLATE),
        merges=value(keys.MERGES),
        scores=value(keys.SCORES),
        prefix=value(keys.ADD_PREFIX),
    )


def tokenized(vocabulary: Vocabulary, texts: Iterable[str]) -> Iterator[list[int]]:
    """The tokens of each text by the rules of llama.cpp, special ones in it included."""
    from gguf import TokenType

    found = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    pairs = enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
    special = {token: index for index, (token, kind) in pairs if kind in found}
    stretch = by_score(vocabulary) if vocabulary.model == "llama" else by_rank(vocabulary)
    begin, end = ([vocabulary.ids[name]] if vocabulary.adds[name] else [] for name in ("bos", "eos"))
    for text in texts:
        parts = [[part] if isinstance(part, int) else stretch(part) for part in cut(text, special)]
        yield [*begin, *(token for part in parts for token in part), *end]


def cut(text: str, special: dict[str, int]) -> list[str | int]:
    """A text in stretches, with the ids of the special tokens in it; longer ones are found first."""
    parts: list[str | int] = [text]
    for content in sorted((content for content in special if content in text), key=len, reverse=True):
        cuts = ([part] if isinstance(part, int) else part.split(content) for part in parts)
        parts = [piece for pieces in cuts for piece in separated(pieces, special[content]) if piece != ""]
    return parts


def separated(pieces: list[Any], between: int) -> Iterator[Any]:
    """The pieces with a token between each two."""
    yield pieces[0]
    for piece in pieces[1:]:
        yield between
        yield piece


def by_rank(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """How a `gpt2` tokenizes a stretch of text: by its merges, in the pieces of its family's pre-tokenizer."""
    from tokenizers import Tokenizer

    pieces, whole = FAMILIES[vocabulary.pre]
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [step | {"trim_offsets": False} if step in (WORDS, WHOLE) else step for step in pieces],
        },
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
            "merges": [merge.split(" ") for merge in vocabulary.merges],
            "ignore_merges": whole,
        },
    }
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    return lambda text: tokenizer.encode(text).ids


def by_score(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """How a `llama` does: the leftmost neighbours whose union has the best score become one, till none are a token."""
    index = {token: place for place, token in enumerate(vocabulary.tokens)}

    def tokens(text: str) -> list[int]:
        parts = list(((" " if vocabulary.prefix else "") + text).replace(" ", SPACE))
        while unions := [
            (-vocabulary.scores[index[one + other]], place)
            for place, (one, other) in enumerate(pairwise(parts))
            if one + other in index
        ]:
            _, place = min(unions)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return [token for part in parts for token in ([index[part]] if part in index else bytes_of(part))]

    def bytes_of(character: str) -> list[int]:
        return [index[BYTES[byte]] for byte in character.encode()]

    return tokens
