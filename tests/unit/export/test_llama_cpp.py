"""llama.cpp itself reads what `--to gguf` writes: the node's probabilities, its tokenizer's tokens, the same story.

A failed assertion of llama.cpp ends its process, which is therefore never that of the tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
import torch
from manifests import provenance
from nodes import make, save_root
from tiny import tiny_model
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from coppice.data.tokenizer import load_tokenizer
from coppice.export import gguf, gguf_tokenizer
from coppice.export.check import Difference, compute_difference
from coppice.export.stage import export
from coppice.files import write_json
from coppice.models.checkpoint import load_model, save_checkpoint, stored_dtype
from coppice.models.contracts import Removal
from coppice.models.densify import densify
from coppice.models.surgery import remove
from tests.unit.export.test_gguf_tokenizer import PRE_TOKENIZERS, begins, byte_level, with_all_pairs

if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("needs the package xllamacpp, which is llama.cpp in a wheel", allow_module_level=True)

# Answers each line [file, whether for embeddings, endpoint, body] with one, from a llama-server for each file. Keys and
# values stay in float32, and nothing is fused, so that what is left are sums in another order.
PROGRAM = """
import json, sys
from functools import cache
from urllib.request import ProxyHandler, Request, build_opener
import xllamacpp

opener = build_opener(ProxyHandler({}))

@cache
def server(file, embeddings):
    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 256, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup = settings.fit_params = False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if embeddings:
        settings.embedding, settings.embd_normalize = True, -1
        settings.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    return xllamacpp.Server(settings)

for line in sys.stdin:
    file, embeddings, endpoint, body = json.loads(line)
    address = server(file, embeddings).listening_address + endpoint
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with opener.open(request, timeout=60) as answer:
        print(json.dumps(json.load(answer)), flush=True)
