"""open_clip's names for the weights of a CLIP, mapped to those of transformers' CLIPModel."""

import re
from pathlib import Path

from torch import Tensor

from dkto.evaluation.scorers.network import ClipWithTokenizer
from dkto.evaluation.scorers.weights import fill, read_converted

_TEXT = {"vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_TEXT |= {"num_attention_heads": 16, "max_position_embeddings": 77, "projection_dim": 1024, "hidden_act": "gelu"}
_TEXT |= {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
_VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
_VISION |= {"image_size": 224, "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu"}
VIT_H_14 = {"projection_dim": 1024, "text_config": _TEXT, "vision_config": _VISION}
"""open_clip's ViT-H-14 as a CLIPConfig: HPS v2, PickScore and LAION's CLIP have this shape."""

_TOP = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection", "visual.proj")  # open_clip multiplies from the left
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_IN_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_IN_BLOCK |= {"attn.out_proj": "self_attn.out_proj"}


def open_clip_to_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under open_clip's names as weights under transformers' names.

        visual.transformer.resblocks.<i>.attn.in_proj_weight (3 D, D) -> vision_model ... q_proj, k_proj, v_proj (D, D)

    The constant `attn_mask` is left out; a ValueError names a weight that no open_clip model with a ViT has.
    """
    mapped: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "attn_mask":
            continue
        if name in _TOP:
            mapped[_TOP[name]] = value.T if name in _TRANSPOSED else value
            continue
        match = _BLOCK.fullmatch(name)
        tower, layer, rest = match.groups() if match else ("", "", "")
        prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{layer}."
        inner, _, kind = rest.rpartition(".")
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for part, third in zip("qkv", value.chunk(3), strict=True):
                mapped[f"{prefix}self_attn.{part}_proj.{kind.removeprefix('in_proj_')}"] = third
        elif inner in _IN_BLOCK:
            mapped[f"{prefix}{_IN_BLOCK[inner]}.{kind}"] = value
        else:
            raise ValueError(f"{name!r} is not a weight of an open_clip model with a vision transformer")
    return mapped


def load_vit_h_14(name: str, weights: str, tokenizer_folder: Path) -> ClipWithTokenizer:
    """A ViT-H-14 from a scorer's converted open_clip weights; `name` and `weights` as in `read_converted`."""
    from dkto.common.quiet_transformers import transformers

    state = open_clip_to_clip(read_converted(name, weights))
    model = fill(transformers.CLIPModel(transformers.CLIPConfig(**VIT_H_14)), state, weights or name)
    return ClipWithTokenizer(model, transformers.CLIPTokenizer.from_pretrained(tokenizer_folder))
