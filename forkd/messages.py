"""Every message that crosses a process: what it is called on the wire, and what belongs to it.

A message is a frozen dataclass, and on the wire one line with a JSON object. `encode` makes the line; `JsonLines` cuts
what a socket delivers into objects; `decode_request`, `decode_command`, `decode_event`, `decode_reply`,
`decode_launch` and `decode_check` make a dataclass of an object, or raise `InvalidMessage`, and nothing else: the
sender may be a stranger or a worker that has been taken over. What a field may hold is read off its declaration. Fields
that a class does not have are passed over, since the sender may be of another version; for the same reason names, once
given, are kept. The sockets are in `system.channel` and `master.control_socket`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from itertools import accumulate, takewhile
from math import inf
from typing import Any, ClassVar, TypeVar, cast

from forkd import MOST_WORKERS

JsonObject = dict[str, Any]

#: Bytes of one message at most. A traceback fits; a flood does not.
LARGEST = 1 << 20

#: Bytes of one reply of the control socket at most, which only the master sends.
LARGEST_REPLY = 1 << 26

_MOST_NUMBER = (1 << 63) - 1
_MOST_COOKIE = (1 << 64) - 1


class MalformedLine(ValueError):
    """A line is too long, or no JSON object; the connection that it came on is of no more use."""


class InvalidMessage(ValueError):
    """A JSON object is no message of the kind that was expected; the sentence says why, in at most 200 characters."""


def _limits(least: int, most: int) -> dict[str, tuple[int, int]]:
    """The metadata of a field that holds a whole number within these limits."""
    return {"limits": (least, most)}


# What the control socket is asked


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """Tell the state of the daemon; answered by `StatusReply`."""

    KIND: ClassVar = ("verb", "status")


@dataclass(frozen=True, slots=True)
class StopRequest:
    """Stop: answered by `AcceptedReply` at once and by `DoneReply` when all is over.

    Attributes:
        now: do not wait for clients.
        succeeded: another master has taken over the name and the addresses.
    """

    KIND: ClassVar = ("verb", "stop")
    now: bool = False
    succeeded: bool = False


@dataclass(frozen=True, slots=True)
class ReloadRequest:
    """Reload: answered by `AcceptedReply` at once and by `ChangedReply` when the new generation serves."""

    KIND: ClassVar = ("verb", "reload")


@dataclass(frozen=True, slots=True)
class UpgradeRequest:
    """Upgrade: answered as a `ReloadRequest`."""

    KIND: ClassVar = ("verb", "upgrade")


@dataclass(frozen=True, slots=True)
class DiffRequest:
    """Tell what a reload would change: answered by `AcceptedReply` at once and by `DifferencesReply`."""

    KIND: ClassVar = ("verb", "diff")


@dataclass(frozen=True, slots=True)
class HandOverRequest:
    """Lend the lock and the listeners to a new master: answered by `HandOverReply` and their descriptors."""

    KIND: ClassVar = ("verb", "hand over")


@dataclass(frozen=True, slots=True)
class ScaleRequest:
    """Have so many workers: answered by `ScaledReply` when they serve."""

    KIND: ClassVar = ("verb", "scale")
    workers: int = field(metadata=_limits(1, MOST_WORKERS))


@dataclass(frozen=True, slots=True)
class DrainRequest:
    """Have balancers told that they should send no more clients: answered by `DoneReply`."""

    KIND: ClassVar = ("verb", "drain")


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """Undo a `DrainRequest`: answered by `DoneReply`."""

    KIND: ClassVar = ("verb", "resume")


@dataclass(frozen=True, slots=True)
class ClientsRequest:
    """Tell where the clients' connections are to be found: answered by `ClientsReply`."""

    KIND: ClassVar = ("verb", "clients")


@dataclass(frozen=True, slots=True)
class PeersRequest:
    """Tell the recent peers of datagram sockets: answered by `PeersReply`."""

    KIND: ClassVar = ("verb", "peers")


@dataclass(frozen=True, slots=True)
class KillRequest:
    """Close connections: answered by `KilledReply`.

    Attributes:
        cookie: the kernel's number of the one connection that is meant (SO_COOKIE of socket(7)); or
        network: of the clients that are meant.
    """

    KIND: ClassVar = ("verb", "kill")
    cookie: int | None = field(default=None, metadata=_limits(1, _MOST_COOKIE))
    network: str | None = None


