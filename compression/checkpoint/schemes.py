"""What config.json says of quantized weights: which scheme holds for which module, in which block.

Stock transformers and the engines find a module's scheme by patterns on its name. Where blocks differ, the patterns name
blocks by their index in the artifact, and no module is found by two of them.

Stock transformers reads the routed experts of all blocks by one scheme. Where theirs differ, the section ``"slimtrim"``
says so instead, and the loader that ships in the artifact unpacks them (``runtime/slimtrim_runtime.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compression.architectures import Architecture, Component
from compression.planner.sizes import FLOAT
from compression.recipe import BITS, Quantize
from compression.runtime.slimtrim_runtime import declared
from compression.trimming.dense_layers import dense_blocks

_EXPERTS = r"\.experts\."
_NAMED_BLOCKS = re.compile(r"\\\.layers\\\.\(([\d|]+)\)")


def quantized_entries(
    architecture: Architecture, step: Quantize, trimmed: Mapping[str, Any], blocks: Sequence[int]
) -> dict[str, Any]:
    """Return what the step adds to the ``trimmed`` config.json; ``blocks``: those that stay, by their index in the source."""
    entries: dict[str, Any] = {}
    if stated := quantization_config(architecture, step, trimmed, blocks):
        entries["quantization_config"] = stated
    experts = _scheme_by_block(architecture, step, trimmed, blocks)["experts"]
    if len(set(experts.values())) > 1:
        assert FLOAT not in experts.values(), "floats among experts of several schemes are not unpacked by any loader"
        bits = [BITS.get(experts.get(index, "keep")) for index in range(len(blocks))]
        names = rf"{re.escape(architecture.layers)}\.(\d+)\.{re.escape(architecture.moe)}\.experts\."
        section = trimmed.get("slimtrim", {"profile": "custom"})
        entries |= declared({**section, "packed_experts": {"names": names, "group_size": step.group_size or -1, "bits": bits}})
    return entries


def quantization_config(
    architecture: Architecture,
    step: Quantize,
    trimmed: Mapping[str, Any] | None = None,
    blocks: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the ``quantization_config`` that stock transformers and vLLM's rules read, for a model of the ``trimmed`` config.

    ``blocks``: those that stay, by their index in the source; needed where schemes differ by block. Empty where stock
    classes have nothing to unpack.
    The experts' group carries the literal target "Linear" when it is the only scheme, which older engines look
    for; with several schemes its target is a pattern that names the experts, by which the stock loader finds it.
    """
    groups = _targets(architecture, _scheme_by_block(architecture, step, trimmed, blocks))
    kept = groups.pop("keep", [])
    if not groups:
        return {}
    if len(groups) == 1:
        groups = {scheme: ["Linear"] for scheme in groups}
    formats = sorted({_format(scheme) for scheme in groups})
    stated = [_group(scheme, step.group_size or -1, targets) for scheme, targets in groups.items()]
    if _named(_EXPERTS, None) in kept:
        # The stock loader takes experts for packed if its first scheme is one of integers, and drops those that are not.
        # A group of floats that names them makes it leave them as they are; to all others, what is ignored has no scheme.
        stated.insert(0, _group(FLOAT, -1, [_named(_EXPERTS, None)]))
    counts = architecture.settings(trimmed).get("per_layer_num_experts") if trimmed is not None else None
    sparsity = {"moe_sparsity_config": {"method": "prune", "num_experts": list(counts)}} if counts else {}
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": _ignored(architecture, kept),
        "kv_cache_scheme": None,
        "config_groups": {f"group_{number}": group for number, group in enumerate(stated)},
        **sparsity,
    }


def _targets(architecture: Architecture, schemes: Mapping[Component, Mapping[int, str]]) -> dict[str, list[str]]:
    """Return the patterns of each scheme, "keep" among them; experts of several schemes are kept as far as engines can tell."""
    targets: dict[str, list[str]] = {}
    for pattern, component in _patterns(architecture).items():
        by_scheme = _by_scheme(schemes[component])
        if component == "experts" and len(by_scheme) > 1:
            by_scheme = {"keep": None}
        for scheme, places in by_scheme.items():
            targets.setdefault(scheme, []).append(_named(pattern, places))
    return targets


def _ignored(architecture: Architecture, kept: Iterable[str]) -> list[str]:
    # By saved and by running name: stock transformers matches running modules, other engines saved ones.
    routers = sorted({architecture.router, architecture.running_router.rsplit(".", 1)[-1]})
    ignore = [architecture.head, *(rf"re:.*\.{router}$" for router in routers)]
    ignore += [rf"re:.*\.{module}$" for module in architecture.shared_experts if module.endswith("_gate")]
    ignore += kept
    return ignore + [rf"re:.*\b{module}\." + ".*" for module in (*architecture.shared_beside, *architecture.untouched)]


