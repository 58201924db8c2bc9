"""One recovery on several GPUs: a process for each; the model and the windows of a step are divided among them (FSDP2).

`coppice recover` of a step with `gpus: n` claims n devices and starts itself n times (`launch`, torch's elastic agent,
as torchrun does). Processes communicate through nccl on GPUs and through gloo on CPUs. The result does not depend on n:
the order of windows, the windows of a step and the learning rate are those of one process. Micro-batches go round the
processes, and a gradient is the sum over all of them, divided by all targets of the step. Only dropout draws other
numbers, as it is a function of seed, step and process. Sums in another order differ in their last digits.

Every block of the decoder is a unit of FSDP2, and what lies around the blocks (embeddings, last norm, head) is another.
A process keeps 1/n of the parameters, gradients and optimizer state, and gathers a unit only while it computes it.
Buffers, packed integers among them, are whole on every process. A teacher is divided as its student is.

Bytes on a GPU, for P parameters of which T train, E around the blocks, on n GPUs: (4 P + 12 T) / n for float32 weights,
gradients and moments, T / n more for masks, 4 P' / n for a teacher of P' parameters, 8 E for the outer unit gathered
with its gradient, the same for a block or two, packed integers whole, and the activations of a micro-batch. In the
host's memory every process holds the whole model in float32 while it loads it, the first again at the end.

Only the first process prints and writes. A state holds whole tensors, so that a run can be resumed under another n.
When a process dies, the agent ends the others, and the command ends with the message of the one that failed first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from coppice.errors import UserError
from coppice.lazy import torch

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

PATIENCE = 10  # seconds that processes have to end when one of them has failed


def launch(words: Sequence[str], processes: int) -> None:
    """Runs `coppice` with these words in that many processes on this machine, until all have ended.

    Raises UserError with the message of the process that failed first, KeyboardInterrupt when interrupted.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            shutdown_timeout=PATIENCE,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "coppice", *words)
        except ChildFailedError as error:
            raise UserError(_failure_message(error, processes)) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise UserError(f"Stopped by {error.sigval.name}; run the same command again to resume.") from None


def _failure_message(error: ChildFailedError, processes: int) -> str:
    """What ended the processes: one that was killed, before those that lost it, before those that the agent ended."""

    def order(rank: int) -> tuple[bool, bool, int]:
        failure = error.failures[rank]
        return failure.exitcode == -signal.SIGTERM, failure.exitcode >= 0, failure.timestamp

    rank = min(error.failures, key=order)
    failure = error.failures[rank]
    which = f"Process {rank + 1} of {processes}"
    if failure.exitcode < 0:
        return (
            f"{which} was killed by {failure.signal_name()}, as happens when memory runs out; run the same command "
            "again to resume from the last state."
        )
    if os.path.isfile(failure.error_file):
        return failure.message
    return f"{which} ended with exit code {failure.exitcode} and without a message; its last output is above."


def is_launched() -> bool:
    """Whether this process is one of several that train one model."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_device(device: str) -> str:
    """That of this process among the devices of its machine; `device` is the one requested for all of them."""
    return f"{device}:{os.environ['LOCAL_RANK']}" if device == "cuda" else device


def report(sentence: str) -> None:
    """Passes a launched process's error message to the process that launched it."""
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf-8") as file:
        json.dump({"message": sentence, "timestamp": int(time.time())}, file)


def join(device: str) -> None:
    """Makes this launched process one of its group; only the first prints, and none outlives its launcher."""
    from torch.multiprocessing import _prctl_pr_set_pdeathsig as die_with_parent  # type: ignore[attr-defined]  # not in the stubs

    die_with_parent(signal.SIGKILL)
    own_device = torch.device(device)
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
        torch.distributed.init_process_group("nccl", device_id=own_device)
    else:
        torch.distributed.init_process_group("gloo")
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process


def leave() -> None:
    """Leaves this process's group, if it is in one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """Of this process: 0 for the first and for a single one."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes train the model."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier() -> None:
    """Waits until all processes have reached it."""
    if world_size() > 1:
        torch.distributed.barrier()


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over the processes, in float64."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def broadcast_decision(decision: bool, device: torch.device) -> bool:
    """The decision of the first process, in all of them: their clocks differ."""
    if world_size() == 1:
        return decision
    message = torch.tensor([decision], dtype=torch.uint8, device=device)
    torch.distributed.broadcast(message, 0)
    return bool(message.item())


def shard(model: nn.Module, device: str, precision: str) -> None:
    """Divides a model that lies on the CPU among the processes, in place; nothing changes for a single process.

    In bfloat16 the units of the blocks are gathered in that type: their products are computed in it anyway, and
    autocast would keep a copy of each for the backward pass. Gradients are added up in float32.
    """
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from coppice.models.architectures.base import blocks

    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    parameter_dtype = torch.bfloat16 if precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=parameter_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Resharded as the blocks are: between steps every parameter is a share.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    # Trainer reads from it that the model owns its placement and the reduction of its gradients.
    model._is_distributed_loading_by_transformers = True  # type: ignore[assignment]  # mypy lets a module hold tensors and modules only