Request = (
    StatusRequest | StopRequest | ReloadRequest | UpgradeRequest | DiffRequest | HandOverRequest | ScaleRequest
    | DrainRequest | ResumeRequest | ClientsRequest | PeersRequest | KillRequest
)  # fmt: skip


# What the control socket answers


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """A request failed; `details` are the lines below the sentence, such as a traceback."""

    KIND: ClassVar = ("ok", False)
    error: str
    details: str = ""


@dataclass(frozen=True, slots=True)
class DoneReply:
    """What was asked for is done."""

    KIND: ClassVar = ("ok", True)


@dataclass(frozen=True, slots=True)
class AcceptedReply:
    """The request is being carried out: the outcome is the next reply, within so many seconds."""

    KIND: ClassVar = ("ok", True)
    within: float


@dataclass(frozen=True, slots=True)
class StatusReply:
    """The state of the daemon, as `forkd status --json` prints it."""

    KIND: ClassVar = ("ok", True)
    status: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChangedReply:
    """A reload or upgrade is done: this generation serves, with so many workers."""

    KIND: ClassVar = ("ok", True)
    generation: int
    workers: int


@dataclass(frozen=True, slots=True)
class DifferencesReply:
    """What a reload would change, a line each."""

    KIND: ClassVar = ("ok", True)
    differences: list[str]


@dataclass(frozen=True, slots=True)
class HandOverReply:
    """The listeners that are lent, each as `BoundListener.describe`. Descriptors come with it: the lock's, then those
    of the listeners' sockets in order.
    """

    KIND: ClassVar = ("ok", True)
    listeners: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ScaledReply:
    """So many workers serve."""

    KIND: ClassVar = ("ok", True)
    workers: int


@dataclass(frozen=True, slots=True)
class ClientsReply:
    """Where the clients' connections are to be found. A descriptor of the regions' memory comes with it, if there is
    one.

    Attributes:
        pid: the master's.
        workers: of each its slot, pid and row.
        listeners: of each stream listener its address and where its sockets listen (`BoundListener.endpoints`).
        datagrams: the addresses of the datagram listeners.
        region_size: bytes of a worker's region; 0: of another version, which lays it out otherwise.
    """

    KIND: ClassVar = ("ok", True)
    pid: int
    workers: list[dict[str, Any]]
    listeners: list[dict[str, Any]]
    datagrams: list[str]
    region_size: int = 0


@dataclass(frozen=True, slots=True)
class PeersReply:
    """The recent peers of datagram sockets, and which workers did not answer (slot and pid)."""

    KIND: ClassVar = ("ok", True)
    peers: list[dict[str, Any]]
    silent: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class KilledReply:
    """How many connections were closed, and which workers did not answer (slot and pid)."""

    KIND: ClassVar = ("ok", True)
    closed: int
    silent: list[dict[str, Any]]


Reply = (
    ErrorReply | DoneReply | AcceptedReply | StatusReply | ChangedReply | DifferencesReply | HandOverReply | ScaledReply
    | ClientsReply | PeersReply | KilledReply
)  # fmt: skip


# What the master tells a worker


@dataclass(frozen=True, slots=True)
class DrainCommand:
    """As the signal `signals.DRAIN`, which a handler's code may have taken."""

    KIND: ClassVar = ("order", "drain")


@dataclass(frozen=True, slots=True)
class CloseCommand:
    """As the signal `signals.CLOSE`."""

    KIND: ClassVar = ("order", "close")


@dataclass(frozen=True, slots=True)
class LogCommand:
    """Log to the descriptor that comes with this."""

    KIND: ClassVar = ("order", "log")


@dataclass(frozen=True, slots=True)
class ListenerCommand:
    """Serve the socket that comes with this in the place of a listener's own, which no client reaches any more.

    Attributes:
        place: which of the settings' listeners it is.
    """

    KIND: ClassVar = ("order", "listener")
    place: int = field(default=0, metadata=_limits(0, _MOST_NUMBER))


