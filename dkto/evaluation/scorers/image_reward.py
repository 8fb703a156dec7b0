"""ImageReward (Xu et al. 2023): BLIP, whose text encoder looks at the image, and a head, on transformers' BLIP."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image
from torch import Tensor, nn

from dkto.evaluation.scorers.network import NetworkScorer, aesthetics_head
from dkto.evaluation.scorers.preprocess import cropped_image, cropped_pixels
from dkto.evaluation.scorers.weights import converted_about, fill, model_folder, read_converted

BERT = "google-bert/bert-base-uncased"
BERT_FILES, BERT_OPTIONAL = ("vocab.txt",), ("tokenizer*.json", "special_tokens_map.json")
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}
"""BLIP's ViT-L/16 at 224 pixels."""
TEXT = {"vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072}
TEXT |= {"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512, "layer_norm_eps": 1e-12}
"""The published med_config.json, with the image encoder's width."""

_VISION_TOP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_VISION_BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_VISION_BLOCK |= {"attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection"}
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Published weights that no score depends on: BLIP's contrastive projections, and a constant."""


class ImageRewardModel(nn.Module):
    """Image encoder, text encoder with cross-attention, head, and BERT's tokenizer."""

    def __init__(self, tokenizer=None) -> None:
        from dkto.common.quiet_transformers import transformers

        super().__init__()
        self.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**VISION))
        self.text = transformers.models.blip.modeling_blip_text.BlipTextModel(
            transformers.BlipTextConfig(**TEXT, is_decoder=True), add_pooling_layer=False
        )
        self.mlp = aesthetics_head(TEXT["hidden_size"])
        self.tokenizer, self.side = tokenizer, VISION["image_size"]


@dataclass(frozen=True)
class ImageReward(NetworkScorer):
    """(head(text state of the first token, having seen the image) - 0.167) / 1.033, about -2.3 to 2.

    Attributes:
        weights: converted safetensors file, or "" for its place in the weights folder.
        tokenizer: folder or hub id of BERT's uncased tokenizer.
    """

    weights: str = ""
    tokenizer: str = BERT
    device: str = ""
    name: str = "image_reward"
    scale: ClassVar[str] = "(x - 0.167) / 1.033"

    def weights_about(self) -> dict[str, str | None]:
        return converted_about("image_reward", self.weights)

    def load(self) -> ImageRewardModel:
        from dkto.common.quiet_transformers import transformers

        state = image_reward_to_blip(read_converted("image_reward", self.weights))
        folder = model_folder(self.tokenizer, self.name, BERT_FILES, BERT_OPTIONAL, "1 MB")
        return fill(
            ImageRewardModel(transformers.BertTokenizer.from_pretrained(folder)), state, self.weights or self.name
        )

    def prepare_image(self, image: Image.Image, side: int) -> Tensor:
        return cropped_image(image, side, rounded=True)

    def prepare_pixels(self, pixels: Tensor, side: int) -> Tensor:
        return cropped_pixels(pixels, side, rounded=True)

    def score_prepared(self, network: ImageRewardModel, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = network.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(pixel_values.device)
        seen = network.vision(pixel_values).last_hidden_state
        read = network.text(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:2]).long(),
        ).last_hidden_state
        return (network.mlp(read[:, 0])[:, 0] - MEAN) / STD


def image_reward_to_blip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every published weight but the `UNUSED` under `ImageRewardModel`'s names; a ValueError names a foreign one."""
    return {_blip_name(name): value for name, value in state.items() if not name.startswith(UNUSED)}


def _blip_name(name: str) -> str:
    for old, new in (("mlp.layers.", "mlp."), ("blip.text_encoder.", "text.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    inner = name.removeprefix("blip.visual_encoder.")
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", inner)
    if inner != name and inner in _VISION_TOP:
        return f"vision.{_VISION_TOP[inner]}"
    if inner == name or match is None or match[2] not in _VISION_BLOCK:
        raise ValueError(f"{name!r} is not a weight of ImageReward")
    return f"vision.encoder.layers.{match[1]}.{_VISION_BLOCK[match[2]]}.{match[3]}"
