"""Certificates of the server, and of the clients that it lets in."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilevel.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Files in PEM.

    Attributes:
        certificate: of the server, with those that signed it.
        key: of it, without a password.
        client_ca: that signed the clients' certificates, which are then demanded (mTLS); None lets every client in.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """For REST; raises ConfigError where a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError, ValueError) as error:
            files = ", ".join(str(file) for file in (self.certificate, self.key, self.client_ca) if file)
            raise ConfigError(
                f"TLS: {files} cannot be used ({error}); give files in PEM that belong together."
            ) from error
        return context

    def credentials(self) -> Any:
        """For gRPC; raises ConfigError where a file cannot be used."""
        import grpc  # type: ignore[import-untyped]

        # gRPC says nothing of files that do not fit until a client comes
        self.context()
        authority = self.client_ca.read_bytes() if self.client_ca else None
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)


def _no_password() -> str:
    # without this OpenSSL asks at the terminal, and the server hangs
    raise ConfigError("TLS: the key has a password; give one without, in a file that the server alone may read.")
