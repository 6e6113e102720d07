"""The sweep computes what the stock model computes, bit for bit, for every row of the table."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from compression.block import Shell
from compression.checkpoint.reader import Reader
from compression.errors import BrokenCheckpoint, NonFiniteWeights, Stopped
from compression.sweep import Push, Stream, sweep
from tests.tiny_models import MODEL_TYPES, VARIANTS


def ignore(done: int, blocks: int, message: str) -> None: ...


def sweep_logits(folder, ids_NS, mask_NS=None):
    reader = Reader(folder)
    shell = Shell(reader.config, reader.outside())
    stream = Stream(shell, ids_NS, mask_NS)
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
