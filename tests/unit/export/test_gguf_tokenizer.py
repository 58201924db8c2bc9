"""The tokenizer of a GGUF file: the same tokens by llama.cpp's rules, or none and the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter, TokenType
from manifests import provenance
from nodes import save_root
from tiny import tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from coppice.errors import UserError
from coppice.export import gguf_tokenizer, gguf_vocabulary
from coppice.export.stage import export
from coppice.files import read_json, write_json
from coppice.models.checkpoint import save_checkpoint

TEXT = [*gguf_tokenizer.SAMPLES, "the cat and the other cats gather there, together with others", "erere ananas"] * 4
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": lambda: split(QWEN_2),
    "llama-bpe": lambda: split(LLAMA_3),
    "smaug-bpe": lambda: split(LLAMA_3),
}


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def with_all_pairs() -> Tokenizer:
    """Like those converted from SentencePiece: every two tokens that make up a token are a pair, the longest left part
    first among those of one token."""
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=[*special, *gguf_vocabulary.BYTES],
        initial_alphabet=list("▁abcdefghijklmnopqrstuvwxyz"),
        limit_alphabet=90,
        show_progress=False,
    )
    # llama.cpp would merge up to the text of a byte's own token, if it learned its parts.
    trained.train_from_iterator([text for text in TEXT if "<0x" not in text], trainer)
    definition = json.loads(trained.to_str())
    vocabulary = definition["model"]["vocab"]
    definition["model"]["merges"] = [
        [token[:middle], token[middle:]]
        for token in sorted(vocabulary, key=vocabulary.get)
        if token not in {*special, *gguf_vocabulary.BYTES}
        for middle in reversed(range(1, len(token)))
        if token[:middle] in vocabulary and token[middle:] in vocabulary
    ]
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    begins(tokenizer)
    return tokenizer


def begins(tokenizer: Tokenizer, template: str = "<s> $A") -> None:
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


def save(folder: Path, tokenizer: Tokenizer, size: int = 640, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **settings})
    write_json(folder / "config.json", {"vocab_size": size})
    return folder


def written(folder: Path, size: int = 640) -> gguf_vocabulary.Vocabulary:
    """The vocabulary of a file that holds it and passes the check."""
    vocabulary, _ = gguf_tokenizer.read(folder, size)
    assert vocabulary is not None, gguf_tokenizer.read(folder, size)[1]
    save_vocabulary(folder / "model.gguf", vocabulary)
    gguf_tokenizer.check(folder / "model.gguf", vocabulary, folder)
    return vocabulary


def save_vocabulary(path: Path, vocabulary: gguf_vocabulary.Vocabulary) -> None:
    writer = GGUFWriter(path, "llama")
    gguf_vocabulary.write(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def reason(folder: Path, tokenizer: Tokenizer, **settings: Any) -> str:
    """The sentence that says why a tokenizer is not written."""
    vocabulary, notes = gguf_tokenizer.read(save(folder, tokenizer, **settings), 640)
    assert vocabulary is None
    return notes[0]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_family_gives_the_tokens_of_its_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(PRE_TOKENIZERS[name](), ignore_merges=name == "llama-bpe")
    begins(tokenizer, "<s> $A </s>" if name == "qwen2" else "<s> $A")
    vocabulary = written(save(tmp_path, tokenizer, chat_template="{{ messages }}", pad_token="</s>"))
    assert (vocabulary.model, vocabulary.pre, vocabulary.template) == ("gpt2", name, "{{ messages }}")
    assert vocabulary.ids == {"bos": 0, "eos": 1, "pad": 1}
    assert vocabulary.adds == {"bos": True, "eos": name == "qwen2"}
    assert vocabulary.merges == [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    kinds = [TokenType(kind).name for kind in vocabulary.types]
    assert kinds == ["CONTROL"] * 2 + ["NORMAL"] * 398 + ["USER_DEFINED"] + ["UNUSED"] * 239
    assert vocabulary.tokens[400:402] == ["<think>", "[PAD401]"]


def test_transformers_reads_the_same_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = byte_level(split(QWEN_2))
    model = tiny_model("qwen2", num_hidden_layers=1, vocab_size=640)
    root, own = tmp_path / "root", save(tmp_path / "tokenizer", tokenizer)
    save_checkpoint(model, root, own, provenance(), torch.float32)
    export(root, "gguf", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    for text in (*gguf_tokenizer.SAMPLES, "a<s>b <think> c</s>"):
        if "\u0323" not in text:  # transformers brings a qwen2's text to NFC, whatever the file says
            assert theirs.encode(text) == tokenizer.encode(text).ids, text
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")


def test_text_is_to_be_composed_where_the_tokenizer_composes_it(tmp_path: Path) -> None:
    tokenizer = byte_level(split(QWEN_2))
    tokenizer.normalizer = normalizers.NFC()
    written(save(tmp_path, tokenizer))
    assert "does not bring text to the form NFC" in gguf_tokenizer.read(tmp_path, 640)[1][0]


def test_a_tokenizer_from_sentencepiece_merges_by_score(tmp_path: Path) -> None:
    tokenizer = with_all_pairs()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert len({left + right for left, right in merges}) < len(merges)
    vocabulary = written(save(tmp_path, tokenizer, unk_token="<unk>"))
    assert (vocabulary.model, vocabulary.pre, vocabulary.prefix) == ("llama", "default", True)
    assert [TokenType(kind).name for kind in vocabulary.types[:4]] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert (vocabulary.ids, vocabulary.adds) == ({"bos": 1, "eos": 2, "unk": 0}, {"bos": True, "eos": False})
    assert vocabulary.merges is None
    # Neighbours that make one token in two ways, next to each other: what ranks and scores could settle otherwise.
    texts = [one + other + one for one in vocabulary.tokens[280:520:7] for other in vocabulary.tokens[283:520:11]]
    texts = [text.replace("▁", " ") for text in texts]
    assert list(gguf_vocabulary.tokenize(vocabulary, texts)) == [tokenizer.encode(text).ids for text in texts]


def test_the_public_model_keeps_its_tokenizer(shared_data: Path) -> None:
    folder = shared_data / "stories260K" / "hf"
    vocabulary, notes = gguf_tokenizer.read(folder, 512)
    assert (vocabulary.model, vocabulary.ids, notes) == ("llama", {"bos": 1, "eos": 2, "unk": 0, "pad": 0}, ())
    path = shared_data / "text_tinystories_val" / "validation.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()[:10]]
    ours = gguf_vocabulary.tokenize(vocabulary, texts)
    assert list(ours) == [Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids for text in texts]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, r"not one that is known .* \(gpt-2, .*convert_hf_to_gguf.py"),
        ({"pre_tokenizer": split(LLAMA_3.replace("3}", "4}"))}, r"its pre-tokenizer is not one that is known"),
        ({"normalizer": normalizers.Lowercase()}, "does not know its normalizer"),
        ({"decoder": decoders.WordPiece()}, "it is not a byte-level BPE"),
    ],
)
def test_what_llama_cpp_would_do_otherwise_is_not_written(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    tokenizer = byte_level(split(LLAMA_3))
    for name, value in change.items():
        setattr(tokenizer, name, value)
    said = reason(tmp_path, tokenizer)
    assert re.search(sentence, said), said
    assert said.startswith("The file holds no tokenizer, because ")
    assert "Programs must pass tokens, of the tokenizer.json next to it" in said


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        (AddedToken("<mask>", lstrip=True), "'<mask>' takes in spaces"),
        (AddedToken(">a", normalized=False), "ends as another begins"),
        (AddedToken("in", normalized=True), "hold others"),
    ],
)
def test_added_tokens_that_llama_cpp_finds_otherwise_are_not_written(
    token: AddedToken, sentence: str, tmp_path: Path
) -> None:
    tokenizer = byte_level(split(LLAMA_3))
    tokenizer.add_tokens([token])
    assert sentence in reason(tmp_path, tokenizer)


def test_ends_that_llama_cpp_cannot_add_are_not_written(tmp_path: Path) -> None:
    tokenizer = byte_level(split(LLAMA_3))
    assert "no token for the end" in reason(tmp_path, tokenizer, eos_token=None)
    begins(tokenizer, "</s> $A")
    assert "its post-processor adds more" in reason(tmp_path, tokenizer)


def test_merges_that_no_scores_can_stand_for_are_not_written(tmp_path: Path) -> None:
    tokenizer = with_all_pairs()
    definition = json.loads(tokenizer.to_str())
    pairs = definition["model"]["merges"]
    made = [left + right for left, right in pairs]
    several = next(place for place, token in enumerate(made) if made.count(token) > 1)
    for merges, sentence in (
        ([*pairs[:several], *pairs[several + 1 :]], "llama.cpp would merge"),
        ([*pairs[:several], *pairs[several + 1 :], pairs[several]], "no scores can express the order"),
    ):
        changed = json.dumps(definition | {"model": definition["model"] | {"merges": merges}})
        assert sentence in reason(tmp_path, Tokenizer.from_str(changed))
    tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre_tokenizers.Metaspace()
    assert "does not treat spaces" in reason(tmp_path, tokenizer)


def test_merges_with_spaces_never_apply_and_are_left_out(tmp_path: Path) -> None:
    tokenizer = byte_level(split(LLAMA_3))
    definition = json.loads(tokenizer.to_str())
    definition["model"]["vocab"] |= {" ": 401, "a ": 402}
    definition["model"]["merges"].insert(0, ["a", " "])
    # The added token, which the library numbers by the size of the vocabulary, would get the id of another.
    assert "share a text or an id" in reason(tmp_path, Tokenizer.from_str(json.dumps(definition)))
    definition["added_tokens"].pop()
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    assert len(written(save(tmp_path, tokenizer)).merges) == len(definition["model"]["merges"]) - 1


def test_the_check_finds_a_file_with_other_tokens(tmp_path: Path) -> None:
    save(tmp_path, byte_level(split(LLAMA_3)))
    vocabulary = written(tmp_path)
    for other, sentence in (
        (vocabulary._replace(merges=vocabulary.merges[::-1]), "gives other tokens than the node's for .Hello"),
        (vocabulary._replace(pre="gpt-2"), "gives other tokens"),
    ):
        save_vocabulary(tmp_path / "other.gguf", other)
        with pytest.raises(UserError, match=r"tokenizer of other\.gguf reads back with other (merges|pre)"):
            gguf_tokenizer.check(tmp_path / "other.gguf", vocabulary, tmp_path)
        with pytest.raises(UserError, match=sentence):
            gguf_tokenizer.check(tmp_path / "other.gguf", other, tmp_path)


def test_an_export_without_a_tokenizer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(save_root(tmp_path / "root", num_hidden_layers=1), "gguf", tmp_path / "out")
    assert "holds no tokenizer, because llama.cpp has no tokenizer of its kind, WordLevel" in capsys.readouterr().out
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "none"
    assert "tokenizer.ggml.tokens" not in fields
    assert read_json(tmp_path / "out" / "tokenizer.json")["model"]["type"] == "WordLevel"
