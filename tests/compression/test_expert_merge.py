"""Folding experts into centroids: who joins whom, and that the mean of aligned experts is what it should be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from compression.architectures import ARCHITECTURES
from compression.checkpoint.reader import Reader
from compression.moe import moe_layer
from compression.neurons import gate_up_down
from compression.recipe import ExpertDrop, ExpertMerge
from compression.trimming import Cuts, Routing, expert_drop
from compression.trimming.expert_merge import GROUP_SIZE, choose, grouped, merge_block, similarity
from tests.compression.analysis.studies import a_study, sample_of, statistics
from tests.tiny_models import MODEL_TYPES

FUSED = ("qwen3_vl_moe", "granitemoe", "granitemoe_swa")
MIXTRAL = ARCHITECTURES["mixtral"]


def alike(experts, pairs):
    alike_EE = torch.eye(experts, dtype=torch.float64)
    for (one, other), value in pairs.items():
        alike_EE[one, other] = alike_EE[other, one] = value
    return alike_EE


def alone(experts):
    return {expert: (expert,) for expert in experts}


def a_layer(saliency, angles, **given):
    """Return statistics of experts with these REAP scores, whose outputs point in these directions of a plane."""
    angle_E = torch.tensor(angles, dtype=torch.float64)
    output_ED = torch.stack([angle_E.cos(), angle_E.sin()], dim=1)
    ones_ME = torch.ones(1, len(saliency), dtype=torch.float64)
    known = {"weighted_norm_ME": torch.tensor([saliency], dtype=torch.float64), "count_ME": ones_ME}
    return statistics(len(saliency), width=2, **known, output_MED=output_ED[None], **given)


def mixtral_block(gate, up, down):
    """Return saved tensors of experts [E, F, D], [E, F, D], [E, D, F] in Mixtral's names, as block 3."""
    names = dict(zip(MIXTRAL.gate_up_down, (gate, up, down), strict=True))
    prefix = MIXTRAL.experts_prefix(3)
    tensors = {f"{prefix}.{e}.{name}.weight": stack[e] for name, stack in names.items() for e in range(len(gate))}
    return tensors | {MIXTRAL.router_name(3): torch.ones(len(gate), gate.shape[2])}


def expert_of(saved, expert):
    return [saved[f"{MIXTRAL.experts_prefix(3)}.{expert}.{name}.weight"] for name in MIXTRAL.gate_up_down]


def random_experts(count, width=6, hidden=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((count, width, hidden), (count, width, hidden), (count, hidden, width))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def opened(folder, row):
    return (AutoModelForImageTextToText if row.text_config else AutoModelForCausalLM).from_pretrained(folder)


def layer_of(model, row):
    return moe_layer(row, model.get_submodule(row.layers)[2])


def test_every_expert_joins_the_centroid_it_is_most_like():
    alike_EE = alike(5, {(0, 1): 0.9, (0, 2): 0.2, (3, 1): 0.1, (3, 2): 0.8, (0, 4): 0.5, (3, 4): 0.4})

    assert grouped(alike_EE, [0, 3], alone(range(5))) == {0: (0, 1, 4), 3: (2, 3)}


def test_a_full_centroid_sends_the_less_alike_to_the_next():
    alike_EE = alike(4, {(0, 1): 0.7, (0, 2): 0.9, (3, 1): 0.6, (3, 2): 0.8})

    assert grouped(alike_EE, [0, 3], alone(range(4))) == {0: (0, 2), 3: (1, 3)}


@pytest.mark.parametrize(("experts", "centroids"), [(8, 4), (8, 1), (40, 30), (128, 96), (128, 4)])
def test_no_group_is_larger_than_the_cap_and_nobody_is_lost(experts, centroids):
    groups = grouped(torch.ones(experts, experts), list(range(centroids)), alone(range(experts)))

    assert sorted(expert for group in groups.values() for expert in group) == list(range(experts))
    cap = max(min(GROUP_SIZE, experts // 2), -(-experts // centroids))
    assert max(map(len, groups.values())) <= cap
    assert max(map(len, groups.values())) == min(cap, experts - centroids + 1)  # all alike: the first takes what it can


def test_ties_go_to_the_lowest_ids():
    assert grouped(torch.ones(6, 6), [1, 4], alone(range(6))) == {1: (0, 1, 2), 4: (3, 4, 5)}


def test_what_was_merged_before_joins_as_a_whole():
    alike_EE = alike(6, {(0, 3): 0.9, (0, 5): 0.1, (3, 5): 0.2})

    assert grouped(alike_EE, [0, 5], {0: (0, 1), 3: (2, 3), 5: (5,)}) == {0: (0, 1), 5: (2, 3, 5)}
    assert grouped(alike_EE, [0], {0: (0, 1), 3: (2, 3), 5: (5,)}) == {0: (0, 1, 2, 3, 5)}


def test_the_most_salient_are_the_centroids_and_the_others_follow_their_outputs():
    layer = a_layer([5.0, 1.0, 1.0, 4.0], [0.0, 1.5, 0.1, 1.6])

    cuts = choose(a_study(layer), ExpertMerge(experts_kept=2), Cuts((0,), {0: (0, 1, 2, 3)}), Routing(4, 2))

    assert cuts.experts == {0: (0, 3)}
    assert cuts.merged == {0: {0: (0, 2), 3: (1, 3)}}


def test_sampled_outputs_outweigh_mean_outputs():
    output_SED = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]])
    layer = a_layer([1.0, 1.0], [0.0, 0.0])

    assert similarity(layer)[0, 1].item() == pytest.approx(1.0)
    assert similarity(replace(layer, sample=sample_of(output_SED)))[0, 1].item() == pytest.approx(-1.0)


