"""Per-worker hooks: what the settings name as `setup` and `teardown`, of the daemon and of its listeners.

They run on the process's loop: each setup before it takes clients, the daemon's first; each teardown after its last
client, in the reverse order, but only where the setup beside it has been done. A setup that fails is a failed boot. Of
a teardown that fails the log tells, and the others follow. `handlers` imports them; workers and `forkd once` run them.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Iterator, Sequence
from contextvars import Context

from forkd.drain import draining
from forkd.errors import HandlerError
from forkd.serve.handlers import Hook, end_if_forked, handler_error, user_traceback
from forkd.serve.loop import PollLoop

#: The part of `boot_timeout`, and the seconds at most, by which a worker that waits for the handler's code comes before
#: its master: it can say what it waits for, the master would only kill it.
_AHEAD, _MOST_AHEAD = 0.2, 1.0


def keep_variables(context: Context) -> None:
    """Sets in the present context what a boot has set of context variables in its own, so that clients see it."""
    for variable, value in context.items():
        variable.set(value)


def boot_deadline(boot_timeout: float, since: float) -> float:
    """Until when a worker that boots waits for the handler's code.

    Args:
        boot_timeout: seconds that the boot may take.
        since: the loop's time at its beginning.
    """
    return since + boot_timeout - min(boot_timeout * _AHEAD, _MOST_AHEAD)


class Hooks:
    """The hooks of a process, and which of them are to be undone.

    Args:
        loop: the process's.
        hooks: what was imported.
    """

    def __init__(self, loop: PollLoop, hooks: Sequence[Hook] = ()) -> None:
        self._loop = loop
        self._hooks = hooks
        self._process = os.getpid()
        self._done: list[int] = []  # owners that are set up
        self._timeout: asyncio.Timeout | None = None

    @property
    def have_work(self) -> bool:
        """Whether a teardown is to be called."""
        return any(True for owner in self._done for _ in self._of(owner, "teardown"))

    async def set_up(self, boot_timeout: float, since: float) -> None:
        """Calls each setup.

        Args:
            boot_timeout, since: as of `boot_deadline`.

        Raises:
            HandlerError: one has failed, or takes too long; with the traceback of the user's code.
        """
        deadline = boot_deadline(boot_timeout, since)
        limit = f"boot_timeout ({boot_timeout:g} s)"
        for owner in sorted({hook.owner for hook in self._hooks}):
            for hook in self._of(owner, "setup"):
                await self._set_up(hook, deadline, limit)
            self._done.append(owner)

    async def tear_down(self, seconds: float) -> None:
        """Calls each teardown whose time has come, within so many seconds. One that blocks is not interrupted."""
        deadline = self._loop.time() + seconds
        while self._done:
            for hook in self._of(self._done.pop(), "teardown"):
                try:
                    await self._run(hook, deadline, "the end of the drain")
                except HandlerError as error:
                    late = HandlerError("\n".join([str(error), *error.details.splitlines()]))
                    self._loop.call_exception_handler({"message": "", "exception": late})
                except BaseException as error:  # noqa: BLE001 (the handler's border)
                    end_if_forked(self._process, error)
                    self._loop.call_exception_handler({"message": f"{hook.about} failed.", "exception": error})

    def hurry(self, seconds: float) -> None:
        """The teardown that runs has no more than so many seconds."""
        if self._timeout is not None and (when := self._timeout.when()) is not None:
            self._timeout.reschedule(min(when, self._loop.time() + seconds))

    def _of(self, owner: int, kind: str) -> Iterator[Hook]:
        return (hook for hook in self._hooks if (hook.owner, hook.kind) == (owner, kind))

    async def _set_up(self, hook: Hook, deadline: float, limit: str) -> None:
        try:
            await self._run(hook, deadline, limit)
        except (HandlerError, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            end_if_forked(self._process, error)
            if not draining():
                raise handler_error(f"{hook.about} failed", error) from None
        if draining():  # the boot is cancelled, whatever the hook makes of that
            raise asyncio.CancelledError

    async def _run(self, hook: Hook, deadline: float, limit: str) -> None:
        """Calls a hook, and waits for what it returns. Raises what it raises, and HandlerError where it is late."""
        self._timeout = timeout = asyncio.timeout_at(deadline)
        try:
            async with timeout:
                result = hook.call()
                if inspect.isawaitable(result):
                    await result
        except TimeoutError as error:
            if not timeout.expired():
                raise
            where = error.__cause__ or error.__context__ or error
            raise HandlerError(f"{hook.about} has not returned by {limit}", user_traceback(where)) from None
        finally:
            self._timeout = None
