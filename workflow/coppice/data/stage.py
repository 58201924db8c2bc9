"""`coppice tokenize`: packs a text into windows of tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from coppice.data.splits import ROLES
from coppice.data.windows import save_windows, tokenize
from coppice.files import json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `coppice tokenize`."""
    parser.add_argument("--tokenizer", type=Path, required=True, help="checkpoint whose tokenizer.json is used")
    parser.add_argument("--text", type=json_object, required=True, help="the text, as JSON")
    parser.add_argument("--role", choices=ROLES, required=True, help="which split of the text")
    parser.add_argument("--windows", type=int, default=0, help="how many windows; 0: all")
    parser.add_argument("--length", type=int, required=True, help="tokens in a window")
    parser.add_argument("--seed", type=int, default=0, help="seed of the built-in stream")
    parser.add_argument("--no-pack", dest="pack", action="store_false", help="one document a window")
    parser.add_argument("--no-bos", dest="bos", action="store_false", help="no token before each document")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")


def run(arguments: argparse.Namespace) -> None:
    """`coppice tokenize`."""
    windows = tokenize(
        arguments.tokenizer,
        arguments.text,
        arguments.role,
        arguments.windows,
        arguments.length,
        arguments.seed,
        arguments.pack,
        arguments.bos,
    )
    save_windows(windows, arguments.output)
