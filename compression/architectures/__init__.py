"""The families: a frozen record each (``record.py``), listed by hand in ``families.py`` and ``hybrids.py``.

An architecture is data, and each row is proved by tests that run over the whole table (``table.py``). ``refused.py`` says why the
other mixtures are not in it.
"""

from compression.architectures.record import COMPONENTS, EXPERT_COUNT_SPELLINGS, Architecture, Component, Refusable
from compression.architectures.refused import REFUSED
from compression.architectures.table import ARCHITECTURES, expert_count, find_architecture

__all__ = [
    "ARCHITECTURES",
    "COMPONENTS",
    "EXPERT_COUNT_SPELLINGS",
    "REFUSED",
    "Architecture",
    "Component",
    "Refusable",
    "expert_count",
    "find_architecture",
]
