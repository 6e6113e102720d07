"""The sweep computes what the stock model computes, bit for bit, for every row of the table."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.errors import BrokenCheckpoint, NonFiniteWeights, Stopped
from compression.sweep import Push, Stream, sweep, working_dtype
from tests.tiny_models import MODEL_TYPES, VARIANTS


def ignore(done: int, blocks: int, message: str) -> None: ...


def sweep_logits(folder, ids_NS, mask_NS=None, dtype=None):
    reader = Reader(folder)
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, ids_NS, mask_NS, dtype=dtype)
    sweep(shell, reader, stream, Push(), ignore)
    return torch.cat(list(stream.logits(shell)))


@torch.no_grad()
def stock_logits(folder, ids_NS, mask_NS=None):
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids_NS, attention_mask=mask_NS, use_cache=False).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *VARIANTS])
def test_sweep_logits_equal_stock_logits_bit_for_bit(tiny_model_factory, model_type, dtype):
    folder = tiny_model_factory(model_type, dtype=dtype)
    ids_NS = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(1))

    swept_NSV = sweep_logits(folder, ids_NS)

    assert torch.equal(swept_NSV, stock_logits(folder, ids_NS))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_padded_batch_gets_the_masks_that_the_stock_model_makes(tiny_model_factory, model_type):
    folder = tiny_model_factory(model_type)
    ids_NS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    mask_NS = torch.ones_like(ids_NS)
    mask_NS[1, :10] = 0

    swept_NSV = sweep_logits(folder, ids_NS, mask_NS)

    assert torch.equal(swept_NSV, stock_logits(folder, ids_NS, mask_NS))


def test_a_sharded_checkpoint_is_swept_through_its_index(tiny_model_factory):
    folder = tiny_model_factory("mixtral", max_shard_size="300KB")
    ids_NS = torch.arange(3, 35).view(2, 16)

    assert (folder / "model.safetensors.index.json").exists()
    assert torch.equal(sweep_logits(folder, ids_NS), stock_logits(folder, ids_NS))


def test_micro_batches_do_not_change_what_a_sequence_computes_beyond_its_batch_shape(tiny_model_factory, monkeypatch):
    folder = tiny_model_factory("mixtral")
    ids_NS = torch.arange(3, 99).view(6, 16)
    monkeypatch.setattr("compression.sweep.TOKENS_PER_MICRO_BATCH", 32)

    swept_NSV = sweep_logits(folder, ids_NS)

    assert torch.equal(swept_NSV, torch.cat([stock_logits(folder, ids_BS) for ids_BS in ids_NS.split(2)]))


def test_every_block_is_let_go_after_its_visit(tiny_model_factory):
    reader = Reader(tiny_model_factory("deepseek_v3"))
    shell = Shell(reader.config, reader.outside())

    sweep(shell, reader, Stream(shell, torch.arange(3, 19)[None]), Push(), ignore)

    assert all(tensor.is_meta for block in shell.blocks for tensor in block.state_dict().values())


def test_a_block_with_a_missing_tensor_is_refused_by_name(tiny_model_factory):
    reader = Reader(tiny_model_factory("olmoe"))
    shell = Shell(reader.config, reader.outside())
    saved = reader.block(0)
    del saved["model.layers.0.self_attn.q_proj.weight"]

    with pytest.raises(BrokenCheckpoint, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"), shell.live(0, saved):
        pass


def test_a_nan_in_a_weight_stops_the_sweep_and_names_the_tensor(tiny_model_factory):
    reader = Reader(tiny_model_factory("mixtral"))
    shell = Shell(reader.config, reader.outside())
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    original = reader.block

    def poisoned(index):
        saved = original(index)
        if name in saved:
            saved[name][0, 0] = torch.nan
        return saved

    reader.block = poisoned

    with pytest.raises(NonFiniteWeights, match=name.replace(".", r"\.")):
        sweep(shell, reader, Stream(shell, torch.arange(3, 19)[None]), Push(), ignore)


def test_a_nan_among_the_activations_stops_the_sweep_and_names_the_block(tiny_model_factory):
    reader = Reader(tiny_model_factory("mixtral"))
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, torch.arange(3, 19)[None])
    stream.hidden[0][0, 3, 5] = torch.inf

    with pytest.raises(NonFiniteWeights, match="leaving block 0"):
        sweep(shell, reader, stream, Push(), ignore)


def test_the_sweep_stops_at_the_end_of_a_block_when_asked(tiny_model_factory):
    reader = Reader(tiny_model_factory("mixtral"))
    shell = Shell(reader.config, reader.outside())
    finished = []

    def stop_after_two(done, blocks, message):
        finished.append(done)
        if done == 2:
            raise Stopped("enough")

    with pytest.raises(Stopped):
        sweep(shell, reader, Stream(shell, torch.arange(3, 19)[None]), Push(), stop_after_two)
    assert finished == [1, 2]


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *VARIANTS])
def test_in_float32_a_sweep_computes_what_the_stock_model_computes_with_the_same_weights(tiny_model_factory, model_type):
    folder = tiny_model_factory(model_type, dtype="bfloat16")
    ids_NS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(6))
    mask_NS = torch.ones_like(ids_NS)
    mask_NS[1, :10] = 0

    swept_NSV = sweep_logits(folder, ids_NS, mask_NS, torch.float32)

    stock = AutoModelForCausalLM.from_pretrained(folder).float()
    # What the stored model passes to every block stays as that model computes it: rotary tables are rounded to bf16.
    stock.model.rotary_emb.register_forward_hook(lambda _m, _a, tables: rounded(tables))
    expected_NSV = stock(input_ids=ids_NS, attention_mask=mask_NS, use_cache=False).logits
    assert swept_NSV.dtype == torch.float32
    assert torch.equal(swept_NSV, expected_NSV)
    assert not torch.equal(swept_NSV, sweep_logits(folder, ids_NS, mask_NS).float())


def rounded(tables):
    if isinstance(tables, tuple):
        return tuple(table.bfloat16().to(table.dtype) for table in tables)
    return tables


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("device", "stored", "avx512", "amx", "worked_in"),
    [
        (CPU, BF16, False, False, F32),
        (CPU, BF16, True, False, BF16),
        (CPU, BF16, False, True, BF16),
        (CPU, F16, True, True, F32),  # what multiplies bf16 does not multiply half precision
        (CPU, F32, True, True, F32),
        (CUDA, BF16, False, False, BF16),
        (CUDA, F16, False, False, F16),
    ],
)
def test_blocks_are_worked_in_float32_only_where_the_processor_lacks_16_bit_arithmetic(
    monkeypatch, device, stored, avx512, amx, worked_in
):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)

    assert working_dtype(device, stored) == worked_in


@torch.no_grad()
def test_what_a_module_is_remembered_to_have_answered_it_answers_again_once(tiny_model_factory, monkeypatch):
    monkeypatch.setattr("compression.sweep.TOKENS_PER_MICRO_BATCH", 32)
    reader = Reader(tiny_model_factory("mixtral"))
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, torch.arange(3, 99).view(6, 16))
    with shell.live(0, reader.block(0)) as block:
        expected = [output_BSD for _, output_BSD in stream.peek(0, block)]
        with stream.remembered(block.self_attn):
            list(stream.peek(0, block))
        block.self_attn.o_proj.weight.zero_()  # from here on what attention would answer is wrong

        with stream.repeated(block.self_attn):
            repeated = [output_BSD for _, output_BSD in stream.peek(0, block)]
        with stream.repeated(block.self_attn):
            computed = [output_BSD for _, output_BSD in stream.peek(0, block)]

    assert len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(repeated, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(computed, expected, strict=True))
