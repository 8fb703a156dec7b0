"""The published models as their authors write them: names and shapes of their weights, and small ones that compute.

Written from the architectures alone, without the package's own code, so that tests compare two independent sources.
"""

import hashlib
import json

import torch
import torch.nn.functional as F
from torch import nn


def _linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def open_clip_names(
    *, width, layers, grid, patch, text_width, text_layers, vocabulary, context, embedding
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an open_clip CLIP with a ViT."""
    names: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (context, text_width),
        "text_projection": (text_width, embedding),
        "token_embedding.weight": (vocabulary, text_width),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (grid * grid + 1, width),
        "visual.proj": (width, embedding),
        "visual.conv1.weight": (width, 3, patch, patch),
        **_norm("visual.ln_pre", width),
        **_norm("visual.ln_post", width),
        **_norm("ln_final", text_width),
    }
    for prefix, size, count in (("visual.", width, layers), ("", text_width, text_layers)):
        for i in range(count):
            block = f"{prefix}transformer.resblocks.{i}"
            names |= {f"{block}.attn.in_proj_weight": (3 * size, size), f"{block}.attn.in_proj_bias": (3 * size,)}
            names |= _linear(f"{block}.attn.out_proj", size, size)
            names |= _linear(f"{block}.mlp.c_fc", 4 * size, size) | _linear(f"{block}.mlp.c_proj", size, 4 * size)
            names |= _norm(f"{block}.ln_1", size) | _norm(f"{block}.ln_2", size)
    return names


VIT_H_14 = {
    "width": 1280,
    "layers": 32,
    "grid": 16,
    "patch": 14,
    "text_width": 1024,
    "text_layers": 24,
    "vocabulary": 49408,
    "context": 77,
    "embedding": 1024,
}
VIT_L_14 = VIT_H_14 | {"width": 1024, "layers": 24, "text_width": 768, "text_layers": 12, "embedding": 768}


def transformers_clip_names(
    *, width, layers, grid, patch, text_width, text_layers, vocabulary, context, embedding
) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a published CLIPModel's safetensors (PickScore_v1, LAION's H/14, OpenAI's L/14)."""
    names: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "text_model.embeddings.token_embedding.weight": (vocabulary, text_width),
        "text_model.embeddings.position_embedding.weight": (context, text_width),
        **_norm("text_model.final_layer_norm", text_width),
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": (grid * grid + 1, width),
        **_norm("vision_model.pre_layrnorm", width),
        **_norm("vision_model.post_layernorm", width),
        "visual_projection.weight": (embedding, width),
        "text_projection.weight": (embedding, text_width),
    }
    for tower, size, count in (("vision", width, layers), ("text", text_width, text_layers)):
        for i in range(count):
            block = f"{tower}_model.encoder.layers.{i}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                names |= _linear(f"{block}.self_attn.{part}", size, size)
            names |= _linear(f"{block}.mlp.fc1", 4 * size, size) | _linear(f"{block}.mlp.fc2", size, 4 * size)
            names |= _norm(f"{block}.layer_norm1", size) | _norm(f"{block}.layer_norm2", size)
    return names


def head_names(width, prefix="layers") -> dict[str, tuple[int, ...]]:
    """The aesthetics head: 768-1024-128-64-16-1, dropouts at 1, 3 and 5."""
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    return {name: shape for i, (o, n) in sizes.items() for name, shape in _linear(f"{prefix}.{i}", o, n).items()}


