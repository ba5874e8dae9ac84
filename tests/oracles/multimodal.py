"""Tiny models that see an image, or where words stand on a page, with inputs made by hand; no processor."""

from __future__ import annotations

import torch
import transformers as tf

V, H, IMAGE = 97, 32, 60
TEXT = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEEN = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def _qwen2_vl():
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": H, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    vision |= {"temporal_patch_size": 1, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            text_config=TEXT | {"rope_parameters": rope},
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
            **{name: TEXT[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        )
    )


def _llava():
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=tf.LlamaConfig(**TEXT),
            vision_config=tf.CLIPVisionConfig(**SEEN, image_size=8, patch_size=4),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    )


def _gemma3():
    text = TEXT | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config=text,
            vision_config={**SEEN, "image_size": 16, "patch_size": 4},
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=61,
            eoi_token_index=62,
        )
    )


MODELS = {"qwen2_vl": _qwen2_vl, "llava": _llava, "gemma3": _gemma3}


def model(name):
    """Return a model with random weights."""
    torch.manual_seed(0)
    return MODELS[name]().eval()


def batch(name, *, left=0, right=0):
    """Return two rows with one image of four tokens each, the second padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (2, 12), generator=generator)
    ids[0, 2:6] = ids[1, 5:9] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :left] = 0
    mask[1, 12 - right :] = 0
    ids = ids * mask
    given = {"input_ids": ids, "attention_mask": mask}
    kinds = (ids == IMAGE).long()
    if name == "qwen2_vl":
        given["pixel_values"] = torch.randn(2 * 16, 3 * 16, generator=generator)
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        given["mm_token_type_ids"] = kinds.int()
    else:
        size = 8 if name == "llava" else 16
        given["pixel_values"] = torch.randn(2, 3, size, size, generator=generator)
    if name == "gemma3":
        given["token_type_ids"] = kinds
    return given


def row(given, number):
    """Return one row of a batch without its padding."""
    real = given["attention_mask"][number].bool()
    images = len(given["pixel_values"]) // 2
    alone = {}
    for name, value in given.items():
        if name == "pixel_values":
            alone[name] = value[number * images : (number + 1) * images]
        elif name == "image_grid_thw":
            alone[name] = value[number : number + 1]
        else:
            alone[name] = value[number][real][None]
    return alone
