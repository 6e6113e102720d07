"""The one secret of an installation, and what is derived from it: the key of signed links, and each caller's webhook secret.

It is ``SLIMTRIM_SECRET``, which must then be equal on all machines, or else a file in the data folder that is made on
first use. Only derived keys are ever used, so a key that leaks says nothing about the secret or about another key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from jobs.settings import Settings

_FILE = "signing.key"
_BYTES = 32


def derived_key(settings: Settings, purpose: str) -> bytes:
    """Return the 32 bytes that belong to this purpose."""
    return hmac.new(master_secret(settings), purpose.encode(), hashlib.sha256).digest()


def master_secret(settings: Settings) -> bytes:
    """Return the secret of the settings, or that of the data folder, made on first use, readable by its owner alone."""
    if settings.secret is not None:
        return settings.secret.get_secret_value().encode()
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = settings.data_dir / _FILE
    if not path.exists():
        _create(path, secrets.token_bytes(_BYTES))
    return path.read_bytes()


def _create(path: Path, content: bytes) -> None:
    """Write the secret whole or not at all; of several processes that start at once, one wins."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
