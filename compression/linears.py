"""The linear layers of a live block that slimming may touch, by the names under which their weights are saved."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from compression.architectures import Architecture, Component
from compression.moe import moe_layer


def find_linears(
    saved: Mapping[str, Tensor], block: nn.Module, architecture: Architecture, components: Collection[Component]
) -> dict[str, nn.Linear]:
    """Return the block's linear layers of these components, by saved name without ``.weight``; routed experts are none.

    What is neither expert, router nor shared expert of a mixture is no dense layer either.
    """
    is_mixture = moe_layer(architecture, block) is not None
    found: dict[str, nn.Linear] = {}
    for name, tensor in saved.items():
        component = architecture.component_of(name)
        is_matrix = name.endswith(".weight") and tensor.dim() == 2 and not name.endswith("_gate.weight")
        if not is_matrix or component == "experts" or component not in components or (component == "dense" and is_mixture):
            continue
        module = block.get_submodule(architecture.running_place(name).removesuffix(".weight"))
        assert isinstance(module, nn.Linear), f"{name} is not a linear layer in the stock class"
        found[name.removesuffix(".weight")] = module
    return found
