"""kombu's two transports that the queue uses, each without a fault of the original. Named in Celery's settings by path."""

# kombu ships without types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from queue import Empty
from typing import Any

from kombu.transport import filesystem, redis


class FolderChannel(filesystem.Channel):
    """A folder as a queue, in which a message is either whole or not there, and is taken by exactly one reader.

    kombu's own channel writes a message under its final name, so that a reader can meet it half-written and die of
    it, and takes it through the shared temporary folder. Here both are renames inside one folder.
    """

    def _put(self, queue: str, payload: Any, **_: Any) -> None:
        folder = Path(self.data_folder_out)
        # Zero-padded nanoseconds since the epoch: names sort by age, also across a reboot.
        place = folder / f"{time.time_ns():020d}_{uuid.uuid4()}.{queue}.msg"
        unfinished = place.with_name(f".{place.name}")
        unfinished.write_text(json.dumps(payload), encoding="utf-8")
        unfinished.rename(place)

    def _get(self, queue: str) -> Any:
        folder = Path(self.data_folder_in)
        for name in sorted(os.listdir(folder)):
            if name.partition(".")[2] != f"{queue}.msg":
                continue
            taken = folder / f".{name}.taken"
            try:
                (folder / name).rename(taken)
            except FileNotFoundError:  # another worker was faster
                continue
            message = taken.read_text(encoding="utf-8")
            taken.unlink()
            return json.loads(message)
        raise Empty


class FolderTransport(filesystem.Transport):
    """kombu's filesystem transport over ``FolderChannel``."""

    Channel = FolderChannel


class RedisQoS(redis.QoS):
    """Keeps count of the message that a worker holds, also when Redis goes away just as the message is acknowledged.

    The original counts it as held for ever then. The worker, which holds one message at most, asks for no other, so it
    never notices that its connection is gone, and stays deaf until it is started again.
    """

    def ack(self, delivery_tag: str) -> None:
        """Let go of the message, whatever Redis says; there it is delivered again some day, and dropped."""
        try:
            super().ack(delivery_tag)
        except self.channel.connection_errors:
            self._quick_ack(delivery_tag)
            raise


class RedisChannel(redis.Channel):
    """A channel with ``RedisQoS``."""

    QoS = RedisQoS


class RedisTransport(redis.Transport):
    """kombu's Redis transport over ``RedisChannel``."""

    Channel = RedisChannel
