"""One pass over a node's model with a calibration set -> statistics, shared by every step that starts there.

Kinds: `moments` of each distinct linear input, `blocks` (how alike a block's input and output are), `gradients` (Taylor
scores by unit, see `gradients`). The model is walked block by block: hidden states of all windows wait on the CPU, and
one block with its moments is on the device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from coppice import storage
from coppice.data.text import check_tokenizer, load_windows
from coppice.errors import UserError
from coppice.files import atomic_directory, fingerprint, sha256
from coppice.methods.contracts import KINDS, LinearStatistics
from coppice.models import layers
from coppice.models.checkpoint import computing_dtype, load_model, read_manifest, read_tensors, versions
from coppice.records.statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_IN_A_BATCH = 8192
MOMENT_FIELDS = ("second_moment", "mean", "absmean", "absmax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help="folder of the node's checkpoint")
    parser.add_argument("--tokens", required=True, type=Path, help="folder of the calibration windows")
    parser.add_argument("--kind", required=True, choices=KINDS, help="what to gather")
    parser.add_argument("--output", required=True, type=Path, help="folder of the statistics")


def run(arguments: argparse.Namespace) -> None:
    calibrate(arguments.model, arguments.tokens, arguments.kind, arguments.output, arguments.device)


def calibrate(model_directory: Path, tokens_directory: Path, kind: str, output: Path, device: str) -> None:
    """Gathers one kind of statistics and writes it, whole or not at all, with the fingerprints of what it came from."""
    started = time.monotonic()
    windows = load_windows(tokens_directory)
    check_tokenizer(model_directory, windows)
    model = load_model(model_directory, dtype=computing_dtype(model_directory, device))
    tokens, kept = as_tensors(windows)
    identity = {
        "kind": kind,
        "model_fingerprint": read_manifest(model_directory).fingerprint,
        "tokens_fingerprint": windows.manifest.fingerprint,
    }
    with atomic_directory(output) as temporary:
        aliases = GATHER[kind](model, tokens, kept, device, temporary)
        files = {path.name: sha256(path) for path in sorted(temporary.glob("*.safetensors"))}
        statistics = Statistics(
            **identity,
            fingerprint=fingerprint(identity),
            tokens=int(kept.sum()),
            blocks=len(layers.blocks(model)),
            aliases=aliases,
            files=files,
            versions=versions(),
            wall_seconds=time.monotonic() - started,
        )
        storage.upload(temporary, files)
        statistics.write(temporary / "manifest.json")


def as_tensors(windows: Any) -> tuple[Tensor, Tensor]:
    """tokens [w, t] int64 and kept [w, t] bool, True where a position is a token and not padding."""
    return torch.as_tensor(windows.tokens).long(), torch.as_tensor(windows.documents) >= 0


@dataclass
class Batch:
    """Hidden states [b, t, hidden] on their way through the blocks, and what each block's forward takes beside them."""

    hidden: Tensor
    kept: Tensor
    arguments: list[dict[str, Any]]


@torch.no_grad()
def embed(model: PreTrainedModel, tokens: Tensor, kept: Tensor) -> list[Batch]:
    """The inputs of the first block, in batches, with every block's own masks and positions.

    The model's own forward computes them: it runs once with each block replaced by the identity, and what it hands to
    the blocks is noted. So sliding windows and padding are treated as the architecture treats them.
    """
    rows = max(1, TOKENS_IN_A_BATCH // tokens.shape[1])
    batches = []
    for first in range(0, len(tokens), rows):
        part, part_kept = tokens[first : first + rows], kept[first : first + rows]
        noted: list[dict[str, Any]] = []
        with _identity_blocks(model, noted):
            attention_mask = None if part_kept.all() else part_kept.long()
            embedded = model.model.embed_tokens(part)
            model.model(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=False)
        batches.append(Batch(embedded, part_kept, noted))
    return batches


@contextmanager
def _identity_blocks(model: PreTrainedModel, noted: list[dict[str, Any]]) -> Iterator[None]:
    def note(module: nn.Module, positional: tuple, keywords: dict[str, Any]) -> None:
        noted.append(keywords)

    def identity(hidden_states: Tensor, **keywords: Any) -> Tensor:
        return hidden_states

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in layers.blocks(model)]
    for block in layers.blocks(model):
        block.forward = identity
    try:
        yield
    finally:
        for block, hook in zip(layers.blocks(model), hooks, strict=True):
            hook.remove()
            del block.forward


