"""Certificates of the tests' own, made by openssl: an authority, and what it has signed."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

from tests.support.needs import needs_program


class Authority:
    """An authority in a directory of the test's.

    Attributes:
        cert: its own certificate.
    """

    def __init__(self, directory: Path, name: str = "authority") -> None:
        needs_program("openssl")
        self._directory = directory
        self._key = directory / f"{name}.key"
        self.cert = directory / f"{name}.pem"
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        self._openssl(
            "req", "-x509", *_NEW_KEY, *usage, "-keyout", self._key, "-out", self.cert, "-subj", f"/CN={name}"
        )

    def trusted(self) -> ssl.SSLContext:
        """What a client has that trusts it."""
        return ssl.create_default_context(cafile=self.cert)

    def issue(self, name: str, *hosts: str, days: float = 30) -> tuple[Path, Path]:
        """The files of a new certificate for these hosts, and of its key."""
        cert, key, request = (self._directory / f"{name}.{end}" for end in ("crt", "key", "csr"))
        self._openssl("req", *_NEW_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        extensions = self._directory / f"{name}.ext"
        names = ",".join(f"DNS:{host}" for host in hosts or (name,))
        # With less than this Python 3.13 does not verify it (RFC 5280, section 4.2.1).
        extensions.write_text(f"subjectAltName={names}\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n")
        self._openssl(
            *("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial"),
            *("-days", days, "-extfile", extensions, "-out", cert),
        )
        return cert, key

    def _openssl(self, *arguments: object) -> None:
        done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
