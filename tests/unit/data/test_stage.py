"""`coppice tokenize`."""

from __future__ import annotations

import argparse
import json

from text_files import jsonl, source

from coppice.data import stage
from coppice.data.windows import load_windows


def test_the_stage_writes_what_its_arguments_say(tmp_path, checkpoint):
    path = jsonl(tmp_path / "text.jsonl", ["w0 w1 w2 w3", "w4"])
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    given = json.dumps(source(path))
    command = f"--tokenizer {checkpoint} --role evaluation --windows 2 --length 3 --no-pack --no-bos --output".split()
    stage.run(parser.parse_args([*command, str(tmp_path / "tokens"), "--text", given]))
    assert load_windows(tmp_path / "tokens").tokens.tolist() == [[3, 4, 5], [7, 0, 0]]
