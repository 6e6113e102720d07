"""Keeps what a run finishes while it goes on, and brings back what earlier attempts finished.

The child says which files make up a part and asks for the parts of a fingerprint (``worker.child``); a thread here stores and
fetches them one by one, so that neither computing nor the wish to cancel waits for a transfer. A part counts once its row is
written, under the fence. Storage that does not answer is asked again as long as the attempt lives: computing goes on meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from compression.errors import SlimtrimError
from jobs.attempts import Claim
from jobs.blocks import StoredFile, prefix_of
from jobs.database import reading
from jobs.logs import Fields
from jobs.storage import Storage, open_storage
from worker.faults import as_ours
from worker.leash import Interruption, Leash
from worker.room import Room

Line = dict[str, Any]
Reply = Callable[[Line], None]
_SETTLE_S: dict[Interruption | None, float] = {Interruption.LOST: 0.0, Interruption.CANCEL: 2.0, Interruption.DRAIN: 8.0}
_SETTLE_ELSE_S = 20.0
"""Seconds that what is finished has to be stored once the attempt has ended early, by why it did."""
_RETRY_S = 2.0
_BLOCK = "block-"


class BlockKeeper:
    """One attempt's finished parts; a context that ends when all of them are stored, or must not be any more."""

    def __init__(
        self, room: Room, claim: Claim, leash: Leash, log: Fields, folder: Path, on_stored: Callable[[int], None]
    ) -> None:
        """``folder``: for what is fetched; it belongs to the attempt. ``on_stored`` is told the bytes of every part."""
        self._on_stored = on_stored
        self._room, self._claim, self._leash, self._log = room, claim, leash, log
        self._folder = folder
        self._storage: Storage = open_storage(room.settings)
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="blocks", daemon=True)
        self.stored: list[StoredFile] = []
        """Every file of a part that is stored, found or kept: what the artifact need not send again."""

    def __enter__(self) -> BlockKeeper:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._waiting.put(None)
        self._thread.join(_SETTLE_S.get(self._leash.reason, _SETTLE_ELSE_S))
        self._abandoned.set()

    def take(self, line: Line, reply: Reply) -> bool:
        """Take what the child says of finished parts; False when the line is about something else."""
        match line:
            case {"type": "find", "fingerprint": str(fingerprint)}:
                self._waiting.put(lambda: self._find(fingerprint, reply))
            case {"type": "keep", "fingerprint": str(fingerprint), "name": str(name), "files": dict(files)}:
                paths = {str(file): Path(path) for file, path in files.items()}
                self._waiting.put(lambda: self._keep(fingerprint, name, paths))
            case _:
                return False
        return True

    def settle(self) -> None:
        """Wait until everything taken so far is stored; raises ``Interrupted`` when the attempt must end before."""
        done = threading.Event()
        self._waiting.put(done.set)
        while not done.wait(0.1):
            self._leash.check()

    def _work(self) -> None:
        while (act := self._waiting.get()) is not None:
            while not self._abandoned.is_set():
                try:
                    act()
                except (SlimtrimError, SQLAlchemyError, OSError):
                    self._log.exception("finished part not stored; trying again")
                    self._abandoned.wait(_RETRY_S)
                else:
                    break

    def _keep(self, fingerprint: str, name: str, files: dict[str, Path]) -> None:
        began = time.monotonic()
        place = f"{prefix_of(self._claim.owner, fingerprint)}{self._claim.job_id}/a{self._claim.fence}"
        stored: list[StoredFile] = []
        for file, path in files.items():
            key = f"{place}/{name}/{file}"
            sent = self._storage.put_file(key, path)
            stored.append(StoredFile(file, key, sent["bytes"], sent["sha256"]))
        with self._room.work() as work:
            ours = work.blocks.keep(self._claim, self._claim.owner, fingerprint, name, stored)
        if not ours:
            self._leash.pull(Interruption.LOST)
            return
        self.stored += stored
        size, seconds = sum(file.bytes for file in stored), round(time.monotonic() - began, 3)
        self._on_stored(size)
        self._log.info("part stored", extra={"part": name, "bytes": size, "seconds": seconds})

    def _find(self, fingerprint: str, reply: Reply) -> None:
        try:
            found = self._fetch(fingerprint)
        except SlimtrimError as error:
            reply({"error": {"code": error.code, "message": error.message, "retryable": error.retryable}})
        except (SQLAlchemyError, OSError) as error:
            self._log.exception("finished parts not found out")
            ours = as_ours(error)
            reply({"error": {"code": ours.code, "message": ours.message, "retryable": True}})
        else:
            reply({"found": found})

    def _fetch(self, fingerprint: str) -> dict[str, dict[str, str]]:
        self._note_begun(fingerprint)
        with reading(self._room.open_reader) as work:
            parts = work.blocks.find(self._claim.owner, fingerprint)
        found: dict[str, dict[str, str]] = {}
        for name, files in parts.items():
            self._leash.check()
            place = self._folder / fingerprint / name
            place.mkdir(parents=True, exist_ok=True)
            for file in files:
                self._storage.get_file(file.key, place / file.path, file.sha256)
            found[name] = {file.path: str(place / file.path) for file in files}
            self.stored += files
        if blocks := sum(name.startswith(_BLOCK) for name in found):
            self._log.info("finished blocks found", extra={"blocks": blocks})
            with self._room.work() as work:
                work.attempts.note_resumed(self._claim, blocks)
        return found

    def _note_begun(self, fingerprint: str) -> None:
        """Note what this attempt's blocks are kept under, and say so when an earlier one's are of no use."""
        if fingerprint.startswith("study-"):
            return
        with self._room.work() as work:
            work.blocks.begin(self._claim, fingerprint)
            if self._claim.fingerprint not in (None, fingerprint):
                why = "model, text, recipe or program differ from those of the attempt before; its blocks are not used"
                work.attempts.warn(self._claim, "started_over", why)
