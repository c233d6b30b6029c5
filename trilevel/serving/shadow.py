"""The audit of served answers: which rows are compared with the full path, what came of it, and its state on disk."""

from __future__ import annotations

import asyncio
import copy
import secrets
from dataclasses import replace
from pathlib import Path
from typing import final

from trilevel.artifact.audited import watched
from trilevel.errors import ConfigError
from trilevel.routing.audit import Audit, AuditConfig
from trilevel.routing.certificate import SEAL, Certificate
from trilevel.routing.targets import parse_target

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
        if any(parse_target(proof.target).kind in ("bounded", "drop") for proof in certificate.proofs):
            raise ConfigError("an audit watches answers that differ, and this certificate promises how good they are.")
        seal = str(certificate.to_dict()[SEAL])
        if state is not None and state.exists():
            self.audit = Audit.load(state, certificate=seal)
        else:
            config = AuditConfig(alpha=watched(certificate), certificate=seal, shadow_share=share)
            # clients choose the ids of their requests, and must not choose which are compared
            self.audit = Audit(replace(config, salt=secrets.token_hex(16)))
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
        if not self.audit.is_alarmed:
            return ""
        return (
            f"the audit found {self.audit.mean:.1%} of {self.audit.samples:,} answers changed where "
            f"{self.audit.config.alpha:.1%} is allowed, so every input takes the full path"
        )

    async def save(self) -> None:
        """Write the state, if it is kept and has changed."""
        if self._state is None or self._num_saved == self.audit.samples:
            return
        self._num_saved = self.audit.samples
        # a copy, because the audit goes on meanwhile
        await asyncio.to_thread(copy.deepcopy(self.audit).save, self._state)