def in_window(stated: Mapping[str, Any], window: Sequence[int]) -> dict[str, Any]:
    """Return a ``quantization_config`` for a window of the artifact's blocks; empty where nothing in it is quantized."""
    groups: dict[str, Any] = {}
    for name, group in stated["config_groups"].items():
        if targets := _moved(group["targets"], window):
            groups[name] = {**group, "targets": targets}
    return {**stated, "config_groups": groups, "ignore": _moved(stated["ignore"], window)} if groups else {}


def _moved(patterns: Iterable[str], window: Sequence[int]) -> list[str]:
    moved: list[str] = []
    for pattern in patterns:
        match = _NAMED_BLOCKS.search(pattern)
        if match is None:
            moved.append(pattern)
        elif places := [window.index(int(block)) for block in match[1].split("|") if int(block) in window]:
            moved.append(pattern[: match.start()] + _in_blocks(places) + pattern[match.end() :])
    return moved


def _patterns(architecture: Architecture) -> dict[str, Component]:
    """Return a pattern for the modules of every component that can be quantized, by saved and by running name."""
    shared = [module for module in architecture.shared_experts if not module.endswith("_gate")]
    return {
        _EXPERTS: "experts",
        **{rf"\.{name}\.": "attention" for module in architecture.attention for name in architecture.names_of(module)},
        **{rf"\.{name}\.": "shared_experts" for module in shared for name in architecture.names_of(module)},
        rf"\.{architecture.dense_matrices}$": "dense",
    }


def _named(pattern: str, places: Sequence[int] | None) -> str:
    """Return the pattern as configs spell it; ``places``: in these blocks of the artifact alone."""
    where = "" if places is None else rf"{_in_blocks(places)}(\.\w+)*"
    return f"re:.*{where}{pattern}" + ("" if pattern.endswith("$") else ".*")


def _in_blocks(places: Iterable[int]) -> str:
    return rf"\.layers\.({'|'.join(map(str, places))})"


def _by_scheme(schemes: Mapping[int, str]) -> dict[str, list[int] | None]:
    """Return the places that go by each scheme; None for all of them, where there is one scheme."""
    if len(set(schemes.values())) == 1:
        return dict.fromkeys(schemes.values())
    found: dict[str, list[int] | None] = {}
    for scheme in dict.fromkeys(schemes.values()):
        found[scheme] = [place for place, its in schemes.items() if its == scheme]
    return found


def _scheme_by_block(
    architecture: Architecture, step: Quantize, trimmed: Mapping[str, Any] | None, blocks: Sequence[int]
) -> dict[Component, dict[int, str]]:
    """Return, for every component, the scheme in each block of the artifact that holds some of it.

    Where none does, the step's own is said to hold in block 0: it says what would be done.
    """
    found: dict[Component, dict[int, str]] = {"experts": {}, "attention": {}, "shared_experts": {}, "dense": {}}
    if step.by_block:
        assert trimmed is not None, "which blocks are mixtures stands in the trimmed config"
        assert blocks, "the recipe knows blocks by their index in the source"
        for index, block in enumerate(blocks):
            for component in _components(architecture, trimmed, index):
                found[component][index] = step.scheme_in(block, component)
    return {component: schemes or {0: step.scheme_in(None, component)} for component, schemes in found.items()}


def _components(architecture: Architecture, trimmed: Mapping[str, Any], index: int) -> list[Component]:
    uneven = trimmed.get("slimtrim", {}).get("experts")
    if index in dense_blocks(architecture, architecture.settings(trimmed)):
        return ["attention", "dense"]
    experts = 1 if uneven is None else uneven[index]  # 0: none of them is left; -1: nor what runs beside them
    there: list[tuple[Component, bool]] = [("attention", True), ("shared_experts", experts >= 0), ("experts", experts > 0)]
    return [component for component, is_there in there if is_there]


def _format(scheme: str) -> str:
    return "float-quantized" if scheme == FLOAT else "pack-quantized"


def _group(scheme: str, group_size: int, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": BITS[scheme], "type": "int", "symmetric": True, "dynamic": False}
    activations: dict[str, Any] | None = None
    if group_size == -1 or scheme == FLOAT:
        weights |= {"strategy": "channel", "group_size": None}
    else:
        weights |= {"strategy": "group", "group_size": group_size}
    if scheme == FLOAT:
        weights["type"] = "float"
        activations = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "targets": targets,
        "format": _format(scheme),
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