def image_reward_names(
    *, width=1024, layers=24, grid=14, patch=16, text_width=768, text_layers=12, vocabulary=30524, positions=512
) -> dict[str, tuple[int, ...]]:
    """Names and shapes in ImageReward.pt: BLIP-large's picture and text encoder, its unused projections, the head."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    names: dict[str, tuple[int, ...]] = {
        f"{vision}.cls_token": (1, 1, width),
        f"{vision}.pos_embed": (1, grid * grid + 1, width),
        f"{vision}.patch_embed.proj.weight": (width, 3, patch, patch),
        f"{vision}.patch_embed.proj.bias": (width,),
        **_norm(f"{vision}.norm", width),
        f"{text}.embeddings.position_ids": (1, positions),
        f"{text}.embeddings.word_embeddings.weight": (vocabulary, text_width),
        f"{text}.embeddings.position_embeddings.weight": (positions, text_width),
        **_norm(f"{text}.embeddings.LayerNorm", text_width),
        **_linear("blip.vision_proj", 256, width),
        **_linear("blip.text_proj", 256, text_width),
        **head_names(text_width, "mlp.layers"),
    }
    for i in range(layers):
        block = f"{vision}.blocks.{i}"
        names |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        names |= _linear(f"{block}.attn.qkv", 3 * width, width) | _linear(f"{block}.attn.proj", width, width)
        names |= _linear(f"{block}.mlp.fc1", 4 * width, width) | _linear(f"{block}.mlp.fc2", width, 4 * width)
    for i in range(text_layers):
        block = f"{text}.encoder.layer.{i}"
        for kind, source in (("attention", text_width), ("crossattention", width)):
            names |= _linear(f"{block}.{kind}.self.query", text_width, text_width)
            names |= _linear(f"{block}.{kind}.self.key", text_width, source)
            names |= _linear(f"{block}.{kind}.self.value", text_width, source)
            names |= _linear(f"{block}.{kind}.output.dense", text_width, text_width)
            names |= _norm(f"{block}.{kind}.output.LayerNorm", text_width)
        names |= _linear(f"{block}.intermediate.dense", 4 * text_width, text_width)
        names |= _linear(f"{block}.output.dense", text_width, 4 * text_width)
        names |= _norm(f"{block}.output.LayerNorm", text_width)
    return names


def random_state(names, seed=0, std=0.2) -> dict[str, torch.Tensor]:
    """Random weights under those names; norms start near one."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: std * torch.randn(shape, generator=generator) for name, shape in names.items()}
    for name in state:
        if ".ln_" in name or "norm" in name.lower() or name.startswith("ln_"):
            state[name] += float(name.endswith("weight"))
    return state


