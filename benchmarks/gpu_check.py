"""Whether the stages compute on a GPU what they compute on the CPU, and how near they come to the GPU's peak.

    python benchmarks/gpu_check.py                        # on a machine with CUDA
    python benchmarks/gpu_check.py --device cpu --small   # the same stages on tiny models, anywhere

Needs torch, transformers, pydantic, accelerate and pyarrow; with peft it checks the step `lora` too. Coppice need not
be installed, and nothing is downloaded: models, tokenizer and text are random, in a temporary folder.

Agreement: a tiny Llama, stored in bfloat16, goes through root, tokenize, calibrate, every method and evaluate twice, on
the CPU in float32 and on the device (in bfloat16 where that is CUDA). `alike`: the share of weights whose mask or code
is the same. `logits`: |a - b| / |a| of the two nodes' logits on held-out text, both computed on the CPU in float32.
Loss: in nats per token, each measured by `evaluate` on its own device. Exits with 1 where a difference exceeds its
tolerance.

Speed: a Llama of 1.1 billion parameters. `stage` is the seconds of the whole command, files included; `work` those of
the mathematics alone. FLOPs are counted: forward 2 N T (N weights of the blocks' linears, T tokens), moments 2 n^2 T
for each distinct input of width n, a sweep of [m, n] 1/3 n^3 in float64 (Cholesky factor) and m n^2 in
float32, training 6 N T with the output layer in N; attention, norms and sorting are left out. `of peak` is the time
that these FLOPs take at the rates of a large matrix product, measured in the same run, over `work`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow"))

REQUIRED = ("torch", "transformers", "pydantic", "accelerate", "pyarrow")
BILLION = 10**9

# Computing in bfloat16 on the CPU moves 1 % of the codes, the logits by 7 % and the losses by 0.1 %, at most.
LEAST_ALIKE = 0.97
LOGITS_TOLERANCE = 0.15
LOSS_TOLERANCE = 0.01

STEPS: dict[str, dict[str, Any]] = {
    "magnitude": {"sparsity": 0.5},
    "wanda": {"sparsity": 0.5},
    "sparsegpt": {"sparsity": 0.5},
    "svd": {"keep": 0.8},
    "svd-llm": {"keep": 0.8},
    "rtn": {"bits": 4, "group_size": 32},
    "gptq": {"bits": 4, "group_size": 32},
    "shortgpt": {"blocks": 1},
    "llm-pruner": {"ratio": 0.5},
}


@dataclass(frozen=True)
class Size:
    """A Llama, and how much text goes through it. windows, length: of calibration; batch, steps: of recovery."""

    hidden: int
    neurons: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    windows: int
    length: int
    batch: int
    steps: int
    product: int

    @property
    def tokens(self) -> int:
        return self.windows * self.length

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(m, n) of a block's linears."""
        keys = self.hidden // self.heads * self.kv_heads
        attention = [(self.hidden, self.hidden)] * 2 + [(keys, self.hidden)] * 2
        return [*attention, *[(self.neurons, self.hidden)] * 2, (self.hidden, self.neurons)]

    @property
    def weights(self) -> int:
        """N: the weights of all blocks' linears."""
        return self.blocks * sum(m * n for m, n in self.linears)


TINY = Size(64, 128, 2, 4, 2, 128, windows=16, length=32, batch=4, steps=8, product=512)
LARGE = Size(2048, 5632, 22, 32, 4, 32000, windows=64, length=2048, batch=8, steps=10, product=8192)


def require_packages() -> None:
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} cannot be imported here; run `pip install {' '.join(missing)}`.")


def stage(name: str, *words: object) -> None:
    """Runs `coppice NAME ...` in this process."""
    from coppice import cli

    with contextlib.redirect_stdout(sys.stderr):
        failed = cli.main([name, *map(str, words)])
    if failed:
        raise SystemExit(f"`coppice {name}` failed; its error stands above.")


def placed(device: str) -> list[str]:
    """Where a stage runs; on the CPU in one thread, so that a machine that is busy does not slow it further."""
    return ["--device", device, *(["--threads", "1"] if device == "cpu" else [])]


