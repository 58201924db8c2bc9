"""`coppice export`: any node as an ordinary dense checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help="folder of the node's checkpoint")
    parser.add_argument("--output", required=True, type=Path, help="folder of the dense checkpoint")


def run(arguments: argparse.Namespace) -> None:
    from coppice.checkpoint import export_dense

    export_dense(arguments.model, arguments.output)
