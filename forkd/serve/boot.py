"""Every step of a worker after the fork, in order, until it serves.

`boot_worker` is what the child of a fork runs; the process ends with the exit status that it returns. On the worker's
channel it reports why the worker could not boot; that it is ready is said by the running worker. Nothing of the user's
code runs before the privileges are dropped, but where `preload` had the master import it. All of it runs inside the
worker's loop, as asyncio's libraries expect.
"""

from __future__ import annotations

import gc
import inspect
import os
from functools import partial

from forkd import signals, worker
from forkd.errors import ForkdError
from forkd.messages import FailedEvent
from forkd.serve.handler_forks import leave_at_fork
from forkd.serve.handlers import Handler, import_all, make_handler
from forkd.serve.import_paths import assume_identity
from forkd.serve.stream.tls import load_certificates
from forkd.serve.worker import COULD_NOT_BOOT, WorkerContext, WorkerProcess
from forkd.system.logs import log_descriptors, separate_log, set_role, start_logging
from forkd.system.privileges import load_late_modules
from forkd.system.process import close_all_but, dump_stacks_on, set_title, signal_when_parent_dies
from forkd.system.working_directory import enter_directory


def prepare_boots() -> None:
    """Does once, in the master before it forks, what each worker would do in the same way: half of the time that a
    boot takes. It imports nothing of the user's.
    """
    load_late_modules()
    inspect.signature(object)  # compiles the patterns that signatures of classes without a constructor are read by


def boot_worker(context: WorkerContext) -> int:
    """Boots a worker in a process of its own, and runs it to its end; the exit status."""
    settings = context.settings
    own = separate_log(context.log)
    os.dup2(own, context.log, inheritable=False)
    os.close(own)
    start_logging(settings.name, settings.log.level, settings.log.form, context.log)
    set_role(f"worker {context.slot}")
    set_title(settings.name, f"worker {context.slot} (booting)")

    # It keeps its own row and sockets, and nothing of other workers.
    context.board.confine(context.row)
    for bound in context.listeners:
        bound.keep_slot(context.slot)
    if not settings.preload:  # else a module may own a descriptor that is not known here
        _close_others(context)
    dump_stacks_on(signals.DUMP)
    leave_at_fork(settings.name, f"worker {context.slot}", partial(_leave, context))

    try:
        enter_directory(settings, context.directory)  # by its path: that may lead to another release by now
        load_certificates(settings, context.certificates)  # as long as it may read the keys
        assume_identity(settings, context.identity)
        # Only now: when a process becomes another user's the kernel forgets it.
        if not signal_when_parent_dies(signals.DRAIN, context.master):
            return COULD_NOT_BOOT
    except ForkdError as error:
        context.channel.send(FailedEvent(str(error), getattr(error, "details", "")))
        return COULD_NOT_BOOT

    running = WorkerProcess(context)
    running.run(_boot_on_loop(context, running))
    return running.status


async def _boot_on_loop(context: WorkerContext, running: WorkerProcess) -> list[Handler]:
    """The steps that are done inside the worker's running loop; what serves each listener. Raises ForkdError."""
    settings = context.settings
    worker.begin(
        slot=context.slot,
        name=settings.name,
        generation=context.generation,
        loop=running.loop,
        region=context.board.regions.view(context.row.index),
    )
    handlers, hooks = import_all(settings, [bound.address for bound in context.listeners])

    # An import that is told to end is killed; from here on what was set up is torn down.
    running.listen_to_master()
    await running.set_up(hooks)
    made = [
        make_handler(handler, bound.listener, bound.address)
        for bound, handler in zip(context.listeners, handlers, strict=True)
    ]

    # What was imported stays; the collector need not walk it again and again, nor dirty the pages it shares.
    gc.collect()
    gc.freeze()

    # Whole servers are ready when they accept. The rest is up to `WorkerProcess.begin`: the datagram sockets, that the
    # worker reports that it is ready, and connections.
    await running.start_servers(made)
    return made


def _leave(context: WorkerContext) -> None:
    """In a process that a handler forks: leaves what is the worker's alone."""
    worker.share(None)
    for bound in context.listeners:
        bound.close()
    context.channel.close()


def _close_others(context: WorkerContext) -> None:
    """Closes all descriptors that are not this worker's: those of the master, and what its starter left open."""
    listeners = {sock.fileno() for bound in context.listeners for sock in bound.sockets}
    own = {0, 1, 2, context.log, context.channel.fileno(), context.board.regions.descriptor}
    close_all_but(own | listeners | log_descriptors())
