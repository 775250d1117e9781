"""The networks of the miniature: SD3's own classes at 64 x 64 pixels, with a closed vocabulary and no T5.

The VAE maps 64 x 64 pixels to 8 x 8 x 16 latents. The patch size is 1, so there are 64 image tokens of 16 numbers in a
width of 64; with patch size 2 the noise alone would fill the width. Two CLIP text encoders of width 32 read 18 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from refine_control.miniature import vocabulary
from refine_control.models.controlnet import from_transformer

TEXT_WIDTH = 32
TRANSFORMER: Mapping[str, Any] = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 2 * TEXT_WIDTH,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 2 * TEXT_WIDTH,
    "out_channels": 16,
    "pos_embed_max_size": 12,
}
VAE: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": 64,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
}


def write_tokenizer(folder: Path, words: Sequence[str] = vocabulary.WORDS) -> CLIPTokenizer:
    """Writes a CLIPTokenizer of `words` to `folder` and loads it: at most 18 tokens; other words become <|unk|>."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.trainers import BpeTrainer

    bpe = Tokenizer(BPE(unk_token="<|unk|>", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = WhitespaceSplit()
    special = ["<|startoftext|>", "<|endoftext|>", "<|unk|>"]
    # trained on the words until each one is a single token
    trainer = BpeTrainer(vocab_size=100_000, special_tokens=special, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(words, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = CLIPTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],  # type: ignore[arg-type]
        unk_token="<|unk|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=vocabulary.MAX_TOKENS,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(vocab_size: int) -> CLIPTextModelWithProjection:
    """A new two-layer CLIP text encoder; SD3 uses its penultimate hidden states and its projection."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=vocabulary.MAX_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def new_pipeline(folder: Path, seed: int) -> Any:
    """A stock inpainting pipeline of new networks; the tokenizer is written to `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = write_tokenizer(folder / "tokenizer")
        transformer = SD3Transformer2DModel(**TRANSFORMER)
        return StableDiffusion3ControlNetInpaintingPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=AutoencoderKL(**VAE),
            text_encoder=build_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=build_text_encoder(len(tokenizer)),
            tokenizer_2=tokenizer,
            text_encoder_3=None,  # type: ignore[arg-type]
            tokenizer_3=None,  # type: ignore[arg-type]
            controlnet=from_transformer(transformer, 23),
        )


def with_new_words(pipeline: Any, words: Sequence[str], folder: Path, seed: int) -> Any:
    """Replaces the text encoders and the tokenizer by new ones for `words`; keeps all other networks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = write_tokenizer(folder / "tokenizer", words)
        encoders = [build_text_encoder(len(tokenizer)) for _ in range(2)]
    pipeline.register_modules(
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer
    )
    return pipeline
