"""Every message that crosses a process: what it is called on the wire, and what belongs to it.

A message is a class of `Message`, and on the wire one line with a JSON object. `encode` makes the line; `JsonLines`
cuts what a socket delivers into objects; `decode_request`, `decode_command`, `decode_event`, `decode_reply`,
`decode_launch` and `decode_check` make a message of an object, or raise `InvalidMessage`, and nothing else: the sender
may be a stranger or a worker that has been taken over. What a field may hold is read off its declaration. Fields that a
class does not have are passed over, since the sender may be of another version; for the same reason names, once given,
are kept. The sockets are in `system.channel` and `master.control_socket`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate, takewhile
from math import inf
from typing import Any, ClassVar, NamedTuple, NoReturn, Self, TypeVar, cast, dataclass_transform

from forkd import MOST_WORKERS

JsonObject = dict[str, Any]

#: Bytes of one message at most. A traceback fits; a flood does not.
LARGEST = 1 << 20

#: Bytes of one reply of the control socket at most, which only the master sends.
LARGEST_REPLY = 1 << 26

_MISSING = object()  # for the default of a field that has none


class MalformedLine(ValueError):
    """A line is too long, or no JSON object; the connection that it came on is of no more use."""


class InvalidMessage(ValueError):
    """A JSON object is no message of the kind that was expected; the sentence says why, in at most 200 characters."""


@dataclass_transform(frozen_default=True)
class Message:
    """What every message is: its fields are declared, made and compared as those of a frozen dataclass.

    A dataclass compiles half a dozen functions for each class, which for all messages takes longer than most commands
    need for the rest. Here all classes share them.
    """

    #: The key by which the kind is told on the wire, and what it says there.
    KIND: ClassVar[tuple[str, object]]

    _defaults: ClassVar[dict[str, object]] = {}

    def __init_subclass__(cls) -> None:
        names = [name for name, kind in cls.__annotations__.items() if not kind.startswith("ClassVar")]
        cls._defaults = {name: cls.__dict__.get(name, _MISSING) for name in names}
        cls.__match_args__ = tuple(names)  # type: ignore[attr-defined, misc]

    def __init__(self, *given: object, **named: object) -> None:
        defaults = self._defaults
        values = {**defaults, **dict(zip(defaults, given, strict=False)), **named}
        wrong = [name for name, value in values.items() if value is _MISSING or name not in defaults]
        if wrong or len(given) > len(defaults) or not named.keys().isdisjoint([*defaults][: len(given)]):
            raise TypeError(f"{type(self).__name__} takes {', '.join(defaults) or 'nothing'}")
        vars(self).update(values)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is not to be changed: {name}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def replace(self, **changed: object) -> Self:
        """The same with other values of these fields."""
        return type(self)(**{**vars(self), **changed})


# The types of fields, beside the plain ones; what each may hold is in `_TYPES`

Number = int
WorkerCount = int
ExitStatus = int
Cookie = int  # of the kernel (SO_COOKIE of socket(7))


# What the control socket is asked


class StatusRequest(Message):
    """Tell the state of the daemon; answered by `StatusReply`."""

    KIND = ("verb", "status")


class StopRequest(Message):
    """Stop: answered by `AcceptedReply` at once and by `DoneReply` when all is over.

    Attributes:
        now: do not wait for clients.
        succeeded: another master has taken over the name and the addresses.
    """

    KIND = ("verb", "stop")
    now: bool = False
    succeeded: bool = False


class ReloadRequest(Message):
    """Reload: answered by `AcceptedReply` at once and by `ChangedReply` when the new generation serves."""

    KIND = ("verb", "reload")


class UpgradeRequest(Message):
    """Upgrade: answered as a `ReloadRequest`."""

    KIND = ("verb", "upgrade")


class DiffRequest(Message):
    """Tell what a reload would change: answered by `AcceptedReply` at once and by `DifferencesReply`."""

    KIND = ("verb", "diff")


class HandOverRequest(Message):
    """Lend the lock and the listeners to a new master: answered by `HandOverReply` and their descriptors."""

    KIND = ("verb", "hand over")


class ScaleRequest(Message):
    """Have so many workers: answered by `ScaledReply` when they serve."""

    KIND = ("verb", "scale")
    workers: WorkerCount


class DrainRequest(Message):
    """Have balancers told that they should send no more clients: answered by `DoneReply`."""

    KIND = ("verb", "drain")


class ResumeRequest(Message):
    """Undo a `DrainRequest`: answered by `DoneReply`."""

    KIND = ("verb", "resume")


class ClientsRequest(Message):
    """Tell where the clients' connections are to be found: answered by `ClientsReply`."""

    KIND = ("verb", "clients")


