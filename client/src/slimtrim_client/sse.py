"""Server-sent events, decoded as the HTML standard describes them, however the bytes are cut."""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One event of a stream."""

    event: str
    data: str
    id: str


class Decoder:
    """Takes bytes as they arrive and returns whole messages."""

    def __init__(self) -> None:
        self.retry_s: float | None = None
        """The pause before coming back, if the server named one."""
        self.heartbeats = 0
        """Comments so far; a server sends them to show that it is there."""
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._line: list[str] = []
        self._is_first = True
        self._after_return = False
        self._event, self._data, self._id = "", list[str](), ""

    def feed(self, chunk: bytes) -> list[Message]:
        """Return the messages that these bytes complete."""
        text = self._text.decode(chunk)
        if self._is_first and text:
            self._is_first = False
            text = text.removeprefix("\ufeff")
        messages: list[Message] = []
        for line in self._lines(text):
            if (message := self._take(line)) is not None:
                messages.append(message)
        return messages

    def _lines(self, text: str) -> list[str]:
        """Return the lines that end in this text. A line ends with CR, LF or both."""
        if self._after_return and text:
            text = text.removeprefix("\n")
            self._after_return = False
        self._after_return = text.endswith("\r") or (self._after_return and not text)
        *ended, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        if ended:
            ended[0] = "".join([*self._line, ended[0]])
            self._line.clear()
        self._line.append(rest)
        return ended

    def _take(self, line: str) -> Message | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.heartbeats += 1
        elif name == "event":
            self._event = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdecimal():
            self.retry_s = int(value[:9]) / 1000
        return None

    def _dispatch(self) -> Message | None:
        event, data = self._event or "message", self._data
        self._event, self._data = "", []
        return Message(event, "\n".join(data), self._id) if data else None
