"""Server-sent events: the same messages however the bytes are cut."""

from __future__ import annotations

import pytest

from slimtrim_client.sse import Decoder, Message

STREAM = (
    'retry: 3000\n\n: \n\nid: 1\nevent: job.stage\ndata: {"stage": "pr\u00fcfen \U0001f9ca"}\n\n'
    "id: 2\ndata: first\ndata:second\n\ndata\n\nignored: x\nid\ndata:  two spaces\n\nevent: end\ndata: {}\n\nid: 9\ndata: cut"
)
MESSAGES = [
    Message("job.stage", '{"stage": "pr\u00fcfen \U0001f9ca"}', "1"),
    Message("message", "first\nsecond", "2"),
    Message("message", "", "2"),
    Message("message", " two spaces", ""),
    Message("end", "{}", ""),
]  # fmt: skip


def decoded(*chunks: bytes) -> list[Message]:
    decoder = Decoder()
    return [message for chunk in chunks for message in decoder.feed(chunk)]


@pytest.mark.parametrize("ending", ["\n", "\r", "\r\n"], ids=["LF", "CR", "CRLF"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_stream_means_the_same_wherever_it_is_cut(ending: str, mark: str):
    stream = (mark + STREAM.replace("\n", ending)).encode()

    assert decoded(stream) == MESSAGES
    assert decoded(*(bytes([byte]) for byte in stream)) == MESSAGES
    for cut in range(len(stream) + 1):
        assert decoded(stream[:cut], b"", stream[cut:]) == MESSAGES, cut


def test_a_message_comes_as_soon_as_its_last_line_does():
    decoder = Decoder()

    assert decoder.feed(b"data: x\r\n") == []
    assert decoder.feed(b"\r") == [Message("message", "x", "")]
    assert decoder.feed(b"\ndata: y\n\n") == [Message("message", "y", "")]


def test_heartbeats_and_the_pause_are_noted():
    decoder = Decoder()

    decoder.feed(b"retry: 250\nretry: soon\n\n: still here\n\n:\n\n")

    assert decoder.retry_s == 0.25
    assert decoder.heartbeats == 2
