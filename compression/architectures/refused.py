"""Mixtures that transformers knows and this project does not compress, each with the reason that a caller is told."""

from __future__ import annotations

_HANDS_ON = "its blocks hand each other more than hidden states, and a block on its own cannot be given that"
_TOWERS = "where its language model lies among its towers is not described, nor proved against the stock class"
_BESIDE = "its experts work beside a dense layer in the same block, and what may be cut there is not described"

REFUSED: dict[str, str] = {
    "aria": _TOWERS,
    "aria_text": "its experts are stored turned in one 3-D tensor, in a layout that is not described",
    "beam": "a block scales what it adds by its own index, so it computes something else once its place has changed",
    "deepseek_ocr2": _TOWERS,
    "deepseek_v4": "some of its routers look experts up by token in a table, which cannot be cut to fewer experts",
    "diffusion_gemma": "it writes by diffusion, so it has no logits of a next token to be measured by",
    "dots3_note": _TOWERS,
    "dots3_note_text": "its expert counts may differ from block to block, and what is cut with a block is not described",
    "ernie4_5_vl_moe": "every block has two routers with experts of different widths, for text and for pictures",
    "gemma4": _BESIDE,
    "gemma4_text": _BESIDE,
    "glm4v_moe": _TOWERS,
    "glm5_next": _HANDS_ON,
    "glm_moe_dsa": _HANDS_ON,
    "hy_v4": _HANDS_ON,
    "inkling2": _TOWERS,
    "inkling2_text": "its blocks lie under another name than the stock class gives them, and its router is not described",
    "inkling_mm_model": _TOWERS,
    "inkling_text": "convolutions stand between the parts of a block, and its files are not described",
    "minimax_m3_vl": _TOWERS,
    "minimax_m3_vl_text": "gate and up lie in one matrix in dense layers and shared experts too, a layout that is not described",
    "mistral4": "transformers does not list it among language models, by which a checkpoint is opened here",
    "mistral_large4": _HANDS_ON,
    "muse_spark": "every expert has a norm of its own behind it, which the experts' formula does not know",
    "nemotron_h": "its experts have no gate matrix, which every method here takes for granted",
    "openai_privacy_filter": "it sorts tokens into classes, so it has no logits of a next token to be measured by",
    "qwen3_omni_moe_thinker": "it is stored as part of qwen3_omni_moe, which is supported",
    "qwen4_exp": _TOWERS,
    "qwen4_exp_text": "its blocks read an embedding of token sequences beside the hidden states, which is not described",
    "unlimited_ocr": _TOWERS,
    "zaya": _HANDS_ON,
}
"""Mixtures that transformers knows and that are not in the table, each with what is in the way."""
