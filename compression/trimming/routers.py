"""The stock router of a family for any number of experts, to be asked what it would choose among fewer."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import nn

from compression.architectures import find_architecture
from compression.block import empty_model, language_model
from compression.runtime.slimtrim_runtime import with_experts
from compression.trimming.shape import family_facts


class Routers:
    """Makes routers of one model's class; their weights are on the host, in float32, and not filled in."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._architecture = find_architecture(config)

    def __call__(self, experts: int) -> nn.Module:
        """Return the router as the stock class builds it for so many experts; it takes tokens as rows, whatever the class."""
        model = self._model
        tower: Any = language_model(self._architecture, model)
        blocks: Any = tower.get_decoder().layers
        index = next(place for place, block in enumerate(blocks) if _router(block, self._architecture.running_router) is not None)
        settings = tower.config.get_text_config(decoder=True)
        block = with_experts(experts, model, blocks[index], index, settings, family_facts(self._architecture))
        router = _router(block, self._architecture.running_router)
        assert router is not None
        router = deepcopy(router).to_empty(device="cpu").float().eval()
        if self._architecture.router_in_batches:
            router.register_forward_pre_hook(lambda _, args: (args[0][None], *args[1:]))
        return router

    @cached_property
    def _model(self) -> Any:
        return empty_model(self._config, torch.float32)


def _router(block: nn.Module, path: str) -> nn.Module | None:
    try:
        router = block.get_submodule(path)
    except AttributeError:
        return None
    return router if any(True for _ in router.parameters()) else None
