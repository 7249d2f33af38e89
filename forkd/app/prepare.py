"""The first step of a reload, done by a helper process: reads the settings anew, and binds what is new.

What can go wrong or take long, a broken file or a name server that does not answer, does so here and holds nobody up.
The helper tells the master on its channel: the settings, each new listener with its sockets, or why not.
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable, Sequence

from forkd.config.declare import Needs
from forkd.config.differences import differences
from forkd.config.options import Settings
from forkd.config.plain import to_plain
from forkd.errors import ForkdError
from forkd.master.change import DIFF
from forkd.master.generation import Generation, wanted_workers
from forkd.system.channel import Channel
from forkd.system.identity import find_identity
from forkd.system.limits import lacking_files, raise_limits
from forkd.system.sockets import bind_listener, match_listeners
from forkd.system.tuning import shortcomings, try_options
from forkd.wire import Message

log = logging.getLogger("forkd")


def warn(settings: Settings) -> None:
    """Logs what these settings want and can't have, or should not."""
    for lacking in raise_limits(settings.rlimits):
        log.warning("%s", lacking)
    for short in shortcomings(settings):
        log.warning("%s", short)
    for lacking in lacking_files(settings):
        log.warning("%s", lacking)
    if settings.chroot is not None and settings.user is None and os.geteuid() == 0:
        log.warning("chroot: holds nobody in who is root, as these workers are; set user too")


def prepare(present: Generation, verb: str, channel: Channel, reread: Callable[[], Settings], directory: str) -> int:
    """Runs a helper to its end; its exit status.

    Args:
        present: the generation that serves.
        verb: what the change is: a reload, or just to tell what it would change.
        channel: to the master.
        reread: reads the settings anew.
        directory: where the daemon was started, which what the user wrote is relative to.
    """
    try:
        here = os.getcwd()
        os.chdir(directory)
        settings = reread()
        identity = find_identity(settings)
        os.chdir(here)
        if verb == DIFF:
            lines = [str(one) for one in differences(present.settings, settings)]
            _say(channel, {"event": "differences", "differences": lines})
            return 0
        check_reloadable(present.settings, settings)
        warn(settings)
        _say(channel, {"event": "settings", "settings": to_plain(settings), "identity": identity.plain()})
        for place, kept in enumerate(match_listeners(settings.listen, present.bound)):
            if kept is not None:
                try_options(kept.listener, kept.sockets[0])
            else:
                bound = bind_listener(settings.listen[place], wanted_workers(settings))
                message = {"event": "bound", "place": place, **bound.described()}
                _say(channel, message, [sock.fileno() for sock in bound.sockets])
    except (ForkdError, OSError) as error:
        _say(channel, {"event": "failed", "reason": str(error), "details": getattr(error, "details", "")})
        return 1
    return 0


def check_reloadable(present: Settings, settings: Settings) -> None:
    """Raises ForkdError where a change of settings needs more than a reload."""
    if more := [one for one in differences(present, settings) if one.needs is not Needs.RELOAD]:
        raise ForkdError("a reload can't change this:\n" + "\n".join(map(str, more)))


def _say(channel: Channel, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Tells the master, and waits until it is said: this process does nothing else."""
    if descriptors:
        channel.send_with(message, descriptors)
    else:
        channel.send(message)
    while channel.waiting:
        select.select([], [channel], [])
        channel.flush()
