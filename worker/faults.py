"""Names for what goes wrong outside our own code: memory, disks, and whatever nobody foresaw."""

from __future__ import annotations

import errno
import sys

from compression.errors import DiskFull, OutOfGpuMemory, OutOfHostMemory, SlimtrimError


def as_ours(error: BaseException) -> SlimtrimError:
    """Return the error as one of ours; what nobody foresaw is internal, and its details stay in the log."""
    if isinstance(error, SlimtrimError):
        return error
    text = str(error)
    if _is_gpu_memory(error):
        return OutOfGpuMemory(f"the accelerator's memory did not suffice: {text}")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return OutOfHostMemory(f"the machine's memory did not suffice: {text or type(error).__name__}")
    # safetensors wraps the system's error in its own, and keeps only the text.
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in text:
        return DiskFull(f"the disk of the scratch folder is full: {text}")
    return SlimtrimError(f"internal error ({type(error).__name__}); the worker's log has the details")


def _is_gpu_memory(error: BaseException) -> bool:
    # torch is looked up, not imported: only the job's child has it, and it may be what failed to load.
    out_of_memory = getattr(sys.modules.get("torch"), "OutOfMemoryError", ())
    return isinstance(error, out_of_memory)
