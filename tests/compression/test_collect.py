"""What a block's matrices were fed, against a slow reference that watches the stock modules.

Shapes: T tokens, D width, E experts, K experts per token, I inputs, F expert width.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compression.architectures import ARCHITECTURES
from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.collect import RoutedTokens, collect
from compression.errors import NonFiniteWeights
from compression.methods import STATISTICS
from compression.moe import Routed, moe_layer
from compression.slimming.hessian import Gram, InputNorm
from compression.sweep import Stream
from tests.tiny_models import EXPERT_WIDTH, EXPERTS, MODEL_TYPES

IDS_NS = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(3))
MANY_IDS_NS = torch.randint(3, 300, (12, 32), generator=torch.Generator().manual_seed(4))
CPU = torch.device("cpu")


def first_mixture(folder, model_type, ids_NS=IDS_NS):
    """A shell, the saved tensors of its first block with a mixture, a stream that stands before it, and its index."""
    reader, architecture = Reader(folder), ARCHITECTURES[model_type]
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, ids_NS)
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


def reference_logits(x_TD, saved, architecture, index):
    """The router's logits, from its saved weight and bias."""
    name = architecture.router_name(index)
    bias_E = saved.get(name.replace(".weight", ".bias"), torch.zeros(EXPERTS))
    return x_TD.double() @ saved[name].double().T + bias_E.double()