class PeersRequest(Message):
    """Tell the recent peers of datagram sockets: answered by `PeersReply`."""

    KIND = ("verb", "peers")


class KillRequest(Message):
    """Close connections: answered by `KilledReply`.

    Attributes:
        cookie: the kernel's number of the one connection that is meant (SO_COOKIE of socket(7)); or
        network: of the clients that are meant.
    """

    KIND = ("verb", "kill")
    cookie: Cookie | None = None
    network: str | None = None


Request = (
    StatusRequest | StopRequest | ReloadRequest | UpgradeRequest | DiffRequest | HandOverRequest | ScaleRequest
    | DrainRequest | ResumeRequest | ClientsRequest | PeersRequest | KillRequest
)  # fmt: skip


# What the control socket answers


class ErrorReply(Message):
    """A request failed; `details` are the lines below the sentence, such as a traceback."""

    KIND = ("ok", False)
    error: str
    details: str = ""


class DoneReply(Message):
    """What was asked for is done."""

    KIND = ("ok", True)


class AcceptedReply(Message):
    """The request is being carried out: the outcome is the next reply, within so many seconds."""

    KIND = ("ok", True)
    within: float


class StatusReply(Message):
    """The state of the daemon, as `forkd status --json` prints it."""

    KIND = ("ok", True)
    status: dict[str, Any]


class ChangedReply(Message):
    """A reload or upgrade is done: this generation serves, with so many workers."""

    KIND = ("ok", True)
    generation: int
    workers: int


class DifferencesReply(Message):
    """What a reload would change, a line each."""

    KIND = ("ok", True)
    differences: list[str]


class HandOverReply(Message):
    """The listeners that are lent, each as `BoundListener.describe`. Descriptors come with it: the lock's, then those
    of the listeners' sockets in order.
    """

    KIND = ("ok", True)
    listeners: list[dict[str, Any]]


class ScaledReply(Message):
    """So many workers serve."""

    KIND = ("ok", True)
    workers: int


class ClientsReply(Message):
    """Where the clients' connections are to be found. A descriptor of the regions' memory comes with it, if there is
    one.

    Attributes:
        pid: the master's.
        workers: of each its slot, pid and row.
        listeners: of each stream listener its address and where its sockets listen (`BoundListener.endpoints`).
        datagrams: the addresses of the datagram listeners.
        region_size: bytes of a worker's region; 0: of another version, which lays it out otherwise.
    """

    KIND = ("ok", True)
    pid: int
    workers: list[dict[str, Any]]
    listeners: list[dict[str, Any]]
    datagrams: list[str]
    region_size: int = 0


class PeersReply(Message):
    """The recent peers of datagram sockets, and which workers did not answer (slot and pid)."""

    KIND = ("ok", True)
    peers: list[dict[str, Any]]
    silent: list[dict[str, Any]]


class KilledReply(Message):
    """How many connections were closed, and which workers did not answer (slot and pid)."""

    KIND = ("ok", True)
    closed: int
    silent: list[dict[str, Any]]


Reply = (
    ErrorReply | DoneReply | AcceptedReply | StatusReply | ChangedReply | DifferencesReply | HandOverReply | ScaledReply
    | ClientsReply | PeersReply | KilledReply
)  # fmt: skip


# What the master tells a worker


