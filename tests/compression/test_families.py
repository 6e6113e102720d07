"""The compact tests of every family beyond the eight: what is read off its row is true of the stock class.

Each is counted, swept, trimmed, quantized, written and opened again; the reference is always the stock class.

Shapes: N sequences, S tokens each, V vocabulary, T tokens, K experts per token, D width, E experts.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.quantization.utils import is_module_quantized
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from compression.architectures import ARCHITECTURES, REFUSED
from compression.block import Shell, language_model, stock_class
from compression.checkpoint.headers import FolderFiles, read_checkpoint
from compression.checkpoint.reader import Reader
from compression.checkpoint.schemes import quantization_config
from compression.checkpoint.writer import Writer
from compression.errors import ImpossibleStep, NotLoadableInProfile
from compression.moe import by_expert, moe_layer
from compression.observer import Observer
from compression.pipeline import compress
from compression.plan import make_plan
from compression.planner.inventory import take_inventory
from compression.planner.sizes import Cut, artifact_sizes, kv_cache_bytes
from compression.recipe import Quantize
from compression.request import Compression, Serving
from compression.sweep import Push, Stream, sweep
from compression.trimming import Cuts
from compression.trimming.surgery import cut_block, cut_config
from tests.tiny_models import MODEL_TYPES, MORE_MODEL_TYPES

EVERY = pytest.mark.parametrize("model_type", MORE_MODEL_TYPES)
PACKED = [n for n in MORE_MODEL_TYPES if not ARCHITECTURES[n].fused_on_disk and "quantize" not in ARCHITECTURES[n].refuses]
PACKABLE = pytest.mark.parametrize("model_type", PACKED)
PRUNABLE = pytest.mark.parametrize("model_type", [n for n in MORE_MODEL_TYPES if "prune" not in ARCHITECTURES[n].refuses])
FUSED = pytest.mark.parametrize("model_type", [name for name in MORE_MODEL_TYPES if ARCHITECTURES[name].fused_on_disk])
WORDS = "the expert the router chose was not the one that the other tokens had wanted so they went home "
IDS_NS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(2))
MASK_NS = torch.ones_like(IDS_NS)
MASK_NS[1, :10] = 0
QUANTIZE = {"step": "quantize", "scheme": "W4A16", "group_size": 32}


def ignore(done, blocks, message):
    pass


@pytest.fixture
def folder(tiny_model_factory, model_type) -> Path:
    return tiny_model_factory(model_type, dtype="bfloat16")


def row_of(folder):
    return ARCHITECTURES[json.loads((folder / "config.json").read_text())["model_type"]]


@cache
def language_model_of(folder):
    """The stock model in a folder, or of several towers the one that reads and writes text."""
    stock = stock_class(json.loads((folder / "config.json").read_text()))
    return language_model(row_of(folder), stock.from_pretrained(folder).eval())


@torch.no_grad()
def stock_logits(folder, mask_NS=None):
    return language_model_of(folder)(input_ids=IDS_NS, attention_mask=mask_NS, use_cache=False).logits


def a_request(folder, steps, **more):
    return Compression.model_validate(
        {
            "model": folder.as_uri(),
            "recipe": {"steps": steps},
            "calibration": {"source": {"inline": [WORDS * 8]}, "samples": 4, "sequence_length": 24},
            "evaluation": {"perplexity": {"source": {"inline": [WORDS[::-1] * 4]}, "samples": 1}},
            **more,
        }
    )


def saved(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_bytes(left, right):
    return left.dtype == right.dtype and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def test_every_mixture_of_the_installed_transformers_is_in_the_table_or_refused_by_name():
    assert set(MORE_MODEL_TYPES) | set(MODEL_TYPES) == set(ARCHITECTURES)
    listed = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    found = set()
    for modeling in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        if not re.search(r"^@use_experts_implementation", modeling.read_text(), re.MULTILINE):
            continue
        configs = "".join(path.read_text() for path in modeling.parent.glob("configuration_*.py"))
        own = set(re.findall(r'^    model_type = "(\w+)"', configs, re.MULTILINE))
        # Only a model that is opened by itself can be a checkpoint; one that no list knows goes by its folder's name.
        found |= {name for name in own if name in listed} or {modeling.parent.name}

    assert len(found) > 64
    assert found == set(ARCHITECTURES) | set(REFUSED)


@EVERY
def test_every_byte_is_counted_and_every_mixture_is_found(folder, model_type):
    checkpoint = read_checkpoint(FolderFiles(folder))

    inventory = take_inventory(checkpoint)

    assert inventory.left_behind == ()
    assert inventory.bytes == sum(header.bytes for header in checkpoint.tensors.values())
    assert artifact_sizes(inventory, Cut(inventory.experts)).total == inventory.bytes
    assert (inventory.experts, inventory.top_k) == (8, 2)
    live = language_model_of(folder).get_decoder().layers
    assert [block.is_mixture for block in inventory.blocks] == [moe_layer(inventory.architecture, b) is not None for b in live]


@torch.no_grad()
@pytest.mark.parametrize("mask_NS", [None, MASK_NS], ids=["full", "padded"])
@EVERY
def test_sweep_logits_equal_stock_logits_bit_for_bit(folder, model_type, mask_NS):
    reader = Reader(folder)
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, IDS_NS, mask_NS)

    sweep(shell, reader, stream, Push(), ignore)

    expected_NSV = stock_logits(folder, mask_NS)
    assert expected_NSV.isfinite().all()
    assert torch.equal(torch.cat(list(stream.logits(shell))), expected_NSV)


@torch.no_grad()
@EVERY
def test_the_expert_formula_is_that_of_the_stock_module_and_the_router_answers_as_the_row_says(folder, model_type):
    row = ARCHITECTURES[model_type]
    block = next(b for b in reversed(language_model_of(folder).get_decoder().layers) if moe_layer(row, b) is not None)
    layer = moe_layer(row, block)
    logits, calls = [], []
    hook = block.get_submodule(row.running_router).register_forward_hook(lambda _m, _a, out: logits.append(out[0].flatten(0, -2)))

    with layer.watched(calls.append):
        stock_logits(folder)
    hook.remove()

    (call,), (logits_TE,) = calls, logits
    summed_TD = torch.zeros(48, 64)
    for expert, tokens, places in by_expert(call.ids_TK, layer.count):
        output_SD = layer.output(expert, call.x_TD[tokens]).float()
        summed_TD.index_add_(0, tokens, call.weights_TK[tokens, places, None].float() * output_SD)
    stock_TD = layer.experts(*call).float()
    # bf16 keeps 8 bits: outputs and their sum are rounded at other places, a few units of the largest each.
    torch.testing.assert_close(summed_TD, stock_TD, rtol=0, atol=float(stock_TD.abs().max()) * 2**-6)
    assert logits_TE.shape == (48, 8)
    logits_TE = logits_TE.float()
    chosen_TK = (logits_TE.sigmoid() if row.router_scores == "sigmoid" else logits_TE.softmax(-1)).gather(1, call.ids_TK)
    # However a router scales and norms its weights, the two of a token stand as the probabilities do.
    share_TK = call.weights_TK.float() / call.weights_TK.float().sum(1, keepdim=True)
    torch.testing.assert_close(share_TK, chosen_TK / chosen_TK.sum(1, keepdim=True), rtol=0, atol=2**-6)


@EVERY
def test_a_run_that_trims_leaves_what_the_stock_class_computes_without_what_was_dropped(folder, model_type, tmp_path):
    row, out = ARCHITECTURES[model_type], tmp_path / "out"
    can_drop_blocks = "block_drop" not in row.refuses
    steps = [{"step": "expert_drop", "criterion": "reap", "experts_kept": 4}]
    steps += [{"step": "block_drop", "blocks_dropped": 1}] if can_drop_blocks else []
    request = a_request(folder, steps, constraints={"on_violation": "report"})
    plan = make_plan(request, read_checkpoint(FolderFiles(folder)))

    report = compress(request, folder, out, host_memory=1)  # so little that it is verified in windows

    assert report.verification.mode == "windows"
    assert report.verification.largest_logit_difference == 0
    assert sum(header.bytes for header in read_checkpoint(FolderFiles(out)).tensors.values()) == plan.tensor_bytes
    experts = {block.index: block.experts_kept for block in report.blocks if block.action == "keep"}
    assert len(experts) == (3 if can_drop_blocks else 4)
    assert torch.equal(stock_logits(out), logits_without(folder, experts))
    before, after = saved(folder), saved(out)
    for name in before:
        if row.block_of(name) is None:
            assert same_bytes(after[name], before[name]), name


@torch.no_grad()
def logits_without(folder, experts):
    """Logits of the original model with the dropped blocks skipped: no block knows that its place has changed."""
    reader, row = Reader(folder), row_of(folder)
    everything = tuple(range(row.block_count(reader.config)))
    counts = {source: kept or () for source, kept in experts.items() if kept is not None}
    uniform = Cuts(everything, {source: (0, 1, 2, 3) for source in everything if row.router_name(source) in reader.dense.tensors})
    shell = Shell(cut_config(reader.config, row, uniform), reader.outside())
    stream = Stream(shell, IDS_NS)
    for source in experts:
        saved_block = cut_block(reader.block(source), row, Cuts(everything, counts), source)
        with shell.live(source, saved_block) as block:
            stream.push(source, block)
    return torch.cat(list(stream.logits(shell)))


@PRUNABLE
def test_experts_are_pruned_and_every_part_that_may_be_is_quantized_and_the_stock_class_opens_it(folder, model_type, tmp_path):
    row = ARCHITECTURES[model_type]
    steps = [{"step": "prune", "method": "wanda", "pattern": "2:4"}]
    parts = [part for part in ("attention", "shared_experts", "dense") if part not in row.refuses]
    if "quantize" not in row.refuses:
        steps.append({**QUANTIZE, "method": "gptq", **dict.fromkeys(parts, "W8A16")})

    report = compress(a_request(folder, steps), folder, tmp_path / "out")

    assert report.verification.mode == "whole"
    assert report.verification.largest_logit_difference == 0
    assert report.bytes_after == report.bytes_planned
    before, after = saved(folder), saved(tmp_path / "out")
    changed = {name for name in before if name not in after or not same_bytes(after[name], before[name])}
    meant = {"experts"} if "quantize" in row.refuses else {"experts", *parts}
    assert {row.component_of(name) for name in changed} == {row.component_of(name) for name in before} & meant
    assert {name for name in before if row.expert_of(name) is not None} <= changed
    assert {entry.zeros >= 0.5 for entry in report.ledger if ".experts." in entry.tensor} == {True}


@PACKABLE
def test_where_experts_alone_are_quantized_the_stock_class_takes_no_linear_layer_for_quantized(folder, model_type):
    reader = Reader(folder)
    config = quantization_config(ARCHITECTURES[model_type], Quantize(**{**QUANTIZE, "method": "rtn"}))

    shell = Shell({**reader.config, "quantization_config": config}, reader.outside())

    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    assert [name for name, module in shell.model.named_modules() if is_module_quantized(module)] == []


@FUSED
def test_experts_saved_in_one_tensor_are_not_quantized(folder, model_type):
    with pytest.raises(NotLoadableInProfile, match=f"{model_type} saves all experts of a layer in one 3-D tensor"):
        make_plan(a_request(folder, [{**QUANTIZE, "method": "rtn"}]), read_checkpoint(FolderFiles(folder)))


@EVERY
@torch.no_grad()
def test_the_layers_cosine_is_that_between_the_block_with_its_moe_layer_and_without(folder, model_type):
    row, reader = row_of(folder), Reader(folder)
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, IDS_NS)
    observer = Observer(row, ("text",), torch.zeros(len(IDS_NS), dtype=torch.int64))
    for index in range(len(shell.blocks)):
        with shell.live(index, reader.block(index)) as block:
            layer = moe_layer(row, block)
            if layer is None:
                stream.push(index, block)
                continue
            whole = torch.cat([output for _, output in stream.peek(index, block)])
            for path in (row.running_moe, *row.shared_beside):
                module = block.get_submodule(path)
                module.forward = lambda x, *_, **__: torch.zeros_like(x)
            without = torch.cat([output for _, output in stream.peek(index, block)])
            for path in (row.running_moe, *row.shared_beside):
                block.get_submodule(path).__dict__.pop("forward")
            expected = torch.cosine_similarity(without.double(), whole.double(), dim=-1).mean().item()
            observer.visit(index, block, stream)
        # bf16 on either side: its rounding is 4e-3 of a number, and averages out over tokens and widths
        assert observer.study.experts[index].layer_cosine == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("model_type", "part"), [(name, part) for name in MORE_MODEL_TYPES for part in ARCHITECTURES[name].refuses]
)
def test_what_a_row_refuses_is_refused_by_name(folder, model_type, part):
    steps = {
        "block_drop": {"step": "block_drop", "blocks_dropped": 1},
        "prune": {"step": "prune", "method": "magnitude", "sparsity": 0.5},
        "quantize": {**QUANTIZE, "method": "rtn"},
        "awq": {**QUANTIZE, "method": "awq"},
        "layer_drop": {"step": "layer_drop", "layers_dropped": 1},
    }
    step = steps.get(part, {**QUANTIZE, "method": "rtn", part: "W8A16"})

    with pytest.raises(ImpossibleStep, match=f"{model_type} does not allow {part}"):
        make_plan(a_request(folder, [step]), read_checkpoint(FolderFiles(folder)))


@torch.no_grad()
@EVERY
def test_one_perturbed_expert_matrix_is_the_only_thing_that_changes_in_the_saved_file(folder, model_type):
    reader, row = Reader(folder), ARCHITECTURES[model_type]
    index = take_inventory(read_checkpoint(FolderFiles(folder))).droppable[0]
    shell = Shell(reader.config, reader.outside())
    with shell.live(index, reader.block(index)) as block:
        before = saved_of(shell, block, index)
        moe_layer(row, block).stack("down_proj", range(5, 6)).add_(1.0)
        changed = saved_of(shell, block, index)

    assert changed.keys() == before.keys() == reader.block(index).keys()
    different = [name for name in before if not same_bytes(changed[name], before[name])]
    if row.fused_on_disk:
        assert different == [f"{row.prefix(index)}{row.fused_places[1]}"]
        moved_E = (changed[different[0]] != before[different[0]]).flatten(1).any(1)
        assert moved_E.nonzero().flatten().tolist() == [5]
    else:
        assert different == [f"{row.experts_prefix(index)}.5.{row.gate_up_down[2]}.weight"]


def saved_of(shell, block, index):
    """What the stock class would save of a live block."""
    from transformers.core_model_loading import revert_weight_conversion

    path = next(name for name, module in shell.model.named_modules() if module is block)
    state = {f"{path}.{name}": tensor.clone() for name, tensor in block.state_dict().items()}
    return revert_weight_conversion(shell.model, state)


@pytest.mark.parametrize(
    ("model_type", "per_token", "per_windowed_token"),
    [
        ("lfm2_moe", 2 * 2 * 32, 0),  # convolutions in two of four blocks; 2 heads of 16, keys and values
        ("kimi_linear", 2 * (64 + 16), 0),  # linear attention in two; the latent and its rotary part
        ("deepseek_v32", 4 * (64 + 16 + 32), 0),  # the indexer has keys of its own
        ("mimo_v2_flash", 2 * 2 * (32 + 16), 2 * 4 * (32 + 16)),  # twice the heads where a window slides
    ],
)
def test_the_cache_counts_what_grows_with_the_text(folder, model_type, per_token, per_windowed_token):
    inventory = take_inventory(read_checkpoint(FolderFiles(folder)))

    cache = kv_cache_bytes(inventory, Cut(8), Serving(context_tokens=100, batch_size=3))

    assert cache == 3 * 2 * (100 * per_token + 8 * per_windowed_token)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe"])
def test_what_prepares_pictures_and_sound_travels_with_the_artifact(folder, model_type, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    files = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.jinja")
    for name in files:
        (source / name).write_text("{}")
    writer = Writer(out, json.loads((folder / "config.json").read_text()))
    writer.outside({"model.visual.pos_embed.weight": torch.ones(2, 2)})

    writer.finish(source)

    assert {name for name in files if (out / name).exists()} == set(files)
