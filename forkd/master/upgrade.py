"""Replaces the master's image in place: the same process, so its PID, its children and its addresses stay.

The command line is run again as it was first given, with `heritage` naming the state in the environment. First a child
tries that; only where it ends well does the master itself go over.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from forkd import signals
from forkd.errors import ForkdError
from forkd.master.heritage import Heritage
from forkd.system.channel import Channel
from forkd.wire import RESUME


def try_image(heritage: Heritage) -> int:
    """In a child: becomes an image of today's code that checks whether it could go on with this state.

    Raises:
        ForkdError: there is no such image.
    """
    for signum in signals.WORKER_IGNORES:  # what is ignored stays so through execve(2)
        if signum is not signals.DUMP:  # it would end before it could tell why
            signal.signal(signum, signal.SIG_DFL)
    descriptor = _written(heritage)
    os.set_inheritable(descriptor, True)
    _run(f"check:{descriptor}", heritage.place.directory)


def try_or_tell(heritage: Heritage, channel: Channel) -> int:
    """As `try_image`, and tells on the channel why where it can't be tried."""
    try:
        return try_image(heritage)
    except ForkdError as error:
        channel.send({"event": "failed", "reason": str(error)})
        return 1


def replace_image(heritage: Heritage) -> NoReturn:
    """Becomes an image of today's code that goes on with this state.

    Raises:
        ForkdError: that can't be done; then nothing has changed.
    """
    directory = os.open(".", os.O_PATH)  # it may have been removed since
    descriptor = _written(heritage)
    handed = [descriptor, *heritage.descriptors()]
    # What arrives from now on waits until the next image listens for it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        for number in handed:
            os.set_inheritable(number, True)
        _run(str(descriptor), heritage.place.directory)
    finally:
        for number in handed:
            os.set_inheritable(number, False)
        os.close(descriptor)
        os.chdir(directory)
        os.close(directory)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _written(heritage: Heritage) -> int:
    try:
        return heritage.write()
    except OSError as error:
        raise ForkdError(f"can't hand over the state: {error.strerror}") from None


def _run(state: str, directory: str) -> NoReturn:
    try:
        os.chdir(directory)
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, RESUME: state})  # noqa: S606 (there is nothing for a shell)
    except OSError as error:
        raise ForkdError(f"can't run {error.filename or sys.executable}: {error.strerror}") from None
