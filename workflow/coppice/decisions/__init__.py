"""Decisions: what a study's tables and fitted laws advise to do, and how far that can be trusted; a file a question.

`budget`: how many recovery tokens to buy for a node, and what loss to expect at a budget that was not run; `next_run`:
which run would tell most; both rest on a law of recoveries (`fitted`), whose held-out error they show, and which they
refuse where it fails its own test. `recipe`: the best node within limits, with the probability that it is the best,
from measurements alone. `stage` is the command.
"""

from __future__ import annotations

from typing import Any

Answer = dict[str, Any]  # title, sentences, perhaps a table (titles, then rows), and the numbers behind them
