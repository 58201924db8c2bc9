"""The tokenizer of a GGUF file, of the two kinds that llama.cpp runs to the same tokens; no others are written.

Byte-level BPE, which llama.cpp calls `gpt2`: ranked merges inside the pieces that a pre-tokenizer cuts. llama.cpp knows
pre-tokenizers by name, so that one is written only if its definition equals that of a name in `FAMILIES`.

BPE over characters with bytes as fallback, as converted from SentencePiece, which llama.cpp calls `llama`. There the
neighbours whose union has the best score become one, the leftmost of equals; in tokenizer.json it is the best-ranked
pair. The two agree on every text if (a) any neighbours whose union is a token are a pair of the merges, and (b) the
pairs of one token follow each other, so that a score can replace their ranks. Proof by the length of a text: where
a token is formed, the merges inside it before are those of its text alone, in either way. If both ways agree on
shorter texts, any shorter token is formed from one pair, the same both ways, however many pairs it has. The leftmost
of the best-scored neighbours are then the leftmost of the best-ranked pair. The last merge of a text has no choice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import normalize

from coppice.data.tokenizer import load_tokenizer, optional_json
from coppice.errors import UserError
from coppice.export.gguf_vocabulary import (
    BYTES,
    FAMILIES,
    SPACE,
    SPECIAL,
    Definition,
    Vocabulary,
    read_vocabulary,
    tokenize,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONVERTER = "export it to dense and convert that with convert_hf_to_gguf.py of llama.cpp"

# Normalizer and pre-tokenizer of the second kind, and whether a space is put before each stretch of text.
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
SPACES: tuple[tuple[list[Definition], list[Definition], bool], ...] = (
    ([{"type": "Prepend", "prepend": SPACE}, REPLACE], [], True),
    ([REPLACE], [], False),
    ([], [{"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}], False),
)
# Tokens that llama.cpp finds in a text as control tokens, whatever their type says (src/llama-vocab.cpp).
CONTROLS = {
    "</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|im_end|>",
    "<|ifm|im_end|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>", "<|endoftext|>", "<|end_of_text|>",
    "<｜end▁of▁sentence｜>", "[e~[", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>",
    "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<PAD>", "[PAD]", "<REPO>", "<reponame>",
    "<|repo_name|>", "<|file_sep|>", "<PRE>", "<SUF>", "<MID>", "▁<PRE>", "▁<SUF>", "▁<MID>", "<fim-prefix>",
    "<fim-suffix>", "<fim-middle>", "<fim-pad>", "<fim-repo>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>",
    "<fim_pad>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|fim_repo|>", "<|prefix|>",
    "<|suffix|>", "<|middle|>", "<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", "<｜fim▁begin｜>",
    "<｜fim▁hole｜>", "<｜fim▁end｜>", "<|plamo:fim_prefix|>", "<|plamo:fim_suffix|>", "<|plamo:fim_middle|>",
    "<|plamo:file_separator|>",
}  # fmt: skip
COMPOSED = "llama.cpp does not bring text to the form NFC, as the node's tokenizer does: pass it text in that form."
# What the check tokenizes, next to every special token within words.
SAMPLES = (
    "Hello, world! It's the dog's; they'LL say we've 3 cats.",
    "0 12 345 6789 1234567890 3.14e-10 ½ ² Ⅷ ٣٤",
    "  two   three\t\ttabs\n\n\nlines \r\n end   ",
    "\u00a0\u2003\u3000wide\u200bspaces\x85\x1c",
    "naïve Ελληνικά русский עברית العربية हिन्दी ไทย 中文 日本語 한국어",
    "😀👩\u200d👩\u200d👧 e\u0323\u030a zͤ \U0001f1e9\U0001f1ea \ufffd \U0010fffd",
    "def f(x): return {'a': [1, 2]}  # ---- ==== //// .... \\n <|x|> <0x41> ▁▁",
)


def read(folder: Path, size: int) -> tuple[Vocabulary | None, tuple[str, ...]]:
    """The vocabulary for a model of `size` tokens, None where it cannot be exact, and sentences for the user."""
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        return None, (f"The file holds no tokenizer. {error}",)
    # The library spells out what older files leave out, and gives merges as pairs.
    definition = json.loads(tokenizer.to_str())
    ids, model = special_ids(folder, tokenizer, size), definition["model"]
    known = tokenizer.get_vocab(with_added_tokens=True)
    tokens, types = token_list(definition, known, size)
    reason = (
        reason_against_model(model)
        or reason_against_list(known, tokens)
        or reason_against_controls(tokens, types)
        or (
            reason_against_characters(definition, tokens)
            if model["byte_fallback"]
            else reason_against_bytes(definition)
        )
        or reason_against_added(definition)
        or reason_against_ends(ids, added_around(tokenizer))
    )
    if reason is not None:
        return None, (format_refusal(reason),)
    before, after = added_around(tokenizer) or ([], [])
    adds = {"bos": bool(before), "eos": bool(after)}
    common = (tokens, types, ids, adds, chat_template(folder))
    if model["byte_fallback"]:
        scores, prefix = scores_of(model, tokens), spaces(definition)
        return Vocabulary("llama", "default", *common, scores=scores, prefix=prefix), ()
    notes = () if definition["normalizer"] is None else (COMPOSED,)
    # Where the family is None, the tokenizer was refused above.
    return Vocabulary("gpt2", family(definition) or "", *common, merges=merges_of(model)), notes


def format_refusal(reason: str) -> str:
    return (
        f"The file holds no tokenizer, because {reason}. Programs must pass tokens, of the tokenizer.json next to it; "
        "llama-server gives embeddings alone without a tokenizer."
    )


def reason_against_model(model: Definition) -> str | None:
    if model["type"] != "BPE":
        return f"llama.cpp has no tokenizer of its kind, {model['type']}"
    if any(model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return "its merges drop out, or mark parts of words, which llama.cpp does not support"
    return None


def reason_against_list(known: Iterable[str], tokens: list[str]) -> str | None:
    """known: the tokenizer's tokens; tokens: those to be written, one for each id."""
    if len(set(tokens)) < len(tokens) or not set(known) <= set(tokens):
        return "two of its tokens share a text or an id"
    return None


