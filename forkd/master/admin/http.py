"""A client that asks by HTTP. h11 reads what it sends and frames what it is answered; what there is, `pages` knows.

GET and HEAD alone are answered, one request at a time: what comes before an answer is taken is not read. A head has
`MOST_HEAD` bytes at most; a request with a body, or with another one right behind it, is the last of its connection.
"""

from __future__ import annotations

import socket
import time
from http import HTTPStatus

import h11

from forkd.master.admin.client import Client, Phase
from forkd.master.admin.pages import Page, Pages

#: Bytes of a request's head.
MOST_HEAD = 8192

#: Seconds for a request to come once it has begun, and until it begins: Prometheus asks once a minute by default.
REQUEST_SECONDS = 5.0
IDLE_SECONDS = 75.0

_METHODS = (b"GET", b"HEAD")

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_FORBIDDEN = Page(HTTPStatus.FORBIDDEN, b"your address may not ask here (admin.allow)\n")
_WRONG_METHOD = Page(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD\n", headers=((b"Allow", b"GET, HEAD"),))


class HttpClient(Client):
    """Such a client.

    Args:
        sock: its connection, which does not block.
        pages: what there is.
        allowed: whether it may ask; else each answer says that it may not.
    """

    def __init__(self, sock: socket.socket, pages: Pages, *, allowed: bool) -> None:
        super().__init__(sock)
        self._pages, self._allowed = pages, allowed
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_HEAD)
        self._request: h11.Request | None = None
        # As long as it has not asked once it has no more time than for that.
        self.deadline, self.idle = time.monotonic() + REQUEST_SECONDS, True

    def receive(self, data: bytes) -> bool:
        """Takes what it has sent; whether the connection goes on."""
        if self.idle and data:
            self.idle, self.deadline = False, time.monotonic() + REQUEST_SECONDS
        try:
            self._http.receive_data(data)
            return self._advance()
        except h11.RemoteProtocolError as error:
            if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                return False
            return self._answer(Page(HTTPStatus(error.error_status_hint), b"this is no request of HTTP/1.1\n"))

    def sent(self) -> None:
        """Waits for its next request."""
        self._http.start_next_cycle()
        self._request = None
        self.phase, self.idle, self.deadline = Phase.READING, True, time.monotonic() + IDLE_SECONDS

    def _advance(self) -> bool:
        """Answers if the head of a request is there. Raises h11.RemoteProtocolError."""
        event = self._http.next_event()
        if event is h11.NEED_DATA:
            return True
        if not isinstance(event, h11.Request):
            return False
        self._request = event
        if not self._allowed:
            return self._answer(_FORBIDDEN)
        if event.method not in _METHODS:
            return self._answer(_WRONG_METHOD)
        accept = b", ".join(value for name, value in event.headers if name == b"accept")
        return self._answer(self._pages.find(event.target, accept.decode("latin-1")))

    def _answer(self, page: Page) -> bool:
        """Sends a page; whether the connection goes on."""
        last = self._request is None or not self._is_whole()
        headers = [
            (b"Date", _date(time.time())),
            (b"Content-Type", page.content_type.encode()),
            (b"Content-Length", str(len(page.body)).encode()),
            (b"Cache-Control", b"no-store"),
            (b"X-Content-Type-Options", b"nosniff"),
            *page.headers,
        ]
        if last:
            headers.append((b"Connection", b"close"))
        head = h11.Response(status_code=page.status, reason=page.status.phrase.encode(), headers=headers)
        data = self._http.send(head) or b""
        if self._request is None or self._request.method != b"HEAD":
            data += self._http.send(h11.Data(page.body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        return self.send(data, last=last or self._http.our_state is not h11.DONE)

    def _is_whole(self) -> bool:
        """Whether the request has come to its end, and nothing behind it."""
        try:
            return self._http.next_event() == h11.EndOfMessage() and not self._http.trailing_data[0]
        except h11.RemoteProtocolError:
            return False


def _date(seconds: float) -> bytes:
    """A time as HTTP has it (RFC 9110, section 5.6.7)."""
    year, month, day, hour, minute, second, weekday, *_ = time.gmtime(seconds)
    date = f"{_DAYS[weekday]}, {day:02} {_MONTHS[month - 1]} {year}"
    return f"{date} {hour:02}:{minute:02}:{second:02} GMT".encode()
