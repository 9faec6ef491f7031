"""The reference model before training: transformers' classes, at a small size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtprune_fx.reference.pictures import SIDE
from vtprune_fx.reference.questions import draw_samples
from vtprune_fx.reference.random_llava import CHAT_TEMPLATE
from vtprune_fx.reference.tokenizer import (
    BOS_ID,
    EOS_ID,
    IMAGE_ID,
    PAD_ID,
    trained_tokenizer,
)

PATCH = 20
VISUAL_TOKENS = (SIDE // PATCH) ** 2
"""Visual tokens of a picture."""
WIDTH = 128
VISION_LAYERS = 4
DECODER_LAYERS = 8
HEADS = 4

TURN = "USER: {image}{question} ASSISTANT:"
"""One turn, as ``CHAT_TEMPLATE`` writes it."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows each word of the questions as one token."""
    # 2048 tokens are more than there are merges.
    return trained_tokenizer(_texts(), vocab_size=2048, longest=2048)


def _texts() -> Iterable[str]:
    for sample in draw_samples("train", 0, 1500):
        for question in sample.questions:
            asked = TURN.format(image="\n", question=question.text)
            yield f"{asked} {question.answer}"


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """LLaVA-1.5's processor for pictures of ``SIDE`` pixels."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _config(vocabulary: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        # With the usual 0.02, made for wide models, a narrow model's attention starts
        # so even that it is long in finding out where to look.
        initializer_range=WIDTH**-0.5,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        dtype="float32",
    )


def build_model(vocabulary: int, seed: int) -> LlavaForConditionalGeneration:
    """The untrained model.

    Args:
        vocabulary: Tokens of the tokenizer.
        seed: Seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(_config(vocabulary))
    _start_from_words(model)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        max_new_tokens=12,
        do_sample=False,
    )
    return model


@torch.no_grad()
def _start_from_words(model: LlavaForConditionalGeneration) -> None:
    """Let the decoder start from what its tokens say, and change little of it.

    Embeddings are as loud as what layers read, MLPs add nothing yet, and attention
    looks for what is like the token and copies it: queries and keys start from the same
    weights, outputs from those of the values, transposed (mimetic initialisation,
    Trockman and Kolter, arXiv:2305.09828).
    """
    decoder = model.model.language_model
    decoder.embed_tokens.weight /= decoder.embed_tokens.weight.std()
    decoder.norm.weight.fill_(WIDTH**-0.5)  # or the tied embeddings' logits were loud
    for layer in decoder.layers:
        attention = layer.self_attn
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T / 2)
        layer.mlp.down_proj.weight.zero_()