def test_a_router_that_chooses_groups_keeps_equally_many_of_each_and_merges_inside_them():
    # By saliency alone 0 and 1 would stay; by outputs alone 3 would join 0.
    layer = a_layer([9.0, 8.0, 2.0, 1.0], [0.0, 3.0, 3.0, 0.0])

    cuts = choose(a_study(layer), ExpertMerge(experts_kept=2), Cuts((0,), {0: (0, 1, 2, 3)}), Routing(4, 1, groups=2))

    assert cuts.merged == {0: {0: (0, 1), 2: (2, 3)}}


def test_dropped_experts_are_in_no_group():
    study = a_study(a_layer([4.0, 0.5, 3.0, 2.0], [0.0, 0.0, 1.0, 1.0]))
    whole, routing = Cuts((0,), {0: (0, 1, 2, 3)}), Routing(4, 2)

    dropped = expert_drop.choose(study, ExpertDrop(experts_kept=3), whole, routing)
    cuts = choose(study, ExpertMerge(experts_kept=2), dropped, routing)

    assert cuts.merged == {0: {0: (0,), 2: (2, 3)}}


def test_merging_twice_leaves_groups_of_the_source_and_a_drop_takes_the_whole_group():
    study = a_study(a_layer([5.0, 1.0, 2.0, 4.0, 0.5, 0.4], [0.0, 0.1, 1.5, 1.6, 0.05, 1.55]))
    whole, routing = Cuts((0,), {0: tuple(range(6))}), Routing(6, 1)

    once = choose(study, ExpertMerge(experts_kept=3), whole, routing)
    twice = choose(study, ExpertMerge(experts_kept=2), once, routing)
    then = expert_drop.choose(study, ExpertDrop(experts_kept=1), twice, routing)

    assert once.merged == {0: {0: (0, 1, 4), 2: (2,), 3: (3, 5)}}
    assert twice.merged == {0: {0: (0, 1, 4), 3: (2, 3, 5)}}
    assert twice.experts == {0: (0, 3)}
    assert then.merged == {0: {0: (0, 1, 4)}}


def test_keeping_all_experts_merges_none_and_leaves_every_tensor_be():
    study = a_study(a_layer([5.0, 1.0], [0.0, 0.1]))
    cuts = choose(study, ExpertMerge(experts_kept=2), Cuts((0,), {0: (0, 1)}), Routing(2, 1))
    saved = mixtral_block(*random_experts(2))

    merged = merge_block(saved, MIXTRAL, 3, cuts.merged[0], torch.ones(2))

    assert cuts.merged == {0: {0: (0,), 1: (1,)}}
    assert all(merged[name] is tensor for name, tensor in saved.items())


def with_a_shuffled_copy(tiny_model_factory, model_type):
    """Return a family's row and tiny model with expert 5 a shuffled copy of expert 2, the experts, and 2's matrices."""
    row = ARCHITECTURES[model_type]
    model = opened(tiny_model_factory(model_type), row)
    experts = layer_of(model, row)
    wanted = [stack[2].clone() for stack in gate_up_down(experts)]
    _copy_shuffled_(experts, 5, 2, torch.randperm(128, generator=torch.Generator().manual_seed(4)))
    return row, model, experts, wanted


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *FUSED])
def test_merging_shuffled_copies_gives_the_very_expert_in_every_family(tiny_model_factory, tmp_path, model_type):
    row, model, _, _ = with_a_shuffled_copy(tiny_model_factory, model_type)
    model.save_pretrained(tmp_path)
    saved = Reader(tmp_path).block(2)

    merged = merge_block(saved, row, 2, {2: (2, 5), 3: (3,)}, torch.rand(8) + 0.1)

    assert merged.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(merged[name], tensor)  # the very bits: differences of aligned copies are zero


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *FUSED])
def test_the_mean_lies_between_aligned_experts_in_every_family(tiny_model_factory, tmp_path, model_type):
    row, model, experts, wanted = with_a_shuffled_copy(tiny_model_factory, model_type)
    for factor, stack in zip((1.5, 3.0, 2.0), gate_up_down(experts), strict=True):
        stack[5] *= factor  # cosines stay one where all three are scaled alike, and near one here
    model.save_pretrained(tmp_path)

    saved = Reader(tmp_path).block(2)
    before = {name: tensor.clone() for name, tensor in saved.items()}

    merged = merge_block(saved, row, 2, {2: (2, 5)}, torch.tensor([0, 0, 3.0, 0, 0, 1.0, 0, 0]))

    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.items())  # the argument is left alone
    loaded = opened(_with_block(tmp_path, merged), row)
    for factor, stack, own in zip((1.5, 3.0, 2.0), gate_up_down(layer_of(loaded, row)), wanted, strict=True):
        # Three parts itself, one part itself times the factor; float32 rounding of three operations.
        torch.testing.assert_close(stack[2], own * (3 + factor) / 4, rtol=1e-6, atol=1e-7)