def write_source(folder: Path, size: Size, device: str) -> None:
    """A random dense model in bfloat16, with a tokenizer of one token a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.neurons,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.length,
        initializer_range=size.hidden**-0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size.vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))


def write_text(path: Path, size: Size) -> dict[str, Any]:
    """Documents of random words, some more frequent than others, as a study would name them."""
    generator = random.Random(0)
    words = [f"w{i}" for i in range(3, size.vocabulary)]
    frequencies = [1 / (rank + 3) for rank in range(len(words))]
    documents = (" ".join(generator.choices(words, frequencies, k=256)) for _ in range(1 + 4 * size.tokens // 256))
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return {"path": str(path), "splits": {"calibration": 0.4, "recovery": 0.4, "validation": 0.1, "evaluation": 0.1}}


def prepare(folder: Path, size: Size, device: str) -> None:
    """source, root and tokens/<role>: what both parts start from."""
    write_source(folder / "source", size, device)
    source = json.dumps({"path": str(folder / "source")})
    stage("root", "--node", "root", "--source", source, "--output", folder / "root")
    text = json.dumps(write_text(folder / "text.txt", size))
    windows = {"calibration": size.windows, "recovery": 0, "validation": 4, "evaluation": 8}
    for role, count in windows.items():
        words = ["--tokenizer", folder / "root", "--text", text, "--role", role, "--windows", count]
        stage("tokenize", *words, "--length", size.length, "--output", folder / "tokens" / role)


def calibrate(folder: Path, node: Path, kind: str, output: Path, device: str) -> None:
    tokens = folder / "tokens" / "calibration"
    stage("calibrate", "--model", node, "--tokens", tokens, "--kind", kind, "--output", output, *placed(device))


def compress(parent: Path, method: str, options: dict, output: Path, device: str, *words: object) -> None:
    step = json.dumps({"name": method, "method": method, "options": options})
    node = ["--node", f"{parent.name}/{method}", "--parent", parent, "--step", step, "--output", output]
    stage("compress", *node, *words, *placed(device))


def recover(folder: Path, parent: Path, method: str, size: Size, output: Path, device: str) -> None:
    training = {"text": "words", "validation": "words", "validation_windows": 4, "length": size.length}
    training |= {"tokens": size.batch * size.length * size.steps, "batch_size": size.batch, "learning_rate": 1e-3}
    step = json.dumps({"name": method, "method": method, "options": training})
    node = ["--node", f"{parent.name}/{method}", "--parent", parent, "--dense", folder / "root", "--step", step]
    texts = ["--tokens", folder / "tokens" / "recovery", "--validation", folder / "tokens" / "validation"]
    state = output.with_name(f"{output.name}-state")
    stage("recover", *node, *texts, "--state", state, "--output", output, *placed(device))


# Agreement


def branch(folder: Path, output: Path, size: Size, device: str) -> list[str]:
    """Every method on one device: the names of the nodes, in `output`, with what `evaluate` found beside them."""
    root, statistics = folder / "root", output / "statistics"
    given = []
    for kind in ("moments", "blocks", "gradients"):
        calibrate(folder, root, kind, statistics / kind, device)
        given += ["--statistics", statistics / kind]
    for method, options in STEPS.items():
        compress(root, method, options, output / method, device, *given)
    calibrate(folder, output / "gptq", "moments", statistics / "gptq", device)
    compensation = ["--statistics", statistics / "gptq", "--reference", root]
    compress(output / "gptq", "eora", {"rank": 4}, output / "eora", device, *compensation)
    recover(folder, output / "wanda", "full", size, output / "full", device)
    nodes = [*STEPS, "eora", "full"]
    if importlib.util.find_spec("peft") is not None:
        recover(folder, output / "gptq", "lora", size, output / "lora", device)
        nodes.append("lora")
    quality = json.dumps({"kind": "quality", "perplexity": {"words": {}}})
    tokens = f"words={folder / 'tokens' / 'evaluation'}"
    for node in nodes:
        measured = ["--node", node, "--model", output / node, "--name", "quality", "--evaluation", quality]
        stage("evaluate", *measured, "--tokens", tokens, "--output", output / node / "quality", *placed(device))
    cost = {"kind": "cost", "batch": 1, "prompt": 8, "generate": 4, "repeats": 2, "warmup": 1}
    measured = ["--node", "root", "--model", root, "--name", "cost", "--evaluation", json.dumps(cost)]
    stage("evaluate", *measured, "--output", output / "cost", *placed(device))
    return nodes


def loss(node: Path) -> float:
    metrics = json.loads((node / "quality" / "metrics.json").read_text())["metrics"]
    return next(entry["value"] for entry in metrics if entry["metric"] == "loss_words")


def choices(module: Any) -> Any:
    """What a method chose for each weight of a linear: its code, or whether it is kept."""
    from coppice.models import modules

    if isinstance(module, modules.QuantizedLinear):
        return modules.unpack(module.weight_packed, module.bits, module.in_features)
    return module.weight != 0


def compare(first: Path, second: Path, tokens: Any) -> tuple[float, float]:
    """Of two nodes: the share of weights with the same choice, and the relative difference of their logits."""
    import torch

    from coppice.models import checkpoint, modules

    models = [checkpoint.load_model(node, "cpu", torch.float32) for node in (first, second)]
    leaves = [[choices(leaf) for leaf in modules.weight_matrices(model.model.layers).values()] for model in models]
    same = sum(int((a == b).sum()) for a, b in zip(*leaves, strict=True)) / sum(a.numel() for a in leaves[0])
    with torch.no_grad():
        a, b = (model(input_ids=tokens, use_cache=False).logits for model in models)
    return same, ((a - b).norm() / a.norm()).item()


def agreement(folder: Path, device: str) -> bool:
    """Prints the table of agreement; whether all is within tolerance."""
    import torch

    from coppice.data.windows import load_windows

    prepare(folder, TINY, "cpu")
    branch(folder, folder / "first", TINY, "cpu")
    nodes = branch(folder, folder / "second", TINY, device)
    tokens = torch.as_tensor(load_windows(folder / "tokens" / "evaluation").tokens).long()
    print(f"\n| node | alike | logits | loss cpu | loss {device} | |\n|---|---|---|---|---|---|")
    fine = True
    for node in nodes:
        first, second = folder / "first" / node, folder / "second" / node
        same, difference = compare(first, second, tokens)
        expected, found = loss(first), loss(second)
        near = abs(found - expected) <= LOSS_TOLERANCE * expected
        agrees = near and same >= LEAST_ALIKE and difference <= LOGITS_TOLERANCE
        fine &= agrees
        verdict = "agrees" if agrees else "DIFFERS"
        print(f"| {node} | {same:.4f} | {difference:.1e} | {expected:.4f} | {found:.4f} | {verdict} |", flush=True)
    return fine


# Speed


def synchronize(device: str) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: str, function: Any, *arguments: Any) -> float:
    """What a call takes, to its end on the device."""
    synchronize(device)
    started = time.perf_counter()
    function(*arguments)
    synchronize(device)
    return time.perf_counter() - started


def rates(size: Size, device: str) -> dict[str, float]:
    """FLOP/s of a product of two square matrices, by dtype: the best of five."""
    import torch

    found = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a, b = (torch.randn(size.product, size.product, device=device).to(dtype) for _ in range(2))
        best = min(seconds(device, torch.matmul, a, b) for _ in range(6))
        found[str(dtype).removeprefix("torch.")] = 2 * size.product**3 / best
    return found


@contextlib.contextmanager
def clocked(holder: Any, name: str, device: str) -> Iterator[list[float]]:
    """The seconds of each call of holder.name within the block."""
    function, spent = getattr(holder, name), []

    def timed(*arguments: Any, **keywords: Any) -> Any:
        synchronize(device)
        started = time.perf_counter()
        result = function(*arguments, **keywords)
        synchronize(device)
        spent.append(time.perf_counter() - started)
        return result

    # Not by setattr: the declaration of a method is frozen.
    vars(holder)[name] = timed
    try:
        yield spent
    finally:
        vars(holder)[name] = function


def reset_memory(device: str) -> None:
    import torch

    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> int:
    """Bytes: allocated on CUDA since `reset_memory`; on the CPU resident since the start."""
    import torch

    from coppice.models import accounting

    cuda = torch.device(device).type == "cuda"
    return torch.cuda.max_memory_allocated(device) if cuda else accounting.peak_memory()


def forward(folder: Path, device: str) -> float:
    """Seconds of the calibration windows through the blocks, without files; the second of two passes."""
    import torch

    from coppice.calibration.walk import TOKENS_IN_A_BATCH
    from coppice.data.windows import load_windows
    from coppice.models import checkpoint

    model = checkpoint.load_model(folder / "root", device)
    tokens = torch.as_tensor(load_windows(folder / "tokens" / "calibration").tokens).long().to(device)
    batches = tokens.split(max(1, TOKENS_IN_A_BATCH // tokens.shape[1]))

    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                model.model(input_ids=batch, use_cache=False)

    run()
    return seconds(device, run)


def speed(folder: Path, size: Size, device: str) -> None:
    """Prints the table of speed, each row when it is measured."""
    import torch

    from coppice.calibration import moments as calibration
    from coppice.methods.registry import method

    prepare(folder, size, device)
    peak = rates(size, device)
    computing = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    print("\nLargest rates: " + ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in peak.items()) + ".")
    print(f"{size.weights / BILLION:.3g} billion weights in the blocks, {size.tokens:,} calibration tokens.\n")
    print("| | stage s | work s | peak memory GB | TFLOP | of peak |\n|---|---|---|---|---|---|")

    def row(name: str, stage_seconds: float | None, work: float, flops: dict[str, float]) -> None:
        share = f"{sum(count / peak[dtype] for dtype, count in flops.items()) / work:.0%}" if flops else ""
        total = f"{sum(flops.values()) / 1e12:.3g}" if flops else ""
        whole = "" if stage_seconds is None else f"{stage_seconds:.2f}"
        memory = peak_memory(device) / BILLION
        print(f"| {name} | {whole} | {work:.3g} | {memory:.2f} | {total} | {share} |", flush=True)
        reset_memory(device)

    reset_memory(device)
    passing = {computing: 2.0 * size.weights * size.tokens}
    row("forward", None, forward(folder, device), passing)

    root, statistics = folder / "root", folder / "moments"
    widths = (size.hidden, size.hidden, size.hidden, size.neurons)  # inputs of q k v, o, gate up, down
    moments = 2.0 * size.blocks * size.tokens * sum(width**2 for width in widths)
    with clocked(calibration, "gather_block", device) as spent:
        whole = seconds(device, calibrate, folder, root, "moments", statistics, device)
    counted = dict(passing)
    counted["float32"] = counted.get("float32", 0) + moments
    row("calibrate moments", whole, sum(spent), counted)

    factors = size.blocks * sum(n**3 / 3 for _, n in size.linears)
    corrections = size.blocks * sum(float(m) * n**2 for m, n in size.linears)
    sweep = {"float64": factors, "float32": corrections}

    def solver(name: str, flops: dict[str, float]) -> None:
        output = folder / name
        with clocked(method(name).layer, "compress", device) as spent:
            given = ("--statistics", statistics)
            whole = seconds(device, compress, root, name, STEPS[name], output, device, *given)
        row(f"compress {name}", whole, sum(spent), flops)
        for path in output.glob("*.safetensors"):
            path.unlink()

    for name in ("magnitude", "wanda", "rtn"):
        solver(name, {})
    for name in ("sparsegpt", "gptq"):
        solver(name, sweep)

    output = folder / "full"
    whole = seconds(device, recover, folder, root, "full", size, output, device)
    recovery = json.loads((output / "manifest.json").read_text())["recovery"]
    multiplied = size.weights + size.vocabulary * size.hidden
    training = {computing: 6.0 * multiplied * recovery["tokens"] / recovery["steps"]}
    row("recover full, one step", whole, recovery["seconds"] / recovery["steps"], training)

    for name in ("svd", "svd-llm"):
        solver(name, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--small", action="store_true", help="measure speed on the tiny model too")
    arguments = parser.parse_args()
    require_packages()
    import torch

    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device here; use `--device cpu --small` to try the script without one.")
    name = torch.cuda.get_device_name(arguments.device) if arguments.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}.")
    with tempfile.TemporaryDirectory() as folder:
        fine = agreement(Path(folder) / "agreement", arguments.device)
        speed(Path(folder) / "speed", TINY if arguments.small else LARGE, arguments.device)
    if not fine:
        raise SystemExit("The device and the CPU differ by more than the tolerance; see the rows that say so.")


if __name__ == "__main__":
    main()
