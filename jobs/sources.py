"""Where a model comes from: the hub, a bucket, or a folder below the roots that this installation may read.

    meta/model               a hub repository; its branch or tag is pinned to a commit before anything else is read
    file:///srv/models/x     a folder below one of SLIMTRIM_MODEL_ROOTS, read in place; nothing in the path is decoded
    s3://bucket/prefix       objects below one of SLIMTRIM_MODEL_BUCKETS, pinned to what they are when it is first read

``read_checkpoint_of`` reads config.json and the tensor headers only, from afar by ranges of bytes. ``fetch`` brings
the weights to the machine. Only safetensors, JSON and tokenizer files ever travel: no pickle, no code.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from compression.checkpoint.headers import Checkpoint, CheckpointFiles, FolderFiles, read_checkpoint
from compression.errors import DiskFull, DownloadFailed, ModelNotFound, SourceNotAllowed, ValidationFailed
from compression.request import Compression, Domain, InlineText
from jobs.bucket_files import SCHEME, Place, check_text, download_model, download_text, open_model, parse_place
from jobs.hub import HubFiles, download, is_wanted
from jobs.settings import Settings

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.+/-]{0,255}", re.ASCII)
_FILE = "file://"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the hub, ``owner/name``."""

    repository: str


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder on this machine, as the caller wrote it; whether it may be read is not decided yet."""

    path: Path


Source = HubSource | FolderSource | Place


def parse(model: str) -> Source:
    """Return what kind of source a request's ``model`` names; touches neither disk nor network."""
    if model.startswith(SCHEME):
        return parse_place(model, "/model")
    if model.startswith(_FILE):
        return FolderSource(_absolute_path(model, "/model"))
    if _HUB_ID.fullmatch(model) and ".." not in model:
        return HubSource(model)
    raise ValidationFailed(
        f'{_short(model)} is not a model; write "owner/name" on the hub, "s3://bucket/prefix" or "file:///folder/below/a/root"',
        pointer="/model",
    )


def open_files(model: str, revision: str | None, settings: Settings) -> tuple[CheckpointFiles, str | None]:
    """Return a model's files and the commit or revision they are pinned to; None for a folder, which has none."""
    match parse(model):
        case HubSource(repository):
            files = HubFiles.open(repository, _checked_revision(revision), _token(settings))
            return files, files.commit
        case Place() as place:
            files = open_model(place, revision, settings)
            return files, files.revision
        case FolderSource(path):
            folder, root = _allowed_folder(path, settings)
            return FolderFiles(folder, root), None


def read_checkpoint_of(model: str, revision: str | None, settings: Settings) -> tuple[Checkpoint, str | None]:
    """Return the model's config and tensor headers, and the commit that they were read from; no weights are read."""
    files, commit = open_files(model, revision, settings)
    return read_checkpoint(files), commit


def fetch(model: str, revision: str | None, destination: Path, settings: Settings) -> Path:
    """Return a folder on this machine that holds the model.

    That is the folder itself, or ``destination``: filled from the hub or a bucket, or, where the folder holds links to files
    elsewhere below its root (a hub cache does), filled with those files, since a run opens nothing outside its folder.
    """
    match parse(model):
        case HubSource(repository):
            return download(repository, _checked_revision(revision), destination, _token(settings))
        case Place() as place:
            return download_model(place, revision, destination, settings)
        case FolderSource(path):
            folder, root = _allowed_folder(path, settings)
            return _without_links(folder, root, destination)


def check_text_sources(request: Compression, settings: Settings) -> None:
    """Refuse a calibration or evaluation text that is missing or lies outside the allowed roots and buckets."""
    for pointer, source in _texts(request):
        if isinstance(source, str) and source.startswith(SCHEME):
            check_text(parse_place(source, pointer), settings, pointer)
        elif isinstance(source, str) and source.startswith(_FILE):
            _check_text_file(source, pointer, settings)


def fetch_texts(request: Compression, destination: Path, settings: Settings) -> dict[str, Path]:
    """Bring the request's texts in buckets to this machine; return source -> file, each in a folder of its own."""
    copies: dict[str, Path] = {}
    for pointer, source in _texts(request):
        if isinstance(source, str) and source.startswith(SCHEME) and source not in copies:
            place = parse_place(source, pointer)
            copies[source] = download_text(place, destination / str(len(copies)), settings, pointer)
    return copies