def mean_square(x_TI):
    return x_TI.mT @ x_TI / max(len(x_TI), 1)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gram_matrices_are_those_of_what_the_stock_modules_are_fed(tiny_model_factory, monkeypatch, model_type):
    monkeypatch.setattr("compression.collect.ENOUGH", 0)  # own tokens alone; topping up has its own tests
    architecture = ARCHITECTURES[model_type]
    shell, saved, stream, index = first_mixture(tiny_model_factory(model_type), model_type)
    with shell.live(index, saved) as block:
        layer = moe_layer(architecture, block)
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and "router" not in n}
        fed, (x_TD, ids_TK, _) = reference_inputs(block, stream, index)

        collected = collect(index, block, stream, linears, new=Gram, architecture=architecture, advance=False)
        outer = collected.routed.input_statistic(range(2, 6), Gram, CPU, weighted=False)
        inner = collected.routed.inner_statistic(range(2, 6), Gram, layer, CPU, weighted=False)

        for name in linears:
            # float32 products and sums against float64.
            gram_II = collected.linears[name].value[0].double()
            torch.testing.assert_close(gram_II, mean_square(fed[name]), rtol=1e-4, atol=1e-5)
        for place, expert in enumerate(range(2, 6)):
            rows_TD = x_TD[(ids_TK == expert).any(1)]
            assert outer.tokens_E[place] == inner.tokens_E[place] == len(rows_TD)
            torch.testing.assert_close(outer.value[place].double(), mean_square(rows_TD.double()), rtol=1e-4, atol=1e-4)
            inside_TF = layer.gated(expert, rows_TD).double()
            torch.testing.assert_close(inner.value[place].double(), mean_square(inside_TF), rtol=1e-4, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("needs", STATISTICS)
def test_every_matrix_gets_the_statistic_that_is_asked_for(tiny_model_factory, needs):
    shell, saved, stream, index = first_mixture(tiny_model_factory("qwen2_moe"), "qwen2_moe")
    new = STATISTICS[needs]

    with shell.live(index, saved) as block:
        linears = {"q": block.self_attn.q_proj, "shared": block.mlp.shared_expert.down_proj}
        collected = collect(index, block, stream, linears, new=new, architecture=ARCHITECTURES["qwen2_moe"], advance=False)
        routed = collected.routed.input_statistic(range(8), new, CPU, weighted=False)

    assert {type(statistic) for statistic in (*collected.linears.values(), routed)} == {new}
    assert collected.linears["shared"].tokens_E.tolist() == [IDS_NS.numel()]


@torch.no_grad()
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_mean_squares_are_the_diagonals_of_the_gram_matrices(tiny_model_factory, model_type, weighted):
    shell, saved, stream, index = first_mixture(tiny_model_factory(model_type), model_type)
    found = []
    with shell.live(index, saved) as block:
        layer, linears = moe_layer(ARCHITECTURES[model_type], block), {"o": block.self_attn.o_proj}
        for new in (InputNorm, Gram):
            got = collect(index, block, stream, linears, new=new, architecture=ARCHITECTURES[model_type], advance=False)
            outer = got.routed.input_statistic(range(8), new, CPU, weighted=weighted)
            inner = got.routed.inner_statistic(range(8), new, layer, CPU, weighted=weighted)
            found.append((got.linears["o"], outer, inner))

    for norm, gram in zip(*found, strict=True):
        assert torch.equal(norm.tokens_E, gram.tokens_E)
        # One sums in float64, the other in float32, 96 terms at the most: 96 * 2^-24.
        torch.testing.assert_close(norm.value.float(), gram.value.diagonal(dim1=1, dim2=2), rtol=6e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_with_routing_weights_a_token_counts_as_much_as_its_experts_output(tiny_model_factory, monkeypatch, model_type):
    monkeypatch.setattr("compression.collect.ENOUGH", 0)
    architecture = ARCHITECTURES[model_type]
    shell, saved, stream, index = first_mixture(tiny_model_factory(model_type), model_type)
    with shell.live(index, saved) as block:
        layer = moe_layer(architecture, block)
        _, (x_TD, ids_TK, weights_TK) = reference_inputs(block, stream, index)

        routed = collect(index, block, stream, {}, new=Gram, architecture=architecture, advance=False).routed
        outer = routed.input_statistic(range(8), Gram, CPU, weighted=True)
        inner = routed.inner_statistic(range(8), Gram, layer, CPU, weighted=True)

        for expert in range(8):
            chosen_T = (ids_TK == expert).any(1)
            weight_S1 = weights_TK[ids_TK == expert].double()[:, None]
            inside_SF = layer.gated(expert, x_TD[chosen_T]).double()
            for statistic, rows_SI in ((outer, x_TD[chosen_T].double()), (inner, inside_SF)):
                expected_II = rows_SI.mT @ (rows_SI * weight_S1) / max(len(rows_SI), 1)
                # float32 products and sums against float64: entry ij to within 96 * 2^-24 of the root of ii and jj.
                allowed = 6e-6 * expected_II.diagonal().amax().clamp(min=1e-9).item()
                torch.testing.assert_close(statistic.value[expert].double(), expected_II, rtol=1e-5, atol=allowed)


@torch.no_grad()
def test_matrices_that_are_fed_one_tensor_share_one_statistic(tiny_model_factory):
    shell, saved, stream, index = first_mixture(tiny_model_factory("mixtral"), "mixtral")

    with shell.live(index, saved) as block:
        linears = {name: block.self_attn.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        found = collect(index, block, stream, linears, new=Gram, architecture=ARCHITECTURES["mixtral"], advance=False).linears

    assert found["q_proj"] is found["k_proj"] is found["v_proj"]
    assert found["o_proj"] is not found["q_proj"]
    assert found["q_proj"].tokens_E.tolist() == [IDS_NS.numel()]  # counted once, not three times


@torch.no_grad()
def test_collecting_leaves_the_stream_where_it_is(tiny_model_factory):
    shell, saved, stream, index = first_mixture(tiny_model_factory("mixtral"), "mixtral")
    before = [hidden.clone() for hidden in stream.hidden]

    with shell.live(index, saved) as block:
        collect(index, block, stream, {}, new=Gram, architecture=ARCHITECTURES["mixtral"], advance=False)

    assert all(torch.equal(a, b) for a, b in zip(before, stream.hidden, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_advancing_leaves_the_stream_behind_the_untouched_block(tiny_model_factory, model_type):
    shell, saved, stream, index = first_mixture(tiny_model_factory(model_type), model_type)

    with shell.live(index, saved) as block:
        behind = [output_BSD.clone() for _, output_BSD in stream.peek(index, block)]
        collect(index, block, stream, {}, new=Gram, architecture=ARCHITECTURES[model_type], advance=True)

    assert all(torch.equal(a, b) for a, b in zip(behind, stream.hidden, strict=True))


@torch.no_grad()
def test_advancing_collects_the_very_same(tiny_model_factory):
    found = []
    for advance in (False, True):
        shell, saved, stream, index = first_mixture(tiny_model_factory("mixtral"), "mixtral")
        with shell.live(index, saved) as block:
            layer, linears = moe_layer(ARCHITECTURES["mixtral"], block), {"o": block.self_attn.o_proj}
            got = collect(index, block, stream, linears, new=Gram, architecture=ARCHITECTURES["mixtral"], advance=advance)
            inner = got.routed.inner_statistic(range(8), Gram, layer, CPU, weighted=True)
        found.append((got.linears["o"].value, got.routed.x_TD, inner.value))

    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe"])
def test_starved_experts_are_shown_their_next_best_tokens_and_well_fed_ones_only_their_own(tiny_model_factory, model_type):
    architecture = ARCHITECTURES[model_type]
    shell, saved, stream, index = first_mixture(tiny_model_factory(model_type), model_type, MANY_IDS_NS)
    with shell.live(index, saved) as block:
        _, (x_TD, ids_TK, weights_TK) = reference_inputs(block, stream, index)
        routed = collect(index, block, stream, {}, new=InputNorm, architecture=architecture, advance=False).routed
        outer = routed.input_statistic(range(EXPERTS), InputNorm, CPU, weighted=False)
        weighted = routed.input_statistic(range(EXPERTS), InputNorm, CPU, weighted=True)

    tokens = len(x_TD)
    enough = min(2 * EXPERT_WIDTH, tokens)
    logits_TE = reference_logits(x_TD, saved, architecture, index)
    probability_TE = logits_TE.sigmoid() if model_type == "deepseek_v3" else logits_TE.softmax(1)
    starved = 0
    for expert in range(EXPERTS):
        chosen_T = (ids_TK == expert).any(1)
        shown = chosen_T.nonzero().flatten().tolist()
        weight_of = {t: weights_TK[t, ids_TK[t] == expert].item() for t in shown}
        by_liking = sorted(range(tokens), key=lambda t: -probability_TE[t, expert].item())
        more = [t for t in by_liking if not chosen_T[t]][: max(0, enough - len(shown))]
        weight_of |= {t: probability_TE[t, expert].item() for t in more}
        shown += more
        starved += bool(more)
        assert routed.own_E[expert] == int(chosen_T.sum())
        assert routed.tokens_E[expert] == outer.tokens_E[expert] == max(int(chosen_T.sum()), enough)
        squares_SD = x_TD[shown].double().square()
        # Sums in float64 of squares taken in float32.
        torch.testing.assert_close(outer.value[expert], squares_SD.mean(0), rtol=1e-5, atol=0)
        counted_S = torch.tensor([weight_of[t] for t in shown], dtype=torch.float64)
        # The router's probabilities are float32 here and float64 there.
        torch.testing.assert_close(weighted.value[expert], (squares_SD * counted_S[:, None]).mean(0), rtol=1e-4, atol=1e-9)
    assert starved


def routed_tokens(probability_TE, ids_TK, *, enough):
    tokens = len(probability_TE)
    call = Routed(torch.arange(tokens * 2.0).view(tokens, 2), torch.tensor(ids_TK), torch.full((tokens, len(ids_TK[0])), 0.5))
    return RoutedTokens([call], torch.tensor(probability_TE), enough=enough)


def test_a_topped_up_expert_by_hand():
    # Expert 1 was chosen by token 2 only; of the others, tokens 3 and then 0 like it best.
    likes_TE = [[0.7, 0.3], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]

    routed = routed_tokens(likes_TE, [[0], [0], [1], [0]], enough=3)

    assert routed.own_E.tolist() == [3, 1]
    assert routed.tokens_E.tolist() == [3, 3]
    rows = {place: (rows_SD[:, 0].div(2).tolist(), w_S.tolist()) for place, rows_SD, w_S in routed._rows(range(2), CPU)}
    assert rows[0] == ([0, 1, 3], [0.5, 0.5, 0.5])
    assert rows[1] == ([2, 3, 0], pytest.approx([0.5, 0.4, 0.3]))


def test_no_token_is_shown_twice_when_all_of_them_are_too_few():
    routed = routed_tokens([[0.7, 0.3], [0.9, 0.1], [0.2, 0.8]], [[0], [0], [1]], enough=100)

    assert routed.tokens_E.tolist() == [3, 3]
    for _, rows_SD, _ in routed._rows(range(2), CPU):
        assert sorted(rows_SD[:, 0].tolist()) == [0.0, 2.0, 4.0]


def test_of_tokens_that_are_liked_equally_the_first_is_shown():
    routed = routed_tokens([[0.5, 0.5]] * 4, [[0]] * 4, enough=2)

    ((_, rows_SD, _),) = routed._rows(range(1, 2), CPU)
    assert rows_SD[:, 0].tolist() == [0.0, 2.0]


@torch.no_grad()
def test_an_infinite_activation_is_refused_by_the_name_of_the_matrix_it_enters(tiny_model_factory):
    shell, saved, stream, index = first_mixture(tiny_model_factory("mixtral"), "mixtral")
    stream.hidden[0][1, 5, 7] = torch.inf

    with shell.live(index, saved) as block:
        linears = {"model.q_proj": block.self_attn.q_proj}
        with pytest.raises(NonFiniteWeights, match=r"what enters model\.q_proj"):
            collect(index, block, stream, linears, new=Gram, architecture=ARCHITECTURES["mixtral"], advance=False)


@torch.no_grad()
@pytest.mark.parametrize("new", [Gram, InputNorm])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e25])
def test_what_is_not_finite_or_too_large_to_square_is_refused_by_name(tiny_model_factory, poison, new):
    shell, saved, stream, index = first_mixture(tiny_model_factory("mixtral"), "mixtral")
    saved["model.layers.0.self_attn.v_proj.weight"] = saved["model.layers.0.self_attn.v_proj.weight"].clone()
    saved["model.layers.0.self_attn.v_proj.weight"][3] = poison

    with shell.live(index, saved) as block:
        linears = {"model.q_proj": block.self_attn.q_proj, "model.o_proj": block.self_attn.o_proj}
        with pytest.raises(NonFiniteWeights, match=r"what enters model\.o_proj"):
            collect(index, block, stream, linears, new=new, architecture=ARCHITECTURES["mixtral"], advance=False)
