"""Misbehaviour on demand: what a network, a busy Hub or a malicious one does to a client."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Optional


@dataclass
class Fault:
    """What to do with the next requests that match, in place of (or besides) the right answer.

    Attributes:
        file: the end of the path that it applies to, for example ``model.safetensors``; "" for every request.
        method: ``GET``, ``HEAD``, ``POST`` or ``PUT``; "" for any.
        times: how many requests it spoils; -1 for all.
        status: answer with this status and nothing else.
        headers: of that answer, for example ``{"Retry-After": "1"}``.
        cut_after: bytes of the body after which the connection is closed.
        content: a body in place of the right one, announced with the right hash.
        stall: seconds of silence before the answer.
    """

    file: str = ""
    method: str = ""
    times: int = 1
    status: Optional[int] = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: Optional[int] = None
    content: Optional[bytes] = None
    stall: float = 0.0

    def takes(self, method: str, path: str) -> bool:
        """Whether this request is to be spoiled; if so it counts."""
        if self.times == 0 or self.method not in ("", method) or not path.endswith(self.file):
            return False
        self.times -= 1
        return True
