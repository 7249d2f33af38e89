"""The first step of a reload, done by a helper process: reads the settings again, and binds what is new.

What can go wrong or take long, a broken file or a name server that does not answer, does so here and does not block the
master. `prepare` sends the master, on the helper's channel, the settings, and for each listener in them either which of
the present ones it is or the sockets that were bound for it; or why the reload can't be.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from forkd.config.fields import Needs
from forkd.config.serialize import differences, to_plain
from forkd.config.settings import Settings
from forkd.errors import ForkdError, system_reason
from forkd.master.admin.loading import load_extras
from forkd.master.generation import Generation, wanted_workers
from forkd.master.reload import DIFF
from forkd.messages import BoundEvent, ChildEvent, DifferencesEvent, FailedEvent, KeptEvent, SettingsEvent
from forkd.system.channel import Channel, wait_ready
from forkd.system.identity import find_identity
from forkd.system.listeners import BoundListener, bind_listener, matching_indexes, unmatched
from forkd.system.rlimits import descriptor_warnings, raise_limits
from forkd.system.socket_options import option_warnings, try_options
from forkd.system.working_directory import change_directory

log = logging.getLogger("forkd")

#: How hosts begin that only this machine reaches.
_THIS_MACHINE = ("127.", "localhost", "::1")


def warn(settings: Settings, bound: Sequence[BoundListener] = ()) -> None:
    """Logs what these settings want and can't get, or should not want; and so of what was bound for them."""
    for one in bound:
        for lacking in one.lacking:
            log.warning("%s", lacking)
    for lacking in raise_limits(settings.rlimits):
        log.warning("%s", lacking)
    for short in option_warnings(settings):
        log.warning("%s", short)
    for lacking in descriptor_warnings(settings):
        log.warning("%s", lacking)
    for careless in exposures(settings):
        log.warning("%s", careless)


def exposures(settings: Settings) -> Iterator[str]:
    """What these settings leave open, each as a sentence; `forkd check` says it too."""
    for address in settings.admin.address:
        if address.scheme == "tcp" and not settings.admin.allow and not address.host.startswith(_THIS_MACHINE):
            yield f"admin: everybody who reaches {address} can ask there; set admin.allow"
    if settings.chroot is not None and settings.user is None and os.geteuid() == 0:
        yield "chroot: does not confine root, as which these workers run; set user too"


def prepare(present: Generation, verb: str, channel: Channel, reread: Callable[[], Settings], directory: str) -> int:
    """Runs a helper to its end; its exit status.

    Args:
        present: the generation that serves.
        verb: what the change is: a reload, or just to tell what it would change.
        channel: to the master.
        reread: reads the settings again.
        directory: where the daemon was started, which what the user wrote is relative to.
    """
    try:
        _return_to(directory)
        settings = resolve_statsd(reread())
        identity = find_identity(settings)
        if verb == DIFF:
            lines = [str(one) for one in differences(present.settings, settings)]
            _send(channel, DifferencesEvent(lines))
            return 0
        check_reloadable(present.settings, settings)
        load_extras(settings)
        warn(settings)
        _send(channel, SettingsEvent(to_plain(settings), identity.to_plain()))
        _choose_listeners(settings, present, channel)
    except (ForkdError, OSError) as error:
        _send(channel, FailedEvent(system_reason(error), getattr(error, "details", "")))
        return 1
    return 0


def resolve_statsd(settings: Settings) -> Settings:
    """The same settings with the number of statsd's host, which the master is not to look up. Raises ForkdError."""
    if settings.statsd is None:
        return settings
    try:
        found = socket.getaddrinfo(settings.statsd.host, settings.statsd.port, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise ForkdError(f"statsd: {settings.statsd.host} can't be found: {system_reason(error)}") from None
    return replace(settings, statsd=settings.statsd._replace(host=str(found[0][4][0])))


def _choose_listeners(settings: Settings, present: Generation, channel: Channel) -> None:
    """Keeps or binds each listener, and each address of the master's own, and sends it. Raises ForkdError, OSError."""
    indexes = matching_indexes(settings.listen, present.bound)
    own = matching_indexes(settings.service_listeners, present.services)
    going = unmatched(indexes, present.bound) + unmatched(own, present.services)
    held = (*present.bound, *present.services)
    indexes += [None if index is None else len(present.bound) + index for index in own]
    listeners = (*settings.listen, *settings.service_listeners)
    for place, (listener, index) in enumerate(zip(listeners, indexes, strict=True)):
        if index is not None:
            try_options(listener, held[index].sockets[0])
            _send(channel, KeptEvent(place, index))
        else:
            bound = bind_listener(listener, wanted_workers(settings), beside=going)
            for lacking in bound.lacking:
                log.warning("%s", lacking)
            _send(channel, BoundEvent(place, bound.describe()), [sock.fileno() for sock in bound.sockets])


def _return_to(directory: str) -> None:
    try:
        change_directory(directory)
    except OSError as error:
        raise ForkdError(f"can't change to {directory}, where the daemon was started: {error.strerror}") from None


def check_reloadable(present: Settings, settings: Settings) -> None:
    """Raises ForkdError where a change of settings needs more than a reload."""
    if more := [one for one in differences(present, settings) if one.needs is not Needs.RELOAD]:
        raise ForkdError("a reload can't change this:\n" + "\n".join(map(str, more)))


def _send(channel: Channel, event: ChildEvent, descriptors: Sequence[int] = ()) -> None:
    """Sends it to the master, and waits until it is sent: this process does nothing else."""
    if descriptors:
        channel.send_with_descriptors(event, descriptors)
    else:
        channel.send(event)
    while channel.has_unsent:
        wait_ready(channel, select.POLLOUT)
        channel.flush()
