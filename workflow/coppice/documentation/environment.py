"""envs/coppice.yaml: the conda environment of `--sdm conda`."""

from __future__ import annotations

from pathlib import Path

PATH = Path("envs/coppice.yaml")


def render(root: Path) -> str:
    """The environment: Python, and every package at the version that the lock of the repository `root` names."""
    locked = (root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    packages = [f"      - {line}" for line in locked if line and not line.startswith("#")]
    return "\n".join(
        [
            "# Made from requirements.lock by `python -m coppice.documentation`; do not edit.",
            "channels:",
            "  - conda-forge",
            "dependencies:",
            "  - python=3.11",
            "  - pip",
            "  - pip:",
            *packages,
            "",
        ]
    )
