"""The table of devices: one row a device, each figure with its source."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

from coppice.hardware import DEVICES, GPU_MEMORY, DeviceName


def test_every_name_has_a_row():
    assert get_args(DeviceName) == tuple(DEVICES)


def test_every_figure_has_a_source():
    for name, device in DEVICES.items():
        assert device.source, name
        assert (device.memory is None) == (device.memory_source is None), name


def test_integers_are_never_slower_than_floats():
    for name, device in DEVICES.items():
        assert device.int8 >= device.float16 > device.bandwidth, name


def test_the_gpus_are_those_with_memory_of_their_own():
    assert DEVICES.keys() - GPU_MEMORY.keys() == {"i9-13900K"}


def test_the_table_is_read_without_torch_or_numpy():
    program = "import sys, coppice.hardware; assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)