@torch.no_grad()
def run_block(block: nn.Module, index: int, batch: Batch, device: str) -> Tensor:
    """One block's output [b, t, hidden] on the CPU. Raises UserError when it is not finite."""
    output = block(batch.hidden.to(device), **_to(batch.arguments[index], device))
    output = (output[0] if isinstance(output, tuple) else output).cpu()
    require_finite(output[batch.kept], f"model.layers.{index}", "output")
    return output


def _to(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(_to(entry, device) for entry in value)
    return value


def require_finite(values: Tensor, module: str, what: str) -> None:
    """Raises UserError, naming the module, when an activation is NaN or infinite."""
    if not torch.isfinite(values).all():
        raise UserError(
            f"The {what} of {module} holds NaN or infinite values on the calibration text; check the node's weights."
        )


class Moments:
    """Sums over tokens of one linear's inputs x [tokens, n], in float64 whatever the activations' dtype."""

    def __init__(self) -> None:
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.float()
        parts = ((x.T @ x).double(), x.sum(0).double(), x.abs().sum(0).double(), x.abs().amax(0))
        if self.tokens == 0:
            self.square, self.sum, self.absolute, self.largest = parts
        else:
            self.square += parts[0]
            self.sum += parts[1]
            self.absolute += parts[2]
            self.largest = torch.maximum(self.largest, parts[3])
        self.tokens += len(x)

    def statistics(self) -> LinearStatistics:
        return LinearStatistics(
            second_moment=(self.square / self.tokens).float(),
            mean=(self.sum / self.tokens).float(),
            absmean=(self.absolute / self.tokens).float(),
            absmax=self.largest,
            tokens=self.tokens,
        )


def gather_block(
    block: nn.Module, index: int, batches: list[Batch], device: str
) -> tuple[dict[str, LinearStatistics], dict[str, str], list[Tensor]]:
    """Moments of every distinct input of a block's linears, who shares whose, and the block's outputs by batch.

    Returns:
        statistics by the name of the first linear that sees an input; aliases: every linear's name -> that name.
    """
    targets = {**layers.replaceable_modules(block), **layers.weight_matrices(block)}
    moments: dict[str, Moments] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, tuple[str, Tensor]] = {}
    kept: Tensor | None = None

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if id(x) not in seen:
                # The tensor is held until the batch ends, so that its id stays its own.
                seen[id(x)] = (name, x)
                # A site of a tensor train sees several vectors of each token.
                used = x[kept].flatten(0, -2)
                require_finite(used, f"model.layers.{index}.{name}", "input")
                moments.setdefault(name, Moments()).add(used)
            aliases[name] = seen[id(x)][0]

        return hook

    hooks = [module.register_forward_pre_hook(observe(name)) for name, module in targets.items()]
    outputs = []
    try:
        for batch in batches:
            kept = batch.kept.to(device)
            outputs.append(run_block(block, index, batch, device))
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    # Each sum in float64 goes as its statistics come, so that not all of both are held at once.
    return {name: moments.pop(name).statistics() for name in list(moments)}, aliases, outputs


def gather_moments(
    model: PreTrainedModel, tokens: Tensor, kept: Tensor, device: str, output: Path
) -> dict[str, dict[str, str]]:
    """Writes block-NNN.safetensors with `<linear>.<field>`; returns each block's aliases."""
    batches = embed(model, tokens, kept)
    aliases = {}
    for index, block in enumerate(layers.blocks(model)):
        block.to(device)
        aliases[str(index)] = _write_block_moments(block, index, batches, device, output / block_file(index))
        block.to("cpu")
    return aliases


