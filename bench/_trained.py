"""What benches on a trained model are told: the model's folder, and a folder with its texts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from compression.memory import bound_kernel_caches


def arguments(about: str | None, add: Callable[[argparse.ArgumentParser], object]) -> argparse.Namespace | None:
    """Return what the command line says, with what ``add`` adds; None, having said so, where nothing can be measured."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("text", type=Path, nargs="?", help="folder with calibration.txt and heldout.txt")
    add(parser)
    given = parser.parse_args()
    if given.model is None or given.text is None:
        print("NOT MEASURED: name a model's folder and a folder with calibration.txt and heldout.txt")
        return None
    bound_kernel_caches()
    return given
