"""Where webhooks may go: nowhere inside, however it is spelled."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from jobs.errors import ReceiverRefused
from jobs.receivers import check_receiver, checked_addresses, is_public, parse_receiver


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1", "172.16.0.1", "192.168.1.1", "127.0.0.1", "127.8.8.8", "0.0.0.0", "169.254.169.254", "100.64.0.1",
        "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.88.99.1", "198.18.0.1", "192.0.2.1", "224.0.0.1", "239.1.1.1",
        "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:8.8.8.8", "::8.8.8.8", "64:ff9b::8.8.8.8", "64:ff9b:1::1", "100::1",
        "2001::1", "2001:db8::1", "2002:0a00:1::", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1",
        "x",
    ],
)  # fmt: skip
def test_an_address_inside_is_not_public(address: str):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2001:4860:4860::8888"])
def test_an_address_of_the_internet_is_public(address: str):
    assert is_public(address)


def to(*addresses: str):
    def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/x", "https://example.org:444/", "https://u@example.org/", "https://u:p@example.org/", "https:///x",
        "ftp://example.org/", "https://exa mple.org/", "https://ex\u00e4mple.org/", "https://example.org:99999/", "https://[::1/",
        "https://example.org/\n", "https://example.org/\u00e9", "example.org",
    ],
)  # fmt: skip
def test_a_url_of_another_form_is_refused(url: str):
    with pytest.raises(ReceiverRefused) as refusal:
        check_receiver(url, (), to("8.8.8.8"))
    assert refusal.value.pointer == "/webhook/url"


def test_a_name_with_one_address_inside_is_refused():
    with pytest.raises(ReceiverRefused, match=r"10\.0\.0\.1"):
        check_receiver("https://example.org/x", (), to("8.8.8.8", "10.0.0.1"))


def test_what_the_operator_lists_may_be_inside_and_without_tls():
    listed = ("hooks.internal:8080", "[::1]:443")

    check_receiver("http://hooks.internal:8080/x", listed, to("10.0.0.1"))
    check_receiver("https://[::1]/x", listed, to("::1"))
    with pytest.raises(ReceiverRefused):
        check_receiver("http://hooks.internal:8081/x", listed, to("10.0.0.1"))
    with pytest.raises(ReceiverRefused):
        check_receiver("https://hooks.internal/x", listed, to("10.0.0.1"))


def test_a_name_without_an_address_at_the_moment_is_accepted_and_cannot_be_delivered_to():
    def nobody(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    check_receiver("https://example.org/x", (), nobody)
    with pytest.raises(OSError, match="no such name"):
        checked_addresses(parse_receiver("https://example.org/x", ()), (), nobody)


def test_a_url_is_taken_apart_as_it_is_sent():
    receiver = parse_receiver("https://Example.org./a%20b?c=d&e#f", ())

    assert (receiver.host, receiver.port, receiver.target, receiver.authority) == (
        "example.org",
        443,
        "/a%20b?c=d&e",
        "example.org",
    )
    assert parse_receiver("http://[fd00::1]:8080", ("[fd00::1]:8080",)).authority == "[fd00::1]:8080"
