"""What is said of a machine."""

from __future__ import annotations

import platform

import torch

from benchmarks import machine


def test_a_machine_is_described_but_not_named():
    found = machine.machine(packages=("einops", "no-such-package"))
    assert found["cpu"]
    assert found["torch"] == torch.__version__
    assert found["einops"]
    assert found["no-such-package"] is None
    assert platform.node() not in [str(value) for value in found.values()]


def test_where_files_lie_is_not_told():
    said = "FileError: /some/where/x.bin: see https://a.org/b/c, 'k/v' and (/else/where/y.py:3) 1/2"
    assert machine.without_folders(said) == "FileError: x.bin: see https://a.org/b/c, 'k/v' and (y.py:3) 1/2"