@dataclass(frozen=True, slots=True)
class CertificatesCommand:
    """Load a listener's certificates from what comes with this (`system.tls_files`), and tell of them in a
    `CertificatesEvent` with the same number.

    Attributes:
        place: which of the settings' listeners it is; those with the same settings of TLS are meant too.
        number: of the renewal.
    """

    KIND: ClassVar = ("order", "certificates")
    place: int = field(default=0, metadata=_limits(0, _MOST_NUMBER))
    number: int = field(default=0, metadata=_limits(0, _MOST_NUMBER))


@dataclass(frozen=True, slots=True)
class PeersCommand:
    """Tell the recent peers of datagram sockets, in an `AnswerEvent` with the same number."""

    KIND: ClassVar = ("order", "peers")
    number: int = field(default=0, metadata=_limits(0, _MOST_NUMBER))


@dataclass(frozen=True, slots=True)
class KillCommand:
    """Close connections, which are meant as in a `KillRequest`, and tell how many in an `AnswerEvent` with the same
    number.
    """

    KIND: ClassVar = ("order", "kill")
    cookie: int | None = field(default=None, metadata=_limits(1, _MOST_COOKIE))
    network: str | None = None
    number: int = field(default=0, metadata=_limits(0, _MOST_NUMBER))


#: Those that a worker answers; `master.workers.Questions` gives each its number.
Query = PeersCommand | KillCommand

WorkerCommand = (
    DrainCommand | CloseCommand | LogCommand | ListenerCommand | CertificatesCommand | PeersCommand | KillCommand
)


# What a child tells the master


@dataclass(frozen=True, slots=True)
class ReadyEvent:
    """A worker serves."""

    KIND: ClassVar = ("event", "ready")


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """A child could not do what it was forked for; `details` are the lines below the reason, such as a traceback."""

    KIND: ClassVar = ("event", "failed")
    reason: str
    details: str = ""


@dataclass(frozen=True, slots=True)
class WornEvent:
    """A worker has served enough and should be replaced; why."""

    KIND: ClassVar = ("event", "worn")
    why: str


@dataclass(frozen=True, slots=True)
class CertificatesEvent:
    """What a worker's certificates say, at its beginning and when they are renewed.

    Attributes:
        place: which of the settings' listeners they are of.
        certificates: `file`, `names` and `expires` (seconds since the epoch) of each.
        number: of the renewal; 0: at its beginning.
        refusal: why they can't be renewed, and the former ones are kept; empty where they are.
    """

    KIND: ClassVar = ("event", "certificates")
    place: int = field(metadata=_limits(0, _MOST_NUMBER))
    certificates: list[dict[str, Any]]
    number: int = field(default=0, metadata=_limits(0, _MOST_NUMBER))
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class AnswerEvent:
    """What a worker found for the query with this number."""

    KIND: ClassVar = ("event", "answer")
    number: int = field(metadata=_limits(0, _MOST_NUMBER))
    found: object = None


@dataclass(frozen=True, slots=True)
class SettingsEvent:
    """A reload's helper has read the settings (`config.serialize`) and looked up the identity (`Identity.to_plain`)."""

    KIND: ClassVar = ("event", "settings")
    settings: dict[str, Any]
    identity: dict[str, Any]


@dataclass(frozen=True, slots=True)
class KeptEvent:
    """A reload's helper keeps a listener of the generation that serves.

    Attributes:
        place: of the listener in the settings, from 0 on.
        index: of the listener in the generation that serves, from 0 on.
    """

    KIND: ClassVar = ("event", "kept")
    place: int = field(metadata=_limits(0, _MOST_NUMBER))
    index: int = field(metadata=_limits(0, _MOST_NUMBER))


@dataclass(frozen=True, slots=True)
class BoundEvent:
    """A reload's helper has bound a listener. The descriptors of its sockets come with it.

    Attributes:
        place: of the listener in the settings, from 0 on.
        listener: as `BoundListener.describe`.
    """

    KIND: ClassVar = ("event", "bound")
    place: int = field(metadata=_limits(0, _MOST_NUMBER))
    listener: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DifferencesEvent:
    """A helper has found what a reload would change, a line each."""

    KIND: ClassVar = ("event", "differences")
    differences: list[str]


