"""What a block's matrices were fed, against a slow reference that watches the stock modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compression.architectures import ARCHITECTURES
from compression.block import Shell
from compression.checkpoint.packing import unpack
from compression.checkpoint.reader import Reader
from compression.collect import collect
from compression.moe import moe_layer
from compression.recipe import Quantize
from compression.slim import slim_
from compression.slimming import gptq
from compression.slimming.grid import Grid, dequantize
from compression.sweep import Stream
from tests.tiny_models import MODEL_TYPES

IDS_NS = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(3))


def first_mixture(folder, model_type):
    """A live block with a mixture, its saved tensors, and a stream that stands before it."""
    reader, architecture = Reader(folder), ARCHITECTURES[model_type]
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, IDS_NS)
    index = next(b for b in range(4) if architecture.router_name(b) in reader.checkpoint.tensors)
    for block in range(index):
        with shell.live(block, reader.block(block)) as live:
            stream.push(block, live)
    return shell, reader.block(index), stream, index


def reference_inputs(block, stream, index):
    """Everything each linear layer and the experts module were called with, as the stock block runs."""
    fed: dict[str, list[torch.Tensor]] = {}
    calls = []
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: fed.setdefault(name, []).append(args[0].flatten(0, -2)))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    hooks.append(block.mlp.experts.register_forward_pre_hook(lambda m, args: calls.append(args)))
    for _ in stream.peek(index, block):
        pass
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).double() for name, rows in fed.items()}, [
        torch.cat(parts) for parts in zip(*calls, strict=True)
    ]


def mean_square(x_TI):
    return x_TI.mT @ x_TI / max(len(x_TI), 1)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gram_matrices_are_those_of_what_the_stock_modules_are_fed(tiny_model_factory, model_type):
    shell, saved, stream, index = first_mixture(tiny_model_factory(model_type), model_type)
    with shell.live(index, saved) as block:
        layer = moe_layer(ARCHITECTURES[model_type], block)
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and "router" not in n}
        fed, (x_TD, ids_TK, _) = reference_inputs(block, stream, index)

        grams, routed = collect(index, block, stream, linears, layer)
        outer = routed.input_gram(range(2, 6), torch.device("cpu"))
        inner = routed.inner_gram(range(2, 6), layer, torch.device("cpu"))

        for name in linears:
            # float32 products and sums against float64.
            torch.testing.assert_close(grams[name].value_EII[0].double(), mean_square(fed[name]), rtol=1e-4, atol=1e-5)
        for place, expert in enumerate(range(2, 6)):
            rows_TD = x_TD[(ids_TK == expert).any(1)]
            assert outer.tokens_E[place] == inner.tokens_E[place] == len(rows_TD)
            torch.testing.assert_close(outer.value_EII[place].double(), mean_square(rows_TD.double()), rtol=1e-4, atol=1e-4)
            inside_TF = layer.gated(expert, rows_TD).double()
            torch.testing.assert_close(inner.value_EII[place].double(), mean_square(inside_TF), rtol=1e-4, atol=1e-2)


@torch.no_grad()
def test_collecting_leaves_the_stream_where_it_is(tiny_model_factory):
    shell, saved, stream, index = first_mixture(tiny_model_factory("mixtral"), "mixtral")
    before = [hidden.clone() for hidden in stream.hidden]

    with shell.live(index, saved) as block:
        collect(index, block, stream, {}, moe_layer(ARCHITECTURES["mixtral"], block))

    assert all(torch.equal(a, b) for a, b in zip(before, stream.hidden, strict=True))


@torch.no_grad()
def test_down_proj_is_solved_on_what_the_already_quantized_gate_and_up_feed_it(tiny_model_factory):
    shell, saved, stream, index = first_mixture(tiny_model_factory("mixtral"), "mixtral")
    architecture, step = ARCHITECTURES["mixtral"], Quantize(scheme="W4A16", group_size=32)
    down_EDF = torch.stack([saved[f"{architecture.experts_prefix(index)}.{e}.w2.weight"] for e in range(8)])
    with shell.live(index, saved) as block:
        layer = moe_layer(architecture, block)
        _, routed = collect(index, block, stream, {}, layer)

        slim_(saved, block, step, stream=stream, architecture=architecture, index=index)

        packed = (saved[f"{architecture.experts_prefix(index)}.5.{part}.weight_packed"] for part in ("w1", "w3"))
        scales = (saved[f"{architecture.experts_prefix(index)}.5.{part}.weight_scale"] for part in ("w1", "w3"))
        served_OI = torch.cat([dequantize(unpack(p, 4, 64), s) for p, s in zip(packed, scales, strict=True)])
        assert torch.equal(layer.experts.gate_up_proj[5], served_OI)  # slim_ leaves the served gate and up in the live block
        gram = routed.inner_gram(range(8), layer, torch.device("cpu"))
        expected, _ = gptq.quantize(down_EDF, gram.value_EII, Grid(4, 32))
    for expert in range(8):
        packed = saved[f"{architecture.experts_prefix(index)}.{expert}.w2.weight_packed"]
        assert torch.equal(unpack(packed, 4, 128), expected.codes_EOI[expert])


@torch.no_grad()
def test_chunks_of_experts_give_the_codes_of_the_whole_stack(tiny_model_factory, monkeypatch):
    results = []
    for size in (8, 3, 1):
        shell, saved, stream, index = first_mixture(tiny_model_factory("olmoe"), "olmoe")
        monkeypatch.setattr("compression.slim._experts_at_once", lambda layer, size=size: size)
        with shell.live(index, saved) as block:
            step = Quantize(group_size=32, attention="W8A16")
            slim_(saved, block, step, stream=stream, architecture=ARCHITECTURES["olmoe"], index=index)
        results.append(saved)

    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(other[name], results[0][name]) for name in other)
