"""The audit of served answers: which rows are compared with the full path, what came of it, and its state on disk."""

from __future__ import annotations

import asyncio
import copy
import secrets
from pathlib import Path
from typing import final

from trilevel.artifact.audited import alarm_of, open_audit
from trilevel.routing.certificate import Certificate

_MOST_AT_ONCE = 64


@final
class Shadow:
    """An audit and the rows that it waits for.

    Args:
        certificate: whose promise is watched.
        state: file of the audit, which goes on if it is there; None keeps it in memory.
        share: of the rows that are compared, in (0, 1].

    Raises:
        ConfigError: the certificate promises how good answers are, which a difference does not tell.
        CertificateError: the state is damaged, or of another certificate.
    """

    def __init__(self, certificate: Certificate, state: Path | None, share: float) -> None:
        # clients choose the ids of their requests, and must not choose which are compared
        self.audit = open_audit(certificate, state, shadow_share=share, salt=secrets.token_hex(16))
        self._state = state
        self._num_saved = -1
        self.num_waiting = 0

    def wants(self, request_id: str, row: int) -> bool:
        """Whether a row is compared; decided before anything is known of it."""
        is_free = self.num_waiting < _MOST_AT_ONCE
        return is_free and not self.audit.is_alarmed and self.audit.wants_shadow(f"{request_id}/{row}")

    @property
    def alarm(self) -> str:
        """What the audit found, if that is an alarm; else empty."""
        return alarm_of(self.audit) if self.audit.is_alarmed else ""

    async def save(self) -> None:
        """Write the state, if it is kept and has changed."""
        if self._state is None or self._num_saved == self.audit.samples:
            return
        self._num_saved = self.audit.samples
        # a copy, because the audit goes on meanwhile
        await asyncio.to_thread(copy.deepcopy(self.audit).save, self._state)