def reason_against_controls(tokens: list[str], types: list[int]) -> str | None:
    from gguf import TokenType

    for token, kind in zip(tokens, types, strict=True):
        if kind == TokenType.NORMAL and token in CONTROLS:
            return f"llama.cpp takes its token {token!r}, which is not an added token, for a control token"
    if {"</s>", "<|tool_response>"} <= set(tokens):
        return "llama.cpp does not find '</s>' in the text of a tokenizer that knows '<|tool_response>' too"
    return None


def reason_against_bytes(definition: Definition) -> str | None:
    """Of a byte-level BPE."""
    from tokenizers import pre_tokenizers

    if (definition["decoder"] or {}).get("type") != "ByteLevel":
        return f"it is not a byte-level BPE; {CONVERTER}"
    if family(definition) is None:
        return f"its pre-tokenizer is not one that is known to be llama.cpp's ({', '.join(FAMILIES)}); {CONVERTER}"
    if definition["normalizer"] not in (None, {"type": "NFC"}):
        return f"llama.cpp does not know its normalizer; {CONVERTER}, if other tokens are close enough"
    if not set(pre_tokenizers.ByteLevel.alphabet()) <= definition["model"]["vocab"].keys():
        return "some bytes are not among its tokens"
    return None


def family(definition: Definition) -> str | None:
    """The name of its pre-tokenizer in llama.cpp."""
    parts = (steps(definition["pre_tokenizer"], "pretokenizers"), definition["model"]["ignore_merges"])
    return next((name for name, known in FAMILIES.items() if known == parts), None)


def steps(definition: Definition | None, key: str) -> list[Definition]:
    """The steps of a normalizer or pre-tokenizer in order, without what only moves the offsets of tokens."""
    if definition is None:
        return []
    if definition["type"] == "Sequence":
        return [step for part in definition[key] for step in steps(part, key)]
    return [{name: value for name, value in definition.items() if name != "trim_offsets"}]


def reason_against_characters(definition: Definition, tokens: list[str]) -> str | None:
    """Of a BPE over characters that falls back on bytes, with (a) and (b) of the module's text; tokens: those to
    be written."""
    model = definition["model"]
    vocabulary, pairs = model["vocab"], {tuple(pair) for pair in model["merges"]}
    if spaces(definition) is None:
        return f"llama.cpp does not treat spaces as its normalizer and pre-tokenizer do; {CONVERTER}"
    if model["ignore_merges"] or not vocabulary.keys() >= set(BYTES):
        return "its words stay whole, or some bytes are not among its tokens, which llama.cpp does not support"
    if any(part in BYTES for pair in pairs for part in pair):
        return "it merges bytes, which llama.cpp does not"
    order = [left + right for left, right in model["merges"]]
    changes = [token for token, before in zip(order, [None, *order], strict=False) if token != before]
    if len(set(changes)) < len(changes):
        return "no scores can express the order of its merges"
    added = [token["content"] for token in definition["added_tokens"]]
    for token in tokens:
        # Text that holds an added token is cut there before anything is merged.
        if any(content in token for content in added):
            continue
        for middle in range(1, len(token)):
            left, right = token[:middle], token[middle:]
            if all(len(part) == 1 or part in vocabulary for part in (left, right)) and (left, right) not in pairs:
                return f"llama.cpp would merge {left!r} and {right!r}, which it does not"
    return None


def spaces(definition: Definition) -> bool | None:
    """Whether a space is put before each stretch of text; None where llama.cpp has no such treatment of spaces."""
    parts = (steps(definition["normalizer"], "normalizers"), steps(definition["pre_tokenizer"], "pretokenizers"))
    return next((prefix for *known, prefix in SPACES if tuple(known) == parts), None)