def test_two_neurons_by_hand():
    gate = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [5.0, 0.0]]])
    up = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [2.0, 0.0]]])
    down = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 4.0], [4.0, 0.0]]])

    merged = merge_block(mixtral_block(gate, up, down), MIXTRAL, 3, {0: (0, 1)}, torch.tensor([3.0, 1.0]))

    # Neuron 0 of the one is neuron 1 of the other; weights 3/4 and 1/4.
    w1, w3, w2 = expert_of(merged, 0)
    assert w1.tolist() == [[2.0, 0.0], [0.0, 1.5]]
    assert w3.tolist() == [[1.25, 0.0], [0.0, 1.25]]
    assert w2.tolist() == [[1.75, 0.0], [0.0, 1.75]]


def test_a_member_without_saliency_changes_nothing():
    saved = mixtral_block(*random_experts(3))
    with_it = merge_block(saved, MIXTRAL, 3, {0: (0, 1, 2)}, torch.tensor([2.0, 0.0, 1.0]))
    without = merge_block(saved, MIXTRAL, 3, {0: (0, 2)}, torch.tensor([2.0, 7.0, 1.0]))

    assert all(torch.equal(one, other) for one, other in zip(expert_of(with_it, 0), expert_of(without, 0), strict=True))


def test_a_group_that_no_token_ever_reached_leaves_the_centroid_as_it_is():
    saved = mixtral_block(*random_experts(2))

    merged = merge_block(saved, MIXTRAL, 3, {0: (0, 1)}, torch.zeros(2))

    assert all(merged[name] is tensor for name, tensor in saved.items())


def test_experts_outside_groups_and_the_router_keep_their_very_tensors():
    saved = mixtral_block(*random_experts(4, dtype=torch.bfloat16))

    merged = merge_block(saved, MIXTRAL, 3, {0: (0, 2), 1: (1,)}, torch.ones(4))

    changed = {name for name, tensor in saved.items() if merged[name] is not tensor}
    assert changed == {f"{MIXTRAL.experts_prefix(3)}.0.{name}.weight" for name in MIXTRAL.gate_up_down}
    assert {merged[name].dtype for name in changed} == {torch.bfloat16}
    assert all(merged[name].is_contiguous() for name in changed)


def test_the_mean_is_rounded_once_to_the_saved_dtype():
    wide = random_experts(3, dtype=torch.bfloat16)
    for stack in wide:
        stack[1:] = stack[:1] + 0.01 * stack[1:]  # so alike that every neuron stays in its place
    weight_E = torch.tensor([1.0, 2.0, 3.0])

    merged = merge_block(mixtral_block(*wide), MIXTRAL, 3, {0: (0, 1, 2)}, weight_E)

    for stack, mean in zip(wide, expert_of(merged, 0), strict=True):
        exact = torch.einsum("e,eab->ab", weight_E.double() / 6, stack.double())
        assert torch.equal(mean, exact.bfloat16())


def test_merging_in_two_steps_gives_what_merging_the_union_gives():
    study = a_study(a_layer([5.0, 1.0, 2.0], [0.0, 0.1, 1.0]))
    routing, whole = Routing(3, 1), Cuts((0,), {0: (0, 1, 2)})
    once = choose(study, ExpertMerge(experts_kept=2), whole, routing)
    twice = choose(study, ExpertMerge(experts_kept=1), once, routing)
    at_once = choose(study, ExpertMerge(experts_kept=1), whole, routing)

    assert twice.merged == at_once.merged == {0: {0: (0, 1, 2)}}


def _copy_shuffled_(layer, into, source, shuffle_F):
    """Make one live expert a copy of another with its neurons in another order."""
    for stack in gate_up_down(layer):
        stack[into] = stack[source][shuffle_F]
    if layer.experts.has_bias:
        both, down = layer.experts.gate_up_proj_bias.data, layer.experts.down_proj_bias.data
        both[into] = both[source].view(-1, 2)[shuffle_F].flatten()  # gate and up alternate in the one family that has biases
        down[into] = down[source]


def _with_block(folder, tensors):
    """Put saved tensors in the place of a checkpoint's and return its folder."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **{name: tensor.contiguous() for name, tensor in tensors.items()}}, file, {"format": "pt"})
    return folder
