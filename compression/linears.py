"""The linear layers of a live block that slimming may touch, by the names under which their weights are saved."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from compression.architectures import Architecture, Component


def find_linears(
    saved: Iterable[str], block: nn.Module, architecture: Architecture, components: tuple[Component, ...]
) -> dict[str, nn.Linear]:
    """Return the block's linear layers of these components, by saved name without ``.weight``; routed experts are none."""
    found: dict[str, nn.Linear] = {}
    for name in saved:
        component = architecture.component_of(name)
        if not name.endswith(".weight") or name.endswith("_gate.weight") or component == "experts" or component not in components:
            continue
        module = block.get_submodule(architecture.running_place(name).removesuffix(".weight"))
        if isinstance(module, nn.Linear):  # norms of attention are none
            found[name.removesuffix(".weight")] = module
    return found