def reason_against_added(definition: Definition) -> str | None:
    """llama.cpp cuts a text at added tokens, the longest first, as they are; tokenizers takes the leftmost first."""
    tokens = definition["added_tokens"]
    for token in tokens:
        content = token["content"]
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return (
                f"its added token {content!r} takes in spaces or must be a word of its own, which llama.cpp does not "
                "support"
            )
        plain = content.isascii() and definition["normalizer"] == {"type": "NFC"}
        if token["normalized"] and definition["normalizer"] is not None and not plain:
            return f"its added token {content!r} is looked for in normalized text, which llama.cpp does not do"
        if definition["model"]["byte_fallback"] and (" " in content or SPACE in content):
            return f"its added token {content!r} holds a space"
    contents = [token["content"] for token in tokens]
    starts = Counter(content[:end] for content in contents for end in range(1, len(content)))
    for content in contents:
        for start in range(1, len(content)):
            if starts[content[start:]] > content.startswith(content[start:]):
                return f"its added token {content!r} ends as another begins, which llama.cpp resolves in another way"
    if len({token["normalized"] for token in tokens}) > 1 and any(
        one in other for one, other in permutations(contents, 2)
    ):
        return "some of its added tokens hold others, which llama.cpp resolves in another way"
    return None


def reason_against_ends(ids: dict[str, int], affixes: tuple[list[int], list[int]] | None) -> str | None:
    """affixes: ids that the post-processor puts before and after a text."""
    if "eos" not in ids:
        return "it names no token for the end of a text, and llama.cpp would take one of its own choice for it"
    known: tuple[list[list[int | None]], ...] = ([[], [ids.get("bos")]], [[], [ids["eos"]]])
    if affixes is None or any(affix not in choices for affix, choices in zip(affixes, known, strict=True)):
        return f"its post-processor adds more than the token for the beginning and the one for the end; {CONVERTER}"
    return None


def added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """The ids that the post-processor puts before and after a text; None where it does something else."""
    bare, full = (tokenizer.encode("a b", add_special_tokens=special).ids for special in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return None


def special_ids(folder: Path, tokenizer: Tokenizer, size: int) -> dict[str, int]:
    """By short name, below `size`: what tokenizer_config.json names, else the first id that config.json does."""
    settings, config = (optional_json(folder / name) for name in ("tokenizer_config.json", "config.json"))
    ids = {}
    for name in SPECIAL:
        token = settings.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        index = tokenizer.token_to_id(content) if content is not None else None
        if index is None:
            index = config.get(f"{name}_token_id")
            index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and 0 <= index < size:
            ids[name] = index
    return ids


def token_list(definition: Definition, vocabulary: dict[str, int], size: int) -> tuple[list[str], list[int]]:
    """The texts of `size` tokens and their types; ids without a token are of the type `UNUSED`."""
    from gguf import TokenType

    tokens, types = [f"[PAD{index}]" for index in range(size)], [int(TokenType.UNUSED)] * size
    for content, index in vocabulary.items():
        tokens[index], types[index] = content, int(TokenType.NORMAL)
    falls_back, unknown = (definition["model"].get(key) for key in ("byte_fallback", "unk_token"))
    for content in vocabulary.keys() & set(BYTES) if falls_back else ():
        types[vocabulary[content]] = int(TokenType.BYTE)
    for token in definition["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if falls_back and token["content"] == unknown:
            kind = TokenType.UNKNOWN
        types[token["id"]] = int(kind)
    return tokens, types


def merges_of(model: Definition) -> list[str]:
    """Merges as llama.cpp reads them, two parts and a space between. One whose part holds a space is left out: bytes
    are written as letters here, a space as one too, so that it never applies."""
    return [f"{left} {right}" for left, right in model["merges"] if " " not in left + right]


def scores_of(model: Definition, tokens: list[str]) -> list[float]:
    """Of each token: 0, -1 ... in the order of merges; floats of 32 bits hold these exactly below 2^24."""
    order = {token: place for place, token in enumerate(dict.fromkeys(left + right for left, right in model["merges"]))}
    return [float(-order.get(token, 0)) for token in tokens]


def chat_template(folder: Path) -> str | None:
    """As transformers finds it: in a file of its own, else in tokenizer_config.json; of several, the default one."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        return next((choice["template"] for choice in template if choice["name"] == "default"), None)
    return template


def check(path: Path, vocabulary: Vocabulary, folder: Path) -> None:
    """Reads the file's tokenizer back and compares it: its fields, and the tokens of `SAMPLES` by llama.cpp's rules.

    Raises UserError when a field is another one, or a sample's tokens are not those of the folder's tokenizer.
    """
    from tokenizers import normalizers

    written, tokenizer = read_vocabulary(path), load_tokenizer(folder)
    different = [name for name in Vocabulary._fields if getattr(written, name) != getattr(vocabulary, name)]
    if different:
        raise UserError(f"The tokenizer of {path.name} reads back with other {', '.join(different)}.")
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    texts = [*SAMPLES, *(f"a {content} b{content}{content}7" for content in special)]
    if isinstance(tokenizer.normalizer, normalizers.NFC):
        texts = [normalize("NFC", text) for text in texts]
    for text, tokens in zip(texts, tokenize(written, texts), strict=True):
        if tokens != tokenizer.encode(text).ids:
            raise UserError(f"The tokenizer of {path.name} gives other tokens than the node's for {text!r}.")
