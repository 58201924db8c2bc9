"""What several trackers do to the same experiment, without a lock, so that each node ends with exactly one run.

MLflow has nothing unique among runs, so any tracker may make a run that another one makes too. All of them therefore
choose in the same way, from what the server lists:

- A tracker takes a turn before it reads the results: one more than the largest that it sees, no clock involved. Whoever
  reads later than others have written has a higher turn, and so has the newer view. Turns that are equal, of trackers
  that run at once, are ordered by chance, and those that show finished work before those that show work under way.
- Of the whole runs of a node, the one with the highest (turn, id) stands. It is not replaced by a tracker of a lower
  turn, and every other one goes to the trash.
- A run is whole when all of it is written, which its status tells last. Half a run goes to the trash as soon as a whole
  one stands; whoever was writing it learns so from an error, looks again, and finds the one that stands.
- A tracker ends only after a listing that leaves it nothing to do. Killed anywhere, it leaves half a run, or two whole
  ones, and the next tracker ends with one.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

Turn = tuple[int, int, str]  # number, whether it shows finished work only, drawn by chance
FIRST: Turn = (0, 0, "")  # of runs that bear none


@dataclass(frozen=True)
class Shown:
    """A run as the server lists it. active: not in the trash; live: of a node that is being made, whole at any time."""

    id: str
    node: str
    fingerprint: str
    turn: Turn
    whole: bool
    active: bool
    live: bool = False

    @property
    def order(self) -> tuple[Turn, str]:
        return self.turn, self.id


@dataclass
class Plan:
    """What a tracker is to do next.

    stands: the run of each node that has the right one; claimed: runs to fetch from the trash, or to take over, under
    the tracker's own turn; missing: nodes that need a run; contested: those of them that another tracker has begun;
    trash: runs to move there.
    """

    stands: dict[str, str] = field(default_factory=dict)
    claimed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    contested: list[str] = field(default_factory=list)
    trash: list[str] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        return not (self.claimed or self.missing or self.contested or self.trash)


def plan(runs: list[Shown], wanted: Mapping[str, str], known: AbstractSet[str], turn: Turn) -> Plan:
    """wanted: the fingerprint of each node that there is something to show of; known: all nodes of the study."""
    of: dict[str, list[Shown]] = {node: [] for node in wanted}
    for run in runs:
        of.setdefault(run.node, []).append(run)
    made = Plan()
    for node, all_runs in of.items():
        active = [run for run in all_runs if run.active]
        best = max((run for run in active if run.whole), key=lambda run: run.order, default=None)
        if node not in wanted:
            made.trash += _unwanted(active, node in known, turn)
        elif best and (best.fingerprint == wanted[node] or best.turn > turn):
            made.stands[node] = best.id
            made.trash += [run.id for run in active if run is not best and _lost(run, best, turn)]
        else:
            fits = [run for run in all_runs if run.whole and run.fingerprint == wanted[node]]
            again = max((run for run in fits if run.active or not run.live), key=lambda run: run.order, default=None)
            if again:
                made.claimed.append(again.id)
            else:
                (made.contested if any(not run.whole for run in active) else made.missing).append(node)
    return made


def _unwanted(active: list[Shown], known: bool, turn: Turn) -> list[str]:
    """Runs of a node that there is nothing to show of: the last finished one stays while the study has the node."""
    finished = [run for run in active if known and run.whole and not run.live]
    kept = max(finished, key=lambda run: run.order, default=None)
    return [run.id for run in active if run is not kept and run.turn <= turn]


def _lost(run: Shown, best: Shown, turn: Turn) -> bool:
    """Whether a run goes that is not the one that stands: half a run of a newer view may yet replace it."""
    return run.whole or run.turn <= turn or run.fingerprint == best.fingerprint
