"""``python -m slimtrim_client``: the same as ``slimtrim``."""

from slimtrim_client.cli import run

run()
