"""An SMTP server made of aiosmtpd's protocol, which keeps each message in a file of its own."""

from __future__ import annotations

import ssl
from pathlib import Path

from aiosmtpd.smtp import SMTP, Envelope, Session


class Mailbox:
    """What aiosmtpd calls for each message.

    Args:
        directory: where messages are kept.
    """

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        """Keeps a message; its file says by its name whether it came encrypted."""
        assert isinstance(envelope.content, bytes)
        number = len([*self._directory.iterdir()])
        (self._directory / f"{number}.{'tls' if session.ssl else 'plain'}").write_bytes(envelope.content)
        return "250 kept"


def smtp(directory: str, cert: str = "", key: str = "") -> SMTP:
    """A protocol for one client, with STARTTLS where there is a certificate."""
    context = None
    if cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
    return SMTP(Mailbox(directory), hostname="mail.example", tls_context=context)
