"""Everything that can go wrong, each kind with the exit code that the command ends with.

Messages are for people: what happened, the value at fault, the way out. Programs look at the class, and at ``code`` where the
service gave one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast


class SlimtrimError(Exception):
    """The base of all errors of this package."""

    exit_code: ClassVar[int] = 2


class BadInput(SlimtrimError):
    """Something that was given to the client cannot be used; nothing was sent."""


class Unreachable(SlimtrimError):
    """No answer came, however often it was tried."""

    exit_code = 4


class UnexpectedAnswer(SlimtrimError):
    """What answered is not a slimtrim service, or one that is not understood."""

    exit_code = 4


class TookTooLong(SlimtrimError):
    """The job was not over in the time that the caller gave; it goes on."""

    exit_code = 4


class Problem(SlimtrimError):
    """The service said no, and why (RFC 9457)."""

    def __init__(self, asked: str, status: int, document: Mapping[str, Any]) -> None:
        self.status = status
        self.document = dict(document)
        """The whole answer, fields that only some codes have among them."""
        self.code = str(document.get("code") or f"http_{status}")
        self.detail = str(document.get("detail") or document.get("title") or f"answered {status}")
        self.faults = [_fault(each) for each in cast("list[Any]", document.get("errors") or [])]
        """Each fault in the request: where, and what."""
        super().__init__("\n".join([f"{asked}: {self.code}: {self.detail}", *self._other_faults()]))

    @property
    def retryable(self) -> bool:
        """Whether the service said that the same request may succeed later."""
        return self.document.get("retryable") is True

    def _other_faults(self) -> list[str]:
        """Return the faults that the detail does not tell already."""
        lines = [f"{where}: {what}" for where, what in self.faults]
        return [f"  {line}" for line in lines if line != self.detail]


class Refused(Problem):
    """The request cannot succeed as it is (4xx)."""


class Unavailable(Problem):
    """The service cannot do it now (429, 5xx), also after some tries."""

    exit_code = 4


class JobFailed(SlimtrimError):
    """The job ended without an artifact."""

    exit_code = 1


class JobStopped(SlimtrimError):
    """The job was cancelled, or waited too long for a worker."""

    exit_code = 3


class RetentionTooLow(SlimtrimError):
    """The artifact keeps less of the model's quality than was asked for."""

    exit_code = 5


class Damaged(SlimtrimError):
    """A file did not arrive as the manifest says."""

    exit_code = 6


class UnsafeManifest(Damaged):
    """The manifest names a file that must not be written where it says."""


class CannotWrite(SlimtrimError):
    """The folder does not take the files."""

    exit_code = 7


class DiskFull(CannotWrite):
    """There is no room for the files."""


def _fault(each: Any) -> tuple[str, str]:
    fault: Mapping[str, Any] = cast("Mapping[str, Any]", each) if isinstance(each, Mapping) else dict[str, Any]()
    where = fault.get("pointer") or fault.get("parameter") or "/"
    return str(where), str(fault.get("detail") or fault.get("code") or "is wrong")
