"""The certificates of a generation's listeners: what they say, and their renewal when their files change.

The master reads the files, but what is in them it leaves to the workers: they load it, and tell what the certificates
say or why they are of no use (`CertificatesEvent`). When a file has changed, what it holds is tried: every worker gets
it, and the first answer decides. What is refused is as if it had never been: workers that begin later get what the
others have. A certificate and its key may be written one after the other, so a refusal is told only when the files stay
as they are. No worker's connections notice any of this.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forkd.config.listener import Listener, Tls
from forkd.messages import CertificatesEvent, shorten
from forkd.system.tls_files import Contents, expiry_warning, files_of, read_files, signature_of

#: Seconds for which files stay as they are before it is told that they are of no use.
PATIENCE = 2.0

_DAY = 86_400

#: Seconds that workers have to load what is tried.
_ANSWER_SECONDS = 10.0

# What is kept of a worker's claim: certificates of a listener, names of one, bytes of a text.
_MOST_CERTIFICATES, _MOST_NAMES, _LONGEST = 1000, 1000, 300

#: The last end that a certificate can have (RFC 5280, section 4.1.2.5): 9999-12-31T23:59:59Z.
_LATEST = 253_402_300_799


@dataclass(frozen=True, slots=True)
class Renewal:
    """Files have changed: the workers are to try what is in them.

    Attributes:
        place: of the listener, in the settings.
        number: what the answers name.
        contents: what is in all of its files.
    """

    place: int
    number: int
    contents: Contents


@dataclass(frozen=True, slots=True)
class Refused:
    """What was tried is of no use, and the files have not changed since."""

    place: int
    reason: str


@dataclass(slots=True)
class _Files:
    """Those of one listener, or of several with the same settings."""

    place: int
    tls: Tls
    held: Contents
    seen: tuple[object, ...]
    told: list[dict[str, Any]] = field(default_factory=list)
    number: int = 0
    tried: Contents | None = None
    tried_at: float = 0.0
    refusal: str = ""  # not told yet
    refused_at: float = 0.0


class Certificates:
    """Those of one generation.

    Args:
        listeners: its settings'.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._files: dict[Tls, _Files] = {}
        self._by_place: dict[int, _Files] = {}
        for place, listener in enumerate(listeners):
            if (tls := listener.tls).cert is None:
                continue
            if tls not in self._files:
                seen, held = signature_of(files_of(tls)), dict[str, bytes]()
                for file in files_of(tls):
                    with contextlib.suppress(OSError):  # the workers will say so
                        held |= read_files([file])
                self._files[tls] = _Files(place, tls, held, seen)
            self._by_place[place] = self._files[tls]

    @property
    def contents(self) -> dict[str, bytes]:
        """What a worker that begins now is to load."""
        return {path: data for one in self._files.values() for path, data in one.held.items()}

    def told_of(self, place: int) -> list[dict[str, Any]]:
        """What a listener's certificates say, as far as it is known: `file`, `names` and `expires`."""
        return self._by_place[place].told if place in self._by_place else []

    def ask_again(self) -> None:
        """Has all files tried, as if they had changed: what the workers have is not known here."""
        for one in self._files.values():
            one.seen, one.held = (), {}

    def look(self, now: float) -> Iterator[Renewal | Refused]:
        """Looks whether files have changed since the last time.

        Args:
            now: on the monotonic clock.
        """
        for one in self._files.values():
            files = files_of(one.tls)
            if (seen := signature_of(files)) != one.seen:
                try:
                    found = read_files(files)
                except OSError as error:
                    one.seen = seen
                    one.refusal, one.refused_at = f"{error.filename}: {error.strerror}", now
                    continue
                if signature_of(files) != seen:
                    continue  # it is just being written
                one.seen, one.refusal, one.tried = seen, "", None
                if found != one.held:
                    one.number += 1
                    one.tried, one.tried_at = found, now
                    yield Renewal(one.place, one.number, found)
            elif one.tried is not None and now >= one.tried_at + _ANSWER_SECONDS:
                one.seen = ()  # there was no worker to answer: once more
            elif one.refusal and now >= one.refused_at + PATIENCE:
                reason, one.refusal = one.refusal, ""
                yield Refused(one.place, reason)

    def forgo(self, renewal: Renewal) -> None:
        """The workers can't renew them; those that begin later are to have the same."""
        self._by_place[renewal.place].tried = None

    def take_event(self, event: CertificatesEvent, now: float) -> float | None:
        """Notes what a worker tells.

        Returns:
            Since when what it tells of was tried, where it was the first to take it; workers that were forked since
            then have what was before. None: nothing is new.
        """
        one = self._by_place.get(event.place)
        if one is None:
            return None
        if event.number == 0:
            one.told = one.told or list(_checked(event.certificates))
            return None
        if event.number != one.number or one.tried is None:
            return None
        tried, one.tried = one.tried, None
        if event.refusal:
            one.refusal, one.refused_at = shorten(event.refusal, 2000), now
            return None
        one.told, one.held = list(_checked(event.certificates)), tried
        return one.tried_at

    def expiring(self, now: float) -> Iterator[tuple[int, str, str]]:
        """The certificates that end soon, or have ended: of which listener, the file, and a sentence.

        Args:
            now: since the epoch.
        """
        for one in self._files.values():
            for certificate in one.told:
                file = certificate["file"]
                if warning := expiry_warning(file, certificate["expires"] - now):
                    yield one.place, file, warning


def due_warnings(certificates: Certificates, warned: dict[str, float], now: float) -> Iterator[tuple[int, str]]:
    """What is to be warned of now, of each certificate once a day at most: of which listener, and a sentence.

    Args:
        certificates: those of the generation that serves.
        warned: by file, when it was last warned of; this notes it there.
        now: since the epoch, as those.
    """
    for place, file, warning in certificates.expiring(now):
        if not 0 <= now - warned.get(file, 0.0) < _DAY:
            warned[file] = now
            yield place, warning


def _checked(claims: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What a worker claims of its certificates, as far as it is of the right form."""
    for one in claims[:_MOST_CERTIFICATES]:
        match one:
            case {"file": str(file), "names": list(names), "expires": float() | int() as expires} if (
                abs(expires) <= _LATEST
            ):
                texts = [shorten(name, _LONGEST) for name in names[:_MOST_NAMES] if isinstance(name, str)]
                yield {"file": shorten(os.fspath(file), 4096), "names": texts, "expires": float(expires)}
