"""Where results go: a folder or a bucket, behind one interface. Links are never followed and never stored."""

from __future__ import annotations

from jobs.settings import Settings
from jobs.storage.folder import FolderStorage
from jobs.storage.interface import KnownObject, ObjectNotFound, Storage, known_among
from jobs.storage.manifest import (
    MANIFEST,
    MEDIA_TYPES,
    Manifest,
    ManifestFile,
    as_manifest,
    manifest_bytes,
    manifest_sha256,
    media_type,
)
from jobs.storage.s3 import S3Storage

__all__ = [
    "MANIFEST",
    "MEDIA_TYPES",
    "FolderStorage",
    "KnownObject",
    "Manifest",
    "ManifestFile",
    "ObjectNotFound",
    "S3Storage",
    "Storage",
    "as_manifest",
    "known_among",
    "manifest_bytes",
    "manifest_sha256",
    "media_type",
    "open_storage",
]


def open_storage(settings: Settings) -> Storage:
    """Return the store that the settings name; a bucket is not asked for before the first use."""
    return FolderStorage(settings.objects_folder) if settings.bucket is None else S3Storage(settings)
