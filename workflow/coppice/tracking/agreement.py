"""What several trackers do to the same experiment, without a lock, so that each node ends with exactly one run.

MLflow has nothing unique among runs, so any tracker may make a run that another one makes too. All of them therefore
choose in the same way, from what the server lists:

- A tracker takes a turn before it reads the results: one more than the largest that it sees, no clock involved. Whoever
  reads later than others have written has a higher turn, and so has the newer view. Turns that are equal, of trackers
  that run at once, are ordered by chance, and those that show finished work before those that show work under way.
- Of the whole runs of a node, the one with the highest (turn, id) is current. A tracker of a lower turn
  does not replace it, and every other one goes to the trash.
- A run is whole when all of it is written; its status becomes final last. Half a run goes to the trash as soon as a
  whole one is current. Its writer then gets an error, lists the runs again, and finds the current one.
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
class ListedRun:
    """A run as the server lists it. active: not in the trash; live: of a node under way, whole at any time."""

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
    """The next steps of a tracker.

    current: the run of each node that needs nothing. claimed: runs to fetch from the trash, or to take over, under
    the tracker's own turn. missing: nodes that need a run; contested: those of them that another tracker has begun;
    trash: runs to move there.
    """

    current: dict[str, str] = field(default_factory=dict)
    claimed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    contested: list[str] = field(default_factory=list)
    trash: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.claimed or self.missing or self.contested or self.trash)


def plan(runs: list[ListedRun], fingerprints: Mapping[str, str], known: AbstractSet[str], turn: Turn) -> Plan:
    """What is left to do. fingerprints: of each node with results; known: all nodes of the study."""
    of: dict[str, list[ListedRun]] = {node: [] for node in fingerprints}
    for run in runs:
        of.setdefault(run.node, []).append(run)
    steps = Plan()
    for node, all_runs in of.items():
        active = [run for run in all_runs if run.active]
        best = max((run for run in active if run.whole), key=lambda run: run.order, default=None)
        if node not in fingerprints:
            steps.trash += _obsolete_runs(active, node in known, turn)
        elif best and (best.fingerprint == fingerprints[node] or best.turn > turn):
            steps.current[node] = best.id
            steps.trash += [run.id for run in active if run is not best and _is_superseded(run, best, turn)]
        else:
            fits = [run for run in all_runs if run.whole and run.fingerprint == fingerprints[node]]
            again = max((run for run in fits if run.active or not run.live), key=lambda run: run.order, default=None)
            if again:
                steps.claimed.append(again.id)
            else:
                (steps.contested if any(not run.whole for run in active) else steps.missing).append(node)
    return steps


def _obsolete_runs(active: list[ListedRun], known: bool, turn: Turn) -> list[str]:
    """Runs of a node without results to delete: the last finished one stays while the study has the node."""
    finished = [run for run in active if known and run.whole and not run.live]
    last = max(finished, key=lambda run: run.order, default=None)
    return [run.id for run in active if run is not last and run.turn <= turn]


def _is_superseded(run: ListedRun, best: ListedRun, turn: Turn) -> bool:
    """Whether a run that is not current goes: half a run of a newer view may yet replace the current one."""
    return run.whole or run.turn <= turn or run.fingerprint == best.fingerprint
