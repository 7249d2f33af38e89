"""HAProxy's agent check: one line for each connection, which says whether this server should get clients, and how many.

The words are those of HAProxy's configuration manual (agent-check). Only the agent undoes what it has set: `drain` and
`down` by `up ready`, which is therefore always said in full. `ready` also ends what an operator has set at HAProxy.

Weight and reason are said twice: whatever else reads the line finds `weight:50%` and `down#reason` in it, but HAProxy
passes over those, and takes a percentage without a name and a reason that stands apart.
"""

from __future__ import annotations

import re

from forkd.errors import escaped
from forkd.master.state import DaemonState
from forkd.master.status import is_leaving, why_not_ready
from forkd.states import WorkerState
from forkd.system.scoreboard import ListenerField

_LONGEST_REASON = 100  # characters

#: What would end a word, or begin a reason.
_ODD = re.compile(r"[\s,#]+")


def agent_line(state: DaemonState) -> bytes:
    """What the daemon says at this moment."""
    if is_leaving(state):
        return b"drain\n"
    if why_not := why_not_ready(state):
        reason = escaped(why_not).encode("ascii", "replace").decode()[:_LONGEST_REASON]
        return f"down#{_ODD.sub('_', reason)} down #{reason}\n".encode()
    free = weight(state)
    return f"up ready weight:{free}% {free}%\n".encode()


def weight(state: DaemonState) -> int:
    """Free places in percent of all, of the fullest listener; 100 where there is no limit. Never 0, by which HAProxy
    would send nobody, even where all servers are full: there clients wait, or are refused, as the settings say.
    """
    counts, least = state.pool.listener_counts(), 100
    serving = sum(one.state is WorkerState.SERVING for one in state.workers.values())
    for bound in state.generation.bound:
        taken = counts.get(str(bound.address), [0, 0])
        free = 1 - (taken[ListenerField.OPENED] - taken[ListenerField.CLOSED]) / bound.listener.limits.most(serving)
        least = min(least, round(100 * free))
    return max(1, least)