ChildEvent = (
    ReadyEvent
    | FailedEvent
    | WornEvent
    | CertificatesEvent
    | AnswerEvent
    | SettingsEvent
    | KeptEvent
    | BoundEvent
    | DifferencesEvent
)


# What a process that is started in the background tells its starter, once


@dataclass(frozen=True, slots=True)
class DaemonStarted:
    """Every worker of the daemon serves.

    Attributes:
        pid: the master's.
        workers: how many.
        addresses: where it listens.
        log: where it logs: a file, or `journal`.
    """

    KIND: ClassVar = ("launch", "daemon")
    pid: int
    workers: int
    addresses: list[str]
    log: str


@dataclass(frozen=True, slots=True)
class OnceReady:
    """The one client of single-connection mode can come.

    Attributes:
        state: what the process does at the address: `listening`, or `connecting` from there.
        address: where.
        pid: the process.
    """

    KIND: ClassVar = ("launch", "once")
    state: str
    address: str
    pid: int


@dataclass(frozen=True, slots=True)
class LaunchFailed:
    """The process could not come up, and ends with this exit status."""

    KIND: ClassVar = ("launch", "failed")
    reason: str
    details: str = ""
    status: int = field(default=1, metadata=_limits(0, 255))


LaunchMessage = DaemonStarted | OnceReady | LaunchFailed


# What the child of `forkd check` tells of each step, in order


@dataclass(frozen=True, slots=True)
class StepChecked:
    """A step was tried.

    Attributes:
        step: 0: becoming the workers' user; from 1 on: importing the handler of the listener with this number; then the
            hooks.
        reason: why it failed; empty where it did not.
        details: the lines below the reason, such as a traceback.
    """

    KIND: ClassVar = ("check", "step")
    step: int = field(metadata=_limits(0, _MOST_NUMBER))
    reason: str = ""
    details: str = ""


Message = Request | Reply | WorkerCommand | ChildEvent | LaunchMessage | StepChecked


# From a message to a line


def to_plain(message: Message) -> JsonObject:
    """The JSON object of a message. What is None is left out, as receivers of any version expect."""
    key, name = message.KIND
    values = ((each, getattr(message, each)) for each in _FIELDS[type(message)])
    return {key: name, **{each: value for each, value in values if value is not None}}


def encode(message: Message | JsonObject) -> bytes:
    """The bytes of a message, or of an object as it is, with the line feed. JSON escapes those inside it."""
    plain = message if isinstance(message, dict) else to_plain(message)
    return json.dumps(plain, separators=(",", ":")).encode() + b"\n"


# From a line to a message


def shorten(text: str, size: int) -> str:
    """The beginning of a text that is no more than so many bytes inside a message, where a letter may take twelve of
    them; in a form that can be printed in any encoding.
    """
    text = text[: size + 1].encode(errors="backslashreplace").decode()
    if len(json.dumps(text)) - 2 <= size:
        return text
    sizes = accumulate(len(json.dumps(letter)) - 2 for letter in text)
    return text[: sum(1 for _ in takewhile(lambda reached: reached <= size - 3, sizes))] + "..."


class JsonLines:
    """Bytes in any portions in, JSON objects out.

    Args:
        largest: bytes of a line at most.
    """

    __slots__ = ("_largest", "_rest")

    def __init__(self, largest: int = LARGEST) -> None:
        self._largest = largest
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[JsonObject]:
        """The objects that `data` completes.

        Raises:
            MalformedLine: a line is over `largest` bytes, or is no JSON object.
        """
        self._rest += data
        lines = list[bytearray]()
        if b"\n" in data:  # else what is here already would be looked through again with each portion
            *lines, self._rest = self._rest.split(b"\n")
        self._check_size(self._rest)
        return [self._parse(line) for line in lines]

    def _check_size(self, line: bytearray) -> None:
        if len(line) > self._largest:
            raise MalformedLine(f"a message of more than {self._largest} bytes")

    def _parse(self, line: bytearray) -> JsonObject:
        self._check_size(line)
        try:
            found = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise MalformedLine(f"not JSON: {error}") from None
        if not isinstance(found, dict):
            raise MalformedLine("not a JSON object")
        return found


