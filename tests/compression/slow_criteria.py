"""The criteria once more, slowly and apart from the library: plain loops in float64 over what entered each MoE layer.

Only softmax routers that renormalise (Mixtral's) are spelt out, since that is what the published code is written for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compression.architectures import find_architecture
from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.sweep import Stream, sweep

Array = NDArray[np.float64]


@dataclass
class Layer:
    """The inputs [T, D] of one MoE layer, its router [E, D] and its experts' matrices, as [F, D], [F, D], [D, F]."""

    x: Array
    router: Array
    experts: list[tuple[Array, Array, Array]]
    residual: Array
    """What entered the norm before the layer."""
    outputs: Array = field(init=False)

    def __post_init__(self) -> None:
        self.outputs = np.stack([self.expert(index) for index in range(len(self.experts))])

    def expert(self, index: int) -> Array:
        gate_FD, up_FD, down_DF = self.experts[index]
        gated_TF = self.x @ gate_FD.T
        return (gated_TF / (1 + np.exp(-gated_TF)) * (self.x @ up_FD.T)) @ down_DF.T

    def route(self, gone: tuple[int, ...] = ()) -> tuple[Array, list[list[int]], list[list[float]]]:
        """Return the probabilities [T, E], and the two experts and weights of each token, without the experts that are gone."""
        logits_TE = self.x @ self.router.T
        logits_TE[:, list(gone)] = -np.inf
        p_TE = np.exp(logits_TE - logits_TE.max(1, keepdims=True))
        p_TE /= p_TE.sum(1, keepdims=True)
        ids, weights = [], []
        for p_E in p_TE:
            best = np.argsort(-p_E, kind="stable")[:2].tolist()
            ids.append(best)
            weights.append([float(p_E[expert] / p_E[best].sum()) for expert in best])
        return p_TE, ids, weights

    def output(self, gone: tuple[int, ...] = ()) -> Array:
        _, ids, weights = self.route(gone)
        z_TD = np.zeros_like(self.x)
        for token, (chosen, w) in enumerate(zip(ids, weights, strict=True)):
            for expert, weight in zip(chosen, w, strict=True):
                z_TD[token] += weight * self.outputs[expert, token]
        return z_TD


def layers_of(folder: Path, ids_NS: torch.Tensor) -> dict[int, Layer]:
    """Return every MoE layer of a Mixtral with what enters it, computed in float64."""
    reader = Reader(folder)
    shell, found = Shell(reader.config, reader.outside()), {}
    saved = {index: reader.block(index) for index in range(len(shell.blocks))}

    class Look:
        def visit(self, index: int, block: torch.nn.Module, stream: Stream) -> None:
            x: list[torch.Tensor] = []
            residual: list[torch.Tensor] = []
            experts, norm = block.get_submodule("mlp.experts"), block.get_submodule("post_attention_layernorm")
            norm.register_forward_pre_hook(lambda _m, args: residual.append(args[0].flatten(0, -2)))
            experts.register_forward_pre_hook(lambda _m, args: x.append(args[0]))
            experts.forward = lambda *args: in_float64(experts, *args)
            stream.push(index, block)
            prefix = f"model.layers.{index}.block_sparse_moe"
            tensors = {name: tensor.double().numpy() for name, tensor in saved[index].items()}
            router_ED = tensors[f"{prefix}.gate.weight"]
            experts = [
                tuple(tensors[f"{prefix}.experts.{e}.{matrix}.weight"] for matrix in ("w1", "w3", "w2"))
                for e in range(len(router_ED))
            ]
            found[index] = Layer(torch.cat(x).numpy(), router_ED, experts, torch.cat(residual).numpy())  # type: ignore[arg-type]

    assert find_architecture(reader.config).model_type == "mixtral"
    sweep(shell, reader, Stream(shell, ids_NS, dtype=torch.float64), Look(), lambda *_: None)
    return found


def in_float64(experts: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Return what Mixtral's experts answer; their own kernels know no float64."""
    y_TD = torch.zeros_like(x_TD)
    for token, (ids, weights) in enumerate(zip(ids_TK.tolist(), weights_TK, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate_F, up_F = (experts.gate_up_proj[expert] @ x_TD[token]).chunk(2)
            y_TD[token] += weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate_F) * up_F))
    return y_TD


def scores(layer: Layer, criterion: str) -> list[float]:
    """Return what a criterion gives each expert, by its definition."""
    tokens, experts = len(layer.x), len(layer.experts)
    p_TE, ids, weights = layer.route()
    if criterion == "routing_score":
        return [sum(float(p_E[e]) for p_E in p_TE) / tokens for e in range(experts)]
    if criterion == "aimer":
        flat = [np.concatenate([matrix.ravel() for matrix in expert]) for expert in layer.experts]
        return [-float(np.abs(w).sum() / (sqrt(len(w)) * sqrt(float((w * w).sum())))) for w in flat]
    found: list[list[tuple[float, float]]] = [[] for _ in range(experts)]
    for token, (chosen, w) in enumerate(zip(ids, weights, strict=True)):
        for expert, weight in zip(chosen, w, strict=True):
            found[expert].append((weight, float(np.linalg.norm(layer.outputs[expert, token]))))
    rules = {
        "frequency": lambda pairs: len(pairs) / tokens,
        "expert_norm": lambda pairs: sum(norm for _, norm in pairs),
        "reap": lambda pairs: sum(g * norm for g, norm in pairs) / max(1, len(pairs)),
        "man": lambda pairs: sum(norm for _, norm in pairs) / max(1, len(pairs)),
        "msan": lambda pairs: sum(norm**2 for _, norm in pairs) / max(1, len(pairs)),
    }
    return [rules[criterion](pairs) for pairs in found]


def hope(layer: Layer) -> Array:
    """Return the mean product of contributions of every two experts over the tokens that chose both."""
    experts = len(layer.experts)
    sums, counts = np.zeros((experts, experts)), np.zeros((experts, experts))
    _, ids, weights = layer.route()
    for token, (chosen, w) in enumerate(zip(ids, weights, strict=True)):
        sizes = {e: g * float(np.linalg.norm(layer.outputs[e, token])) for e, g in zip(chosen, w, strict=True)}
        for i in chosen:
            for j in chosen:
                sums[i, j] += sizes[i] * sizes[j]
                counts[i, j] += 1
    return np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)


def best_pairwise(layer: Layer, count: int) -> tuple[int, ...]:
    interaction = hope(layer)
    experts = range(len(layer.experts))
    gone = min(combinations(experts, len(experts) - count), key=lambda p: sum(interaction[i, j] for i in p for j in p))
    return tuple(e for e in experts if e not in gone)


def reconstruction_losses(layer: Layer, count: int) -> dict[tuple[int, ...], float]:
    """Return |Z - Z'| for every set of experts to keep, by running the layer anew for each, as the published code does."""
    experts, right_TD = range(len(layer.experts)), layer.output()
    losses = {}
    for gone in combinations(experts, len(experts) - count):
        losses[tuple(e for e in experts if e not in gone)] = float(np.linalg.norm(right_TD - layer.output(gone)))
    return losses