"""
SIZE = 640  # rows of the embeddings; the last ones are of no token
LENGTHS = (1, 9, 40, 64)
# A rotary base that is not the usual one has to reach llama.cpp too.
SHAPE = {
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": SIZE,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
# Nodes that llama.cpp computes in float32, and those for which it rounds the inputs of linears.
EXACT = ("tied", "factors", "pruned", "without prefix")
ROUNDED = ("bfloat16", "Q8_0", "Q4_0")
TEXTS = (
    *gguf_tokenizer.SAMPLES,
    "",
    " ",
    "\n",
    "a<s>b <s>  c</s></s> <think> d",
    "<unk> [PAD639] <0x0A> <|x|",
    "it's IT'S I'Ll we'Ve ’s 's'",
    "1 22 333 4444 55555 1,000.00 ½½½ ٣٤٥٦ x1y2",
    "\t \t\r\n \n\n \r x \x0b\x0c\x85 \u2028 \u1680 \u200b\u180e",
    "\x00\x01\x1f\x7f \ue000\u0378\U0010ffff",
    "ǅʰªº 𝐀𝟘ⅷ〇 ः̂⃝ e\u0301 \u0301",
    "the cat and the other cats gather there, ananas ananas",
)


class LlamaCpp:
    """A process that runs llama.cpp, started again where it has ended."""

    def __init__(self, folder: Path) -> None:
        self.log, self.process = folder / "llama.cpp.log", None

    def ask(self, folder: Path, endpoint: str, body: dict[str, Any], embeddings: bool = False) -> Any:
        """What llama-server answers for the export in a folder. Raises RuntimeError with its log where it ended."""
        if self.process is None or self.process.poll() is not None:
            with open(self.log, "w") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", PROGRAM],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | {"GGML_NO_BACKTRACE": "1"},
                )
        self.process.stdin.write(json.dumps([str(folder / gguf.FILE), embeddings, endpoint, body]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.end()
            raise RuntimeError(f"llama.cpp ended:\n{self.log.read_text(errors='replace')[-2000:]}")
        return json.loads(answer)

    def tokens(self, folder: Path, text: str, special: bool = True) -> list[int]:
        """The tokens of a text; special: with those for its beginning and end."""
        return self.ask(folder, "/tokenize", {"content": text, "add_special": special})["tokens"]

    def log_probabilities(self, folder: Path, prompt: list[int]) -> Tensor:
        """[SIZE] of the token after the prompt."""
        # Nothing is answered where the next token is half a character; the bias is no part of the probabilities.
        letter = load_tokenizer(folder).token_to_id("a")
        body = {"prompt": prompt, "n_predict": 1, "n_probs": SIZE, "logit_bias": [[letter, 1000]]}
        (found,) = self.ask(folder, "/completion", body | {"cache_prompt": False})["completion_probabilities"]
        row = torch.full((SIZE,), torch.nan, dtype=torch.double)
        for entry in found["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        return row

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    started = LlamaCpp(tmp_path_factory.mktemp("llama.cpp"))
    yield started
    started.end()


def save(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer | Path, dtype: torch.dtype = torch.float32) -> Path:
    """A root of a model with a tokenizer, or with that of a folder."""
    own = tokenizer
    if not isinstance(tokenizer, Path):
        own = folder.with_name(f"{folder.name}-tokenizer")
        own.mkdir()
        tokenizer.save(str(own / "tokenizer.json"))
        write_json(own / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    save_checkpoint(model, folder, own, provenance(node=folder.name), dtype)
    return folder


def of_family(name: str, template: str = "<s> $A") -> Tokenizer:
    """A byte-level tokenizer with the pre-tokenizer of that name, which has tokens for the beginning and end."""
    tokenizer = byte_level(PRE_TOKENIZERS[name](), ignore_merges=name == "llama-bpe")
    begins(tokenizer, template)
    return tokenizer


def nodes(base: Path) -> dict[str, Path]:
    """A node for each of `EXACT` and `ROUNDED`, and of every architecture and tokenizer."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    mistral = tiny_model("mistral", sliding_window=None, **heads, **SHAPE)
    mistral = save(base / "mistral", mistral, of_family("llama-bpe"))
    composing = of_family("qwen2", "<s> $A </s>")
    composing.normalizer = normalizers.NFC()
    qwen2 = tiny_model("qwen2", tie_word_embeddings=True, **SHAPE)
    qwen2 = save(base / "qwen2", qwen2, composing, torch.bfloat16)
    qwen3 = save(base / "qwen3", tiny_model("qwen3", head_dim=16, **SHAPE), of_family("smaug-bpe"), torch.bfloat16)
    pruned = Removal(kv_groups=((0, 2), (1, 3)), neurons=(tuple(range(16)), tuple(range(5, 21))))
    without_prefix = with_all_pairs()
    without_prefix.normalizer = normalizers.Replace(" ", "▁")
    blocks = {"group_size": 32, "symmetric": True}
    return {
        "tied": save(base / "tied", tiny_model("llama-gqa", tie_word_embeddings=True, **SHAPE), of_family("gpt-2")),
        "factors": make(base / "factors", mistral, "svd", keep=0.6),
        # A name for which llama.cpp has rules of its own.
        "pruned": save(base / "phi-3", remove(tiny_model("llama-gqa", **SHAPE), pruned), with_all_pairs()),
        "without prefix": save(base / "without-prefix", tiny_model("llama", **SHAPE), without_prefix),
        "bfloat16": save(base / "bfloat16", tiny_model("llama", **SHAPE), of_family("smollm"), torch.bfloat16),
        "Q8_0": make(base / "quantized-8", qwen2, "rtn", bits=8, **blocks),
        "Q4_0": make(base / "quantized-4", qwen3, "rtn", bits=4, **blocks),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Every node with its export."""
    found = {}
    for name, node in nodes(tmp_path_factory.mktemp("nodes")).items():
        found[name] = (node, node.with_name(f"{node.name}-gguf"))
        export(node, "gguf", found[name][1])
    return found


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 400, (length,), generator=generator).tolist() for length in LENGTHS]


def compared(llama_cpp: LlamaCpp, model: PreTrainedModel, exported: Path) -> Difference:
    """A model's log-probabilities after each of `prompts`, against llama.cpp's of the export."""
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in prompts()]
    theirs = [llama_cpp.log_probabilities(exported, prompt) for prompt in prompts()]
    return compute_difference(torch.log_softmax(torch.stack(logits).double(), dim=-1), torch.stack(theirs))


def as_ggml_multiplies(node: Path) -> PreTrainedModel:
    """The node's dense model, its linears' inputs rounded as ggml does: to 8 bits for blocks, else as stored."""
    model, dtype = load_model(node, dtype=torch.float32), stored_dtype(node)
    packed = gguf.packed_linears(model)
    densify(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            used = rounded_to_blocks if name in packed else lambda x: x.to(dtype).float()
            module.register_forward_pre_hook(lambda module, inputs, used=used: (used(inputs[0]),))
    return model


def rounded_to_blocks(x: Tensor) -> Tensor:
    """Of every 32 numbers levels -127 .. 127 of one scale in float16, as Q8_0."""
    blocks = x.unflatten(-1, (-1, gguf.BLOCK))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    return (torch.round(blocks / scale.clamp(min=1e-30)) * scale.half().float()).flatten(-2)


@pytest.mark.parametrize("name", EXACT)
def test_what_is_stored_in_float32_gives_the_nodes_probabilities(
    llama_cpp: LlamaCpp, folders: dict[str, tuple[Path, Path]], name: str
) -> None:
    node, exported = folders[name]
    assert compared(llama_cpp, load_model(node, dtype=torch.float32), exported).largest < 1e-4


@pytest.mark.parametrize("name", ROUNDED)
def test_smaller_types_differ_by_the_rounded_inputs_alone(
    llama_cpp: LlamaCpp, folders: dict[str, tuple[Path, Path]], name: str
) -> None:
    node, exported = folders[name]
    found = compared(llama_cpp, load_model(node, dtype=torch.float32), exported)
    assert 0.01 < found.largest < 0.25
    assert found.divergence < 1e-3
    # An input that lies between two levels may be rounded to the other one by another processor.
    assert compared(llama_cpp, as_ggml_multiplies(node), exported).largest < 0.01


@pytest.mark.parametrize("name", EXACT + ROUNDED)
def test_a_text_has_the_tokens_of_the_nodes_tokenizer_and_they_are_the_text(
    llama_cpp: LlamaCpp, folders: dict[str, tuple[Path, Path]], name: str
) -> None:
    node, exported = folders[name]
    tokenizer = load_tokenizer(node)
    ends = [tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")]
    assert llama_cpp.tokens(exported, "") == (ends if name == "Q8_0" else ends[:1])
    for text in TEXTS:
        if isinstance(tokenizer.normalizer, normalizers.NFC):
            text = normalize("NFC", text)
        assert llama_cpp.tokens(exported, text) == tokenizer.encode(text).ids, text
        bare = llama_cpp.tokens(exported, text, special=False)
        assert bare == tokenizer.encode(text, add_special_tokens=False).ids
        if text and "<" not in text:
            back = llama_cpp.ask(exported, "/detokenize", {"tokens": bare})["content"]
            assert back == (" " if name == "pruned" else "") + text


def test_text_that_is_not_composed_has_other_tokens_as_the_export_says(
    llama_cpp: LlamaCpp, folders: dict[str, tuple[Path, Path]]
) -> None:
    node, exported = folders["Q8_0"]
    assert "not bring text to the form NFC" in gguf_tokenizer.read(node, SIZE)[1][0]
    assert llama_cpp.tokens(exported, "nai\u0308ve") != load_tokenizer(node).encode("nai\u0308ve").ids


def test_a_trained_model_tells_the_same_story(llama_cpp: LlamaCpp, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "stories260K" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    node = save(tmp_path / "stories", model, folder)
    export(node, "gguf", tmp_path / "out")
    tokenizer, prompt = load_tokenizer(node), "Once upon a time, there was a little girl named Lily."
    for text in (*TEXTS, prompt):
        assert llama_cpp.tokens(tmp_path / "out", text) == tokenizer.encode(text).ids, text
    start = tokenizer.encode(prompt).ids
    told = model.generate(torch.tensor([start]), do_sample=False, max_new_tokens=32)[0, len(start) :].tolist()
    body = {"prompt": prompt, "n_predict": 32, "temperature": 0, "return_tokens": True}
    found = llama_cpp.ask(tmp_path / "out", "/completion", body)
    assert (found["tokens"], len(told)) == (told, 32)
    assert prompt + found["content"] == tokenizer.decode(start + told)


def test_a_file_without_a_tokenizer_gives_states_and_ends_a_server_that_is_to_complete(
    llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    node = save_root(tmp_path / "root", num_hidden_layers=2)
    export(node, "gguf", tmp_path / "out")
    prompt = list(range(3, 40))
    (found,) = llama_cpp.ask(tmp_path / "out", "/embeddings", {"input": prompt}, embeddings=True)
    model = load_model(node, dtype=torch.float32)
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
    assert torch.allclose(torch.tensor(found["embedding"]), states, atol=1e-4)
    with pytest.raises(RuntimeError, match="LLAMA_VOCAB_TYPE_NONE"):
        llama_cpp.ask(tmp_path / "out", "/completion", {"prompt": prompt, "n_predict": 1})


def with_word(word: str) -> Tokenizer:
    """A byte-level tokenizer that merges a word from its letters."""
    definition = json.loads(byte_level(PRE_TOKENIZERS["gpt-2"]()).to_str())
    vocabulary, pairs = definition["model"]["vocab"], definition["model"]["merges"]
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] != "<think>"]
    for end in range(2, len(word) + 1):
        if word[:end] not in vocabulary:
            vocabulary[word[:end]] = len(vocabulary)
            pairs.append([word[: end - 1], word[end - 1]])
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    begins(tokenizer)
    return tokenizer


def test_tokens_that_llama_cpp_knows_by_their_text_are_not_written(
    llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = of_family("gpt-2")
    several.add_special_tokens(["<|tool_response>"])
    for name, tokenizer, text, sentence in (
        ("pad", with_word("[PAD]"), "a[PAD]b", r"takes its token '\[PAD\]'"),
        ("tool", several, "a</s>b", "does not find '</s>'"),
    ):
        node = save(tmp_path / name, tiny_model("llama", **SHAPE | {"num_hidden_layers": 1}), tokenizer)
        vocabulary, notes = gguf_tokenizer.read(node, SIZE)
        assert vocabulary is None
        assert re.search(sentence, notes[0])
        with monkeypatch.context() as patch:
            patch.setattr(gguf_tokenizer, "reason_against_controls", lambda tokens, types: None)
            export(node, "gguf", tmp_path / f"{name}-gguf")
        assert llama_cpp.tokens(tmp_path / f"{name}-gguf", text) != tokenizer.encode(text).ids