def decode_request(found: JsonObject) -> Request:
    """What a client asks. Raises InvalidMessage."""
    return cast(Request, _decode("verb", found))


def decode_command(found: JsonObject) -> WorkerCommand:
    """What the master tells a worker. Raises InvalidMessage."""
    return cast(WorkerCommand, _decode("order", found))


def decode_event(found: JsonObject) -> ChildEvent:
    """What a child tells the master. Raises InvalidMessage."""
    return cast(ChildEvent, _decode("event", found))


def decode_launch(found: JsonObject) -> LaunchMessage:
    """What a process in the background tells its starter. Raises InvalidMessage."""
    return cast(LaunchMessage, _decode("launch", found))


def decode_check(found: JsonObject) -> StepChecked:
    """What the child of `forkd check` tells. Raises InvalidMessage."""
    return cast(StepChecked, _decode("check", found))


R = TypeVar("R")


def decode_reply(found: JsonObject, expected: type[R]) -> R | ErrorReply:
    """The reply to a request: the one that is expected, or the error instead. Raises InvalidMessage."""
    return cast(R | ErrorReply, _build(expected if found.get("ok") is True else ErrorReply, found))


def _decode(key: str, found: JsonObject) -> Any:
    name = found.get(key)
    if not isinstance(name, str):
        raise InvalidMessage(f"{key}: text is wanted")
    kind = _KINDS.get((key, name))
    if kind is None:
        raise InvalidMessage(f"unknown {key} {name[:60]!r:.70}")
    return _build(kind, found)


def _build(kind: type, found: JsonObject) -> Any:
    values: JsonObject = {}
    for name, form in _FIELDS[kind].items():
        if name in found:
            form.check(name, found[name])
            values[name] = found[name]
        elif form.required:
            raise InvalidMessage(f"{name}: {form.wanted} is wanted")
    return kind(**values)


@dataclass(frozen=True, slots=True)
class _Form:
    """What one field may hold.

    Attributes:
        wanted: what that is, for people.
        holds: whether a value is of the type.
        required: whether there is no default.
        optional: whether it may be None.
        limits: the least and the greatest number.
    """

    wanted: str
    holds: Callable[[Any], bool]
    required: bool
    optional: bool
    limits: tuple[int, int] | None

    def check(self, name: str, value: object) -> None:
        """Raises InvalidMessage for a value that is of another type, or beyond the limits."""
        if value is None and self.optional:
            return
        if not self.holds(value):
            raise InvalidMessage(f"{name}: {self.wanted} is wanted")
        if self.limits is not None and not self.limits[0] <= cast(int, value) <= self.limits[1]:
            raise InvalidMessage(f"{name}: {self.wanted} is wanted")


#: The types that a field may be declared with: what each is called, and whether a value is of it. True is no number.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: type(value) is int),
    "float": ("a number", lambda value: type(value) in (int, float) and abs(value) < inf),
    "str": ("text", lambda value: isinstance(value, str)),
    "object": ("a value", lambda value: True),
    "dict[str, Any]": ("an object", lambda value: isinstance(value, dict)),
    "list[str]": ("a list of text", lambda value: _is_list_of(str, value)),
    "list[dict[str, Any]]": ("a list of objects", lambda value: _is_list_of(dict, value)),
}


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _forms_of(kind: Any) -> dict[str, _Form]:
    """The form of each field of a class, by name."""
    found = {}
    for each in fields(kind):
        declared = str(each.type).removesuffix(" | None")
        wanted, holds = _TYPES[declared]
        limits = each.metadata.get("limits")
        if limits is not None:
            wanted += f" from {limits[0]} to {limits[1]}"
        found[each.name] = _Form(wanted, holds, each.default is MISSING, declared != each.type, limits)
    return found


_CLASSES: tuple[Any, ...] = Message.__args__
_FIELDS: dict[type, dict[str, _Form]] = {kind: _forms_of(kind) for kind in _CLASSES}
_KINDS: dict[tuple[str, object], type] = {kind.KIND: kind for kind in _CLASSES if kind.KIND[0] != "ok"}