def _layer_norm(x, state, name, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _apply(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _attend(query, key, value, heads, mask=None):
    """(B, L, D) each; mask (.., L, S) is added."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)]
    weights = split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5
    weights = weights if mask is None else weights + mask
    return (weights.softmax(-1) @ split[2]).transpose(1, 2).flatten(-2)


def open_clip_cosine(state, pixel_values, token_ids, *, heads, text_heads, end) -> torch.Tensor:
    """cos(picture, prompt) of an open_clip model, by torch's MultiheadAttention; (B,)."""

    def tower(x, prefix, count, mask=None):
        for i in range(count):
            block = f"{prefix}transformer.resblocks.{i}"
            attention = nn.MultiheadAttention(x.shape[-1], text_heads if not prefix else heads, batch_first=True)
            own = {k.removeprefix(f"{block}.attn."): v for k, v in state.items() if k.startswith(f"{block}.attn.")}
            attention.load_state_dict(own)
            y = _layer_norm(x, state, f"{block}.ln_1", 1e-5)
            x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
            y = _layer_norm(x, state, f"{block}.ln_2", 1e-5)
            x = x + _apply(F.gelu(_apply(y, state, f"{block}.mlp.c_fc")), state, f"{block}.mlp.c_proj")
        return x

    firsts = [name for name in state if name.endswith("ln_1.bias")]
    layers = {tower: sum(name.startswith(f"{tower}transformer") for name in firsts) for tower in ("visual.", "")}
    kernel = state["visual.conv1.weight"]
    x = F.conv2d(pixel_values, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = tower(_layer_norm(x, state, "visual.ln_pre", 1e-5), "visual.", layers["visual."])
    image = _layer_norm(x[:, 0], state, "visual.ln_post", 1e-5) @ state["visual.proj"]
    length = token_ids.shape[1]
    causal = torch.full((length, length), float("-inf")).triu(1)
    y = state["token_embedding.weight"][token_ids] + state["positional_embedding"][:length]
    y = _layer_norm(tower(y, "", layers[""], causal), state, "ln_final", 1e-5)
    ends = (token_ids == end).int().argmax(1)
    text = y[torch.arange(len(y)), ends] @ state["text_projection"]
    return F.cosine_similarity(image, text)


def image_reward(state, pixel_values, token_ids, token_mask, *, heads, text_heads) -> torch.Tensor:
    """ImageReward of pictures and tokens, (B,)."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    kernel = state[f"{vision}.patch_embed.proj.weight"]
    x = F.conv2d(pixel_values, kernel, state[f"{vision}.patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = torch.cat([state[f"{vision}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + state[f"{vision}.pos_embed"]
    for i in range(sum(k.startswith(f"{vision}.blocks.") and k.endswith("norm1.bias") for k in state)):
        block = f"{vision}.blocks.{i}"
        q, k, v = _apply(_layer_norm(x, state, f"{block}.norm1", 1e-6), state, f"{block}.attn.qkv").chunk(3, -1)
        x = x + _apply(_attend(q, k, v, heads), state, f"{block}.attn.proj")
        y = _apply(_layer_norm(x, state, f"{block}.norm2", 1e-6), state, f"{block}.mlp.fc1")
        x = x + _apply(F.gelu(y), state, f"{block}.mlp.fc2")
    seen = _layer_norm(x, state, f"{vision}.norm", 1e-6)
    y = state[f"{text}.embeddings.word_embeddings.weight"][token_ids]
    y = y + state[f"{text}.embeddings.position_embeddings.weight"][: token_ids.shape[1]]
    y = _layer_norm(y, state, f"{text}.embeddings.LayerNorm", 1e-12)
    mask = torch.where(token_mask.bool(), 0.0, float("-inf"))[:, None, None]
    for i in range(sum(".layer." in k and k.endswith("intermediate.dense.bias") for k in state)):
        block = f"{text}.encoder.layer.{i}"
        for kind, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            other = y if source is None else source
            q, k, v = (
                _apply(z, state, f"{block}.{kind}.self.{part}")
                for part, z in (("query", y), ("key", other), ("value", other))
            )
            z = _apply(_attend(q, k, v, text_heads, hidden), state, f"{block}.{kind}.output.dense")
            y = _layer_norm(z + y, state, f"{block}.{kind}.output.LayerNorm", 1e-12)
        z = F.gelu(_apply(y, state, f"{block}.intermediate.dense"))
        y = _layer_norm(_apply(z, state, f"{block}.output.dense") + y, state, f"{block}.output.LayerNorm", 1e-12)
    z = y[:, 0]
    for layer in (0, 2, 4, 6, 7):
        z = _apply(z, state, f"mlp.layers.{layer}")
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


def sha256(text):
    """Of a text, as its pages show it."""
    return hashlib.sha256(text.encode()).hexdigest()


QWEN2_VL_7B = json.dumps(
    {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "image_token_id": 151655,
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }
)
"""Qwen2-VL-7B-Instruct's configuration, flat as it was published, without what its sizes do not depend on."""


def hps_v3_names(*, vocabulary, width=3584, layers=28, inner=18944, keys=512, seen=1280, depth=32):
    """Names and shapes of HPS v3: Qwen2-VL-7B as transformers 4.45 names it, and the head on it."""
    names = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    names |= {"lm_head.weight": (vocabulary, width), "visual.patch_embed.proj.weight": (seen, 3, 2, 14, 14)}
    for i in range(layers):
        block = f"model.layers.{i}"
        names |= {f"{block}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        names |= _linear(f"{block}.self_attn.q_proj", width, width)
        names |= _linear(f"{block}.self_attn.k_proj", keys, width) | _linear(f"{block}.self_attn.v_proj", keys, width)
        names |= {f"{block}.self_attn.o_proj.weight": (width, width), f"{block}.mlp.down_proj.weight": (width, inner)}
        names |= {f"{block}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
    for i in range(depth):
        block = f"visual.blocks.{i}"
        names |= _norm(f"{block}.norm1", seen) | _norm(f"{block}.norm2", seen)
        names |= _linear(f"{block}.attn.qkv", 3 * seen, seen) | _linear(f"{block}.attn.proj", seen, seen)
        names |= _linear(f"{block}.mlp.fc1", 4 * seen, seen) | _linear(f"{block}.mlp.fc2", seen, 4 * seen)
    names |= _norm("visual.merger.ln_q", seen) | _linear("visual.merger.mlp.0", 4 * seen, 4 * seen)
    names |= _linear("visual.merger.mlp.2", width, 4 * seen)
    for place, outputs, inputs in ((0, 1024, width), (3, 16, 1024), (5, 2, 16)):
        names |= _linear(f"rm_head.{place}", outputs, inputs)
    return names