class DrainCommand(Message):
    """As the signal `signals.DRAIN`, which a handler's code may have taken."""

    KIND = ("order", "drain")


class CloseCommand(Message):
    """As the signal `signals.CLOSE`."""

    KIND = ("order", "close")


class LogCommand(Message):
    """Log to the descriptor that comes with this."""

    KIND = ("order", "log")


class ListenerCommand(Message):
    """Serve the socket that comes with this in the place of a listener's own, which no client reaches any more.

    Attributes:
        place: which of the settings' listeners it is.
    """

    KIND = ("order", "listener")
    place: Number = 0


class CertificatesCommand(Message):
    """Load a listener's certificates from what comes with this (`system.tls_files`), and tell of them in a
    `CertificatesEvent` with the same number.

    Attributes:
        place: which of the settings' listeners it is; those with the same settings of TLS are meant too.
        number: of the renewal.
    """

    KIND = ("order", "certificates")
    place: Number = 0
    number: Number = 0


class PeersCommand(Message):
    """Tell the recent peers of datagram sockets, in an `AnswerEvent` with the same number."""

    KIND = ("order", "peers")
    number: Number = 0


class KillCommand(Message):
    """Close connections, which are meant as in a `KillRequest`, and tell how many in an `AnswerEvent` with the same
    number.
    """

    KIND = ("order", "kill")
    cookie: Cookie | None = None
    network: str | None = None
    number: Number = 0


#: Those that a worker answers; `master.workers.Questions` gives each its number.
Query = PeersCommand | KillCommand

WorkerCommand = (
    DrainCommand | CloseCommand | LogCommand | ListenerCommand | CertificatesCommand | PeersCommand | KillCommand
)


# What a child tells the master


class ReadyEvent(Message):
    """A worker serves."""

    KIND = ("event", "ready")


class FailedEvent(Message):
    """A child could not do what it was forked for; `details` are the lines below the reason, such as a traceback."""

    KIND = ("event", "failed")
    reason: str
    details: str = ""


class WornEvent(Message):
    """A worker has served enough and should be replaced; why."""

    KIND = ("event", "worn")
    why: str


class DrainingEvent(Message):
    """A worker that was told to drain takes no more clients from now on."""

    KIND = ("event", "draining")


class CertificatesEvent(Message):
    """What a worker's certificates say, at its beginning and when they are renewed.

    Attributes:
        place: which of the settings' listeners they are of.
        certificates: `file`, `names` and `expires` (seconds since the epoch) of each.
        number: of the renewal; 0: at its beginning.
        refusal: why they can't be renewed, and the former ones are kept; empty where they are.
    """

    KIND = ("event", "certificates")
    place: Number
    certificates: list[dict[str, Any]]
    number: Number = 0
    refusal: str = ""


class AnswerEvent(Message):
    """What a worker found for the query with this number."""

    KIND = ("event", "answer")
    number: Number
    found: object = None


class SettingsEvent(Message):
    """A reload's helper has read the settings (`config.serialize`) and looked up the identity (`Identity.to_plain`)."""

    KIND = ("event", "settings")
    settings: dict[str, Any]
    identity: dict[str, Any]


class KeptEvent(Message):
    """A reload's helper keeps a listener of the generation that serves.

    Attributes:
        place: of the listener in the settings, from 0 on.
        index: of the listener in the generation that serves, from 0 on.
    """

    KIND = ("event", "kept")
    place: Number
    index: Number


class BoundEvent(Message):
    """A reload's helper has bound a listener. The descriptors of its sockets come with it.

    Attributes:
        place: of the listener in the settings, from 0 on.
        listener: as `BoundListener.describe`.
    """

    KIND = ("event", "bound")
    place: Number
    listener: dict[str, Any]


class DifferencesEvent(Message):
    """A helper has found what a reload would change, a line each."""

    KIND = ("event", "differences")
    differences: list[str]


ChildEvent = (
    ReadyEvent
    | FailedEvent
    | WornEvent
    | DrainingEvent
    | CertificatesEvent
    | AnswerEvent
    | SettingsEvent
    | KeptEvent
    | BoundEvent
    | DifferencesEvent
)


