"""A handler's module that configures logging as `QUIET` says, which must not silence forkd."""

from __future__ import annotations

import logging
import logging.config
import os
from pathlib import Path

from forkd.builtin import Echo

_FILE = str(Path(os.environ["QUIET_LOG"]))
_CONFIG = {
    "version": 1,
    "handlers": {"file": {"class": "logging.FileHandler", "filename": _FILE}},
    "root": {"handlers": ["file"], "level": "WARNING"},
}
_ASYNCIO = {"loggers": {"asyncio": {"level": "CRITICAL", "propagate": False}}}

match os.environ["QUIET"]:
    case "dictConfig":
        logging.config.dictConfig(_CONFIG)
    case "asyncio":
        logging.config.dictConfig(_CONFIG | _ASYNCIO)
    case "basicConfig":
        logging.basicConfig(filename=_FILE, level=logging.ERROR, force=True)
    case "disable":
        logging.disable(logging.CRITICAL)
    case "handlers":
        logging.getLogger().handlers.clear()
        logging.getLogger("forkd").setLevel(logging.CRITICAL)


class Quiet(Echo):
    """Fails at `fail`; says `mine` into its own log; echoes anything else."""

    def data_received(self, data: bytes) -> None:
        if data == b"fail":
            raise ValueError("told to")
        if data == b"mine":
            logging.getLogger("mine").error("said by the handler")
        super().data_received(data)