def _texts(request: Compression) -> list[tuple[str, str | InlineText]]:
    texts = [
        *_domains(request.calibration.source, "/calibration/source"),
        *_domains(request.evaluation.perplexity.source, "/evaluation/perplexity/source"),
    ]
    generation = request.evaluation.generation
    if generation is not None and isinstance(generation.source, str):
        texts.append(("/evaluation/generation/source", generation.source))
    return texts


def _domains(source: str | InlineText | tuple[Domain, ...], pointer: str) -> list[tuple[str, str | InlineText]]:
    if not isinstance(source, tuple):
        return [(pointer, source)]
    return [(f"{pointer}/{index}/source", domain.source) for index, domain in enumerate(source)]


def _check_text_file(source: str, pointer: str, settings: Settings) -> None:
    path, _ = _below_a_root(_absolute_path(source, pointer), settings, pointer)
    if not path.is_file():
        raise ValidationFailed(f"there is no file {_short(source)}", pointer=pointer)
    if not os.access(path, os.R_OK):
        raise SourceNotAllowed(f"the service may not read {_short(source)}", pointer=pointer)


def _without_links(folder: Path, root: Path, destination: Path) -> Path:
    files = FolderFiles(folder, root)
    names = files.names()
    for name in names:
        files.size(name)  # refuses a link that leads out of the root
    targets = {name: (folder / name).resolve() for name in names}
    if all(target.parent == folder for target in targets.values()):
        return folder
    try:
        destination.mkdir(parents=True, exist_ok=True)
        for name in filter(is_wanted, names):
            _link_or_copy(files, name, targets[name], destination / name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no room for a copy of file://{folder}") from error
        raise DownloadFailed(f"file://{folder} cannot be copied: {error.strerror}") from error
    return destination


def _link_or_copy(files: FolderFiles, name: str, source: Path, place: Path) -> None:
    """Give the file a second name, or a second copy where that cannot be: another disk, another owner."""
    place.unlink(missing_ok=True)
    try:
        os.link(source, place, follow_symlinks=False)  # if it has become a link by now, the run refuses that
    except OSError:
        with files.open(name) as file, place.open("wb") as copy:
            shutil.copyfileobj(file, copy)


def _absolute_path(url: str, pointer: str) -> Path:
    path = url.removeprefix(_FILE)
    if not path.startswith("/") or not path.isprintable():
        raise ValidationFailed(f"{_short(url)} is not file:/// and an absolute path", pointer=pointer)
    if ".." in path.split("/"):
        raise SourceNotAllowed(f'{_short(url)} contains "..", which is never followed', pointer=pointer)
    return Path(path)


def _allowed_folder(path: Path, settings: Settings) -> tuple[Path, Path]:
    """Return the real folder and the real root above it."""
    folder, root = _below_a_root(path, settings, "/model")
    if not folder.is_dir():
        raise ModelNotFound(f"there is no folder file://{path}", pointer="/model")
    return folder, root


def _below_a_root(path: Path, settings: Settings, pointer: str) -> tuple[Path, Path]:
    """Resolve every link, then compare: outside the roots the answer never depends on what exists there."""
    if not settings.model_roots:
        raise SourceNotAllowed("no folder may be read: SLIMTRIM_MODEL_ROOTS is empty; list folders in it", pointer=pointer)
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # RuntimeError: links that lead in a circle
        _refuse(path, pointer)
    for root in settings.model_roots:
        real_root = root.resolve()
        if real.is_relative_to(real_root):
            return real, real_root
    _refuse(path, pointer)


def _refuse(path: Path, pointer: str) -> NoReturn:
    raise SourceNotAllowed(f"file://{path} does not lie below any folder of SLIMTRIM_MODEL_ROOTS", pointer=pointer)


def _token(settings: Settings) -> str | None:
    return settings.hf_token.get_secret_value() if settings.hf_token else None


def _checked_revision(revision: str | None) -> str:
    if revision is None:
        return "main"
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise ValidationFailed(f"{_short(revision)} is not a branch, a tag or a commit", pointer="/revision")
    return revision


def _short(value: str) -> str:
    return repr(value if len(value) <= 200 else f"{value[:200]}...")