def _write_block_moments(block: nn.Module, index: int, batches: list[Batch], device: str, path: Path) -> dict[str, str]:
    """One block's part of `gather_moments`; the batches go on to the block's outputs."""
    statistics, aliases, outputs = gather_block(block, index, batches, device)
    tensors = {
        f"{name}.{field}": getattr(entry, field).cpu().contiguous()
        for name, entry in statistics.items()
        for field in MOMENT_FIELDS
    }
    save_file(tensors, path)
    for batch, hidden in zip(batches, outputs, strict=True):
        batch.hidden = hidden
    return aliases


def _last(kept: Tensor) -> Tensor:
    """[w, 1] where the last token of each window stands."""
    places = torch.arange(kept.shape[1])
    return torch.where(kept, places, 0).amax(dim=1, keepdim=True)


@torch.no_grad()
def gather_blocks(model: PreTrainedModel, tokens: Tensor, kept: Tensor, device: str, output: Path) -> dict:
    """Writes how alike a block's input and output are.

    `similarity` [blocks]: the mean over tokens of their cosine; `angular_distance` [blocks]: the mean over windows of
    arccos(cosine) / pi at the last token.
    """
    batches = embed(model, tokens, kept)
    similarity, distance = [], []
    for index, block in enumerate(layers.blocks(model)):
        block.to(device)
        total = angle = 0.0
        for batch in batches:
            hidden = run_block(block, index, batch, device)
            cosine = nn.functional.cosine_similarity(batch.hidden.double(), hidden.double(), dim=-1)
            total += cosine[batch.kept].sum().item()
            angle += torch.arccos(cosine.gather(1, _last(batch.kept)).clamp(-1, 1)).sum().item() / torch.pi
            batch.hidden = hidden
        similarity.append(total / int(kept.sum()))
        distance.append(angle / len(tokens))
        block.to("cpu")
    found = {"similarity": similarity, "angular_distance": distance}
    save_file(
        {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()},
        output / "blocks.safetensors",
    )
    return {}


def gather_gradients(model: PreTrainedModel, tokens: Tensor, kept: Tensor, device: str, output: Path) -> dict:
    """Writes the Taylor scores of every unit (see `gradients.unit_scores`)."""
    from coppice.calibration.gradients import unit_scores

    batch = max(1, TOKENS_IN_A_BATCH // tokens.shape[1])
    scores = unit_scores(model.to(device), tokens.to(device), kept.to(device), batch)
    save_file({name: score.cpu().contiguous() for name, score in scores.items()}, output / "gradients.safetensors")
    return {}


GATHER = {"moments": gather_moments, "blocks": gather_blocks, "gradients": gather_gradients}


def block_file(index: int) -> str:
    return f"block-{index:03d}.safetensors"


def read_statistics(directory: Path, model_fingerprint: str) -> Statistics:
    """The manifest of statistics. Raises UserError when they were gathered on another model than the one named."""
    manifest = Statistics.read(Path(directory) / "manifest.json")
    if manifest.model_fingerprint != model_fingerprint:
        raise UserError(
            f"The statistics in {directory} were gathered on another model (fingerprint "
            f"{manifest.model_fingerprint[:12]} instead of {model_fingerprint[:12]}); calibrate again."
        )
    return manifest


def read_statistics_file(directory: Path, name: str, manifest: Statistics) -> dict[str, Tensor]:
    """The tensors of one file of statistics. Raises UserError when it is not the file that the manifest describes."""
    path = Path(directory) / name
    if not storage.fetch_verified(path, manifest.files[name]):
        raise UserError(f"{path} is not the file that its manifest describes; calibrate again.")
    return read_tensors(path)


def block_statistics(directory: Path, index: int, manifest: Statistics, device: str) -> dict[str, LinearStatistics]:
    """The moments of one block on the device, by linear; linears that share an input share the tensors."""
    tensors = read_statistics_file(directory, block_file(index), manifest)
    aliases = manifest.aliases[str(index)]
    distinct = {
        name: LinearStatistics(
            **{field: tensors[f"{name}.{field}"].to(device) for field in MOMENT_FIELDS}, tokens=manifest.tokens
        )
        for name in set(aliases.values())
    }
    return {name: distinct[first] for name, first in aliases.items()}
