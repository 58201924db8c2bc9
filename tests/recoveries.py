"""What tests of training share: steps by hand, curves without their clock, and runs that are interrupted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from tiny import tiny_tokens
from torch import nn

from coppice.methods.training import trained_parameters
from coppice.models.architectures.base import blocks
from coppice.recovery.journal import Journal
from coppice.recovery.state import StateFile


def train_by_hand(model: nn.Module, steps: int = 5, weight_decay: float = 0.5) -> None:
    """Steps of AdamW on what requires a gradient."""
    tokens = tiny_tokens(4, 12)
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), 1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def half_masked(model: nn.Module) -> nn.Module:
    """The model with every second weight of two linears of its first block pruned."""
    for linear in (blocks(model)[0].self_attn.q_proj, blocks(model)[0].mlp.down_proj):
        with torch.no_grad():
            linear.weight[:, ::2] = 0
        linear.masked = True
    return model


def curve(folder: Path) -> list[dict[str, Any]]:
    return parquet.read_table(folder / "curve.parquet").to_pylist()


def losses(folder: Path) -> list[tuple]:
    """The curve without its clock."""
    return [tuple(value for key, value in row.items() if key != "seconds") for row in curve(folder)]


@contextmanager
def interruption(after: int) -> Iterator[None]:
    """Whatever trains inside is interrupted in the step that follows that many."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        observe = Journal.observe

        def interrupt(journal: Journal, loss: float, targets: int) -> None:
            if journal.progress.step == after:
                raise KeyboardInterrupt
            observe(journal, loss, targets)

        patch.setattr(Journal, "observe", interrupt)
        yield


def kill_after_a_state(recover: Callable[[], Any], state: Path) -> None:
    """Runs a recovery in a forked process, slowly, and kills it (SIGKILL) after it has saved a state."""
    child = os.fork()
    if child == 0:
        save = StateFile.save

        def save_slowly(*arguments: Any) -> None:
            save(*arguments)
            time.sleep(0.2)

        StateFile.save = save_slowly
        recover()
        os._exit(0)
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
