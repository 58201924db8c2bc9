"""A device that is only emulated, so that code which mixes devices fails on a machine without a GPU.

Tensors on it compute on the processor. Within `emulated_device()` an operation fails that would on CUDA: on tensors of
both devices (indices and numbers without dimension apart), or with a generator of the other device. The device is
registered for the whole process, so it is for a process of its own: `python tests/emulated.py` runs every layer
method's `compress` on it and prints a JSON object of failures by method.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = torch.device("privateuseone", 0)
# What takes tensors from one device to the other, or to a number.
_CROSSING = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Emulated(Tensor):
    """A tensor on the emulated device; inner: its values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Emulated:
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **shape)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(function, args, kwargs or {})

    def tolist(self) -> list:
        return self.inner.tolist()


class emulated_device(TorchDispatchMode):  # noqa: N801
    """Within it, tensors are made on and moved to DEVICE."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(function, args, kwargs or {})

    def __enter__(self) -> emulated_device:
        # So that torch.tensor(.., device=DEVICE) comes here as a copy from the processor.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)


def _run(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name = function._overloadpacket._qualified_op_name
    flat, _ = tree_flatten((args, kwargs))
    emulated = [each for each in flat if isinstance(each, Emulated)]
    if emulated:
        _require_one_device(name, args, flat)
    asked = kwargs.get("device")
    there = torch.device(asked).type == DEVICE.type if asked is not None else bool(emulated)
    if there and any(isinstance(each, torch.Generator) for each in flat):
        raise RuntimeError(f"{name}: a generator of the processor for a tensor that is not there")
    args, kwargs = tree_map(_inner, (args, kwargs))
    result = function(*args, **kwargs)
    # A copy to the processor stays there, unless it is into a tensor that is not.
    if not there and not (name == "aten::copy_" and emulated):
        return result
    return tree_map(lambda each: _outer(each, emulated), result)


def _require_one_device(name: str, args: tuple, flat: list) -> None:
    checked = flat
    if name in _CROSSING:
        return
    if name in _INDEXING:
        checked = [args[0], *args[2:]]
    others = [each for each in checked if isinstance(each, Tensor) and not isinstance(each, Emulated) and each.dim()]
    if others:
        raise RuntimeError(f"{name}: a tensor {tuple(others[0].shape)} of the processor with one that is not there")


def _inner(each: Any) -> Any:
    if isinstance(each, torch.device) and each.type == DEVICE.type:
        return torch.device("cpu")
    return each.inner if isinstance(each, Emulated) else each


def _outer(each: Any, emulated: list[Emulated]) -> Any:
    if not isinstance(each, Tensor):
        return each
    # What was changed in place is the tensor that it was.
    same = [before for before in emulated if before.inner is each]
    return same[0] if same else Emulated(each)


def _failures(cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    from coppice.methods.registry import method
    from coppice.models.contracts import Linear, LinearStatistics
    from coppice.models.replacements import Replacement

    def tensors(found: Any) -> list[Tensor]:
        if isinstance(found, Replacement):
            return [each for part in vars(found).values() for each in tensors(part)]
        if isinstance(found, (tuple, list)):
            return [each for part in found for each in tensors(part)]
        return [found] if isinstance(found, Tensor) else []

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 16, generator=generator), torch.randn(12, 16, generator=generator)
    values = (x.T @ x / 64, x.mean(0), x.abs().mean(0), x.abs().amax(0))
    failures = {}
    for case, options in cases.items():
        used = method(case.partition(" ")[0])
        with emulated_device():
            statistics = LinearStatistics(*(each.to(DEVICE) for each in values), tokens=64)
            there = weight.to(DEVICE)
            linear = Linear(there, reference=1.1 * there, storage=torch.bfloat16, name="model.layers.0.mlp.gate_proj")
            try:
                checked = used.validate_options(options)
                if used.layer.scales is not None:
                    used.layer.scales([linear, linear], statistics, checked)
                found = used.layer.compress(linear, statistics, checked)
                lost = [each for each in tensors(found) if not isinstance(each, Emulated) and each.dim()]
                if lost:
                    failures[case] = f"a tensor {tuple(lost[0].shape)} of its result is on the processor"
            except Exception as error:
                failures[case] = f"{type(error).__name__}: {error}"
    return failures


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend()
    print(json.dumps(_failures(json.loads(sys.argv[1]))))