# What a process that is started in the background tells its starter, once


class DaemonStarted(Message):
    """Every worker of the daemon serves.

    Attributes:
        pid: the master's.
        workers: how many.
        addresses: where it listens.
        log: where it logs: a file, or `journal`.
    """

    KIND = ("launch", "daemon")
    pid: int
    workers: int
    addresses: list[str]
    log: str


class OnceReady(Message):
    """The one client of single-connection mode can come.

    Attributes:
        state: what the process does at the address: `listening`, or `connecting` from there.
        address: where.
        pid: the process.
    """

    KIND = ("launch", "once")
    state: str
    address: str
    pid: int


class LaunchFailed(Message):
    """The process could not come up, and ends with this exit status."""

    KIND = ("launch", "failed")
    reason: str
    details: str = ""
    status: ExitStatus = 1


LaunchMessage = DaemonStarted | OnceReady | LaunchFailed


# What the child of `forkd check` tells of each step, in order


class StepChecked(Message):
    """A step was tried.

    Attributes:
        step: 0: becoming the workers' user; from 1 on: importing the handler of the listener with this number; then the
            hooks.
        reason: why it failed; empty where it did not.
        details: the lines below the reason, such as a traceback.
    """

    KIND = ("check", "step")
    step: Number
    reason: str = ""
    details: str = ""


# From a message to a line


def to_plain(message: Message) -> JsonObject:
    """The JSON object of a message. What is None is left out, as receivers of any version expect."""
    key, name = message.KIND
    return {key: name, **{each: value for each, value in vars(message).items() if value is not None}}


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
    for name, form in _FORMS[kind].items():
        if name in found:
            form.check(name, found[name])
            values[name] = found[name]
        elif form.required:
            raise InvalidMessage(f"{name}: {form.wanted} is wanted")
    return kind(**values)


class _Form(NamedTuple):
    """What one field may hold.

    Attributes:
        wanted: what that is, for people.
        holds: whether a value is of the type.
        required: whether there is no default.
        optional: whether it may be None.
    """

    wanted: str
    holds: Callable[[Any], bool]
    required: bool
    optional: bool

    def check(self, name: str, value: object) -> None:
        """Raises InvalidMessage for a value that is of another type, or beyond the limits."""
        if not (self.holds(value) or (value is None and self.optional)):
            raise InvalidMessage(f"{name}: {self.wanted} is wanted")


def _within(least: int, most: int) -> tuple[str, Callable[[Any], bool]]:
    """What a whole number between these limits is called, and whether a value is one. True is no number."""
    return f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


#: The types that a field may be declared with: what each is called, and whether a value is of it. True is no number.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: type(value) is int),
    "Number": _within(0, (1 << 63) - 1),
    "WorkerCount": _within(1, MOST_WORKERS),
    "ExitStatus": _within(0, 255),
    "Cookie": _within(1, (1 << 64) - 1),
    "float": ("a number", lambda value: type(value) in (int, float) and abs(value) < inf),
    "str": ("text", lambda value: isinstance(value, str)),
    "object": ("a value", lambda value: True),
    "dict[str, Any]": ("an object", lambda value: isinstance(value, dict)),
    "list[str]": ("a list of text", lambda value: _is_list_of(str, value)),
    "list[dict[str, Any]]": ("a list of objects", lambda value: _is_list_of(dict, value)),
}


def _forms_of(kind: type[Message]) -> dict[str, _Form]:
    """The form of each field of a class, by name."""
    found = {}
    for name, default in kind._defaults.items():
        declared = kind.__annotations__[name]
        wanted, holds = _TYPES[declared.removesuffix(" | None")]
        found[name] = _Form(wanted, holds, default is _MISSING, declared.endswith(" | None"))
    return found


_FORMS = {kind: _forms_of(kind) for kind in Message.__subclasses__()}
_KINDS = {kind.KIND: kind for kind in _FORMS if kind.KIND[0] != "ok"}
