"""The tokenizer in a GGUF file: writing it, reading it back, and llama.cpp's tokens of a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from gguf import GGUFWriter

Definition = Mapping[str, Any]  # of a tokenizer or one of its parts, as tokenizer.json has it

SPECIAL = ("bos", "eos", "unk", "pad")
SPACE = "▁"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

WHOLE = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_step(pattern: str) -> Definition:
    """A step that cuts every match out."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# Steps of the pre-tokenizer, and whether a piece that is a token stays whole, under the name that has llama.cpp do so
# (src/llama-vocab.cpp). Names whose pattern only comes near their tokenizer's there, such as tekken, are left out.
FAMILIES: dict[str, tuple[list[Definition], bool]] = {
    "gpt-2": ([WORDS], False),
    "smollm": ([DIGITS, WORDS], False),
    "qwen2": ([split_step(LETTERS + r"\p{N}" + REST), WHOLE], False),
    "llama-bpe": ([split_step(LETTERS + r"\p{N}{1,3}" + REST), WHOLE], True),
    "smaug-bpe": ([split_step(LETTERS + r"\p{N}{1,3}" + REST), WHOLE], False),
}


class Vocabulary(NamedTuple):
    """The file's tokenizer. tokens, types: one for each row of the model's embedding; ids, adds: of the
    special tokens, and whether a text gets them, by short name. merges belong to `gpt2`; scores and prefix (whether a
    space is put before each stretch of text) belong to `llama`."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    adds: dict[str, bool]
    template: str | None
    merges: list[str] | None = None
    scores: list[float] | None = None
    prefix: bool | None = None


def write(writer: GGUFWriter, vocabulary: Vocabulary | None) -> None:
    """Under the names that llama.cpp reads; None: without a tokenizer."""
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(bool(vocabulary.prefix))
    for name, index in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds["bos"])
    writer.add_add_eos_token(vocabulary.adds["eos"])
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def read_vocabulary(path: Path) -> Vocabulary:
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


def tokenize(vocabulary: Vocabulary, texts: Iterable[str]) -> Iterator[list[int]]:
    """The tokens of each text by the rules of llama.cpp, special ones in it included."""
    from gguf import TokenType

    cut_out = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    pairs = enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
    special = {token: index for index, (token, kind) in pairs if kind in cut_out}
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
        parts = [piece for pieces in cuts for piece in interleave(pieces, special[content]) if piece != ""]
    return parts


def interleave(pieces: list[Any], between: int) -> Iterator[Any]:
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
            "pretokenizers": [{**step, "trim_offsets": False} if step in (WORDS, WHOLE) else step for step in pieces],
        },
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
            "merges": [merge.split(" ") for merge in vocabulary.merges or ()],
            "ignore_merges": whole,
        },
    }
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    return lambda text: tokenizer.encode(text).ids


def by_score(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """How a `llama` does: the leftmost neighbours whose union has the best score become one, till none are a token."""
    index = {token: place for place, token in enumerate(vocabulary.tokens)}
    scores = vocabulary.scores or []

    def tokens(text: str) -> list[int]:
        parts = list(((" " if vocabulary.prefix else "") + text).replace(" ", SPACE))
        while unions := [
            (-scores[index[one + other]], place)
            for place, (one, other) in enumerate(pairwise(parts))
            if one + other in index
        ]:
            _, place = min(unions)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return [token for part in parts for token in ([index[part]] if part in index else bytes_of(part))]

    def bytes_of(character: str) -> list[int]:
        return [index[BYTES[byte]] for byte in character.encode()]

    return tokens
