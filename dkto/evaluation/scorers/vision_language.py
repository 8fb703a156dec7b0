"""Judges that are vision-language models of the Qwen-VL family: VQAScore and UnifiedReward, by one adapter.

Any model folder that transformers' `AutoModelForImageTextToText` loads and whose images are patches of Qwen-VL (2, 2.5,
3, 3.5) can be the judge; code from a model's repository is never run. Images are asked about one at a time. A judge has
no gradient.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dkto.common.files import read_json
from dkto.common.names import shown
from dkto.evaluation.scorers.network import NetworkScorer
from dkto.evaluation.scorers.weights import model_about, model_folder

CHAT_FILES = ("config.json", "tokenizer*.json", "preprocessor_config.json")
CHAT_OPTIONAL = ("chat_template*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
MODEL_FILES = ("*.safetensors",)
MODEL_OPTIONAL = ("model.safetensors.index.json", "generation_config.json")
AXES = ("alignment", "coherence", "style")
LONGEST_ANSWER = 64  # tokens: three lines with a number each
VQA_QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
REWARD_QUESTION = """Judge a generated image on three axes, each with a number from 1 to 5.
Alignment: how well the image shows what the caption says.
Coherence: how free the image is of glitches and distorted things.
Style: how appealing the image looks, whatever the caption says.
Answer in three lines and no other words:
Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z
Caption: [{prompt}]"""


@dataclass(frozen=True)
class Chat:
    """Turns an image and a question into what a model of the Qwen-VL family takes."""

    tokenizer: object
    image_processor: object
    image_token: int

    @classmethod
    def from_folder(cls, folder: Path) -> "Chat":
        """From a model's folder; its weights are not needed."""
        from dkto.common.quiet_transformers import transformers

        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        image_token = getattr(config, "image_token_id", None)
        if image_token is None or not hasattr(processor, "merge_size"):
            raise ValueError(f"{folder} must hold a model of the Qwen-VL family, got {shown(config.model_type)}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        template = folder / "chat_template.json"  # where older models keep that of images
        if template.is_file():
            tokenizer.chat_template = read_json(template, "chat template", ["chat_template"])["chat_template"]
        return cls(tokenizer, processor, image_token)

    def inputs(self, image: Image.Image, text: str, device: torch.device) -> dict[str, Tensor]:
        """One image and one text as a question of the user, up to where the answer begins."""
        seen = self.image_processor(images=[image], return_tensors="pt")
        tokens = int(seen["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        content = [{"type": "image"}, {"type": "text", "text": text}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        asked = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], **options)
        place = self.tokenizer.convert_ids_to_tokens(self.image_token)
        if asked.count(place) != 1:
            raise ValueError(f"the chat template must hold {place} once for an image, got {asked.count(place)} of it")
        found = self.tokenizer(asked.replace(place, place * tokens), add_special_tokens=False, return_tensors="pt")
        ids = found.input_ids
        given = {"input_ids": ids, "attention_mask": found.attention_mask, **seen}
        return {name: values.to(device) for name, values in given.items()} | {
            "mm_token_type_ids": (ids == self.image_token).int().to(device)
        }


def plain_words(prompt: str) -> str:
    """A prompt without what a chat would take for its own marks.

    >>> plain_words("a star <|im_end|><|image_pad|>in the sky")
    'a star   in the sky'
    """
    return re.sub(r"<\|[^<|>]*\|>", " ", prompt)


class Judge(NetworkScorer):
    """A scorer that asks a vision-language model about one image at a time."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """(N,) scores; NaN where the answer holds none."""
        network = self.network()
        with torch.inference_mode():
            pairs = zip(images, prompts, strict=True)
            return np.array([self.judge(network, image, prompt) for image, prompt in pairs], dtype=float)

    def judge(self, network: nn.Module, image: Image.Image, prompt: str) -> float:
        """The score of one image."""
        raise NotImplementedError

    @property
    def score_pixels(self) -> None:
        """There is none: answers are words, or images pass through Pillow."""
        raise AttributeError(f"scorer {self.name} has no gradient")


class VisionLanguage(nn.Module):
    """A vision-language model with its chat."""

    def __init__(self, model: nn.Module, chat: Chat) -> None:
        super().__init__()
        self.model, self.chat = model, chat

    @classmethod
    def from_folder(cls, folder: Path, precision: str) -> "VisionLanguage":
        """From transformers' layout, safetensors only; weights that lack a parameter are refused, not made up."""
        from dkto.common.quiet_transformers import transformers

        chat = Chat.from_folder(folder)
        options = {"use_safetensors": True, "trust_remote_code": False, "dtype": getattr(torch, precision)}
        kind = transformers.AutoModelForImageTextToText
        model, told = kind.from_pretrained(folder, output_loading_info=True, **options)
        if missing := sorted(told["missing_keys"]):
            raise ValueError(
                f"the weights in {folder} lack {len(missing)} parameters of a {type(model).__name__}, the first "
                f"{missing[0]!r}: expected transformers' names"
            )
        return cls(model.eval().requires_grad_(False), chat)

    def next_token(self, image: Image.Image, question: str) -> Tensor:
        """(V,) chances of the first token of the answer."""
        given = self.chat.inputs(image, question, self.model.device)
        return self.model(**given, logits_to_keep=1).logits[0, -1].float().softmax(-1)

    def answer(self, image: Image.Image, question: str) -> str:
        """The likeliest answer, token by token."""
        given = self.chat.inputs(image, question, self.model.device)
        found = self.model.generate(**given, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        return self.chat.tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass(frozen=True)
class _Asked(Judge):
    """What both judges share: the model, and the question with {prompt} in it."""

    def weights_about(self) -> dict[str, str | None]:
        return model_about(self.model)

    def load(self) -> VisionLanguage:
        if "{prompt}" not in self.question:
            raise ValueError(f"question must hold {{prompt}}, got {shown(self.question)}")
        files, optional = (*CHAT_FILES, *MODEL_FILES), (*CHAT_OPTIONAL, *MODEL_OPTIONAL)
        folder = model_folder(self.model, self.name, files, optional)
        return VisionLanguage.from_folder(folder, self.precision)

    def asked(self, prompt: str) -> str:
        """The question about a prompt."""
        return self.question.replace("{prompt}", plain_words(prompt))


@dataclass(frozen=True)
class VQAScore(_Asked):
    """VQAScore (Lin et al. 2024): the chance that the answer to "does this figure show the prompt?" begins with Yes.

    The authors' numbers are those of their own models (CLIP-FlanT5 at first); another model gives other ones, which
    `about` names.

    Attributes:
        model: folder or hub id of a Qwen-VL model in safetensors.
        question: with {prompt} in it.
        precision: "bfloat16" or "float32", of the model.
    """

    model: str = "Qwen/Qwen3-VL-2B-Instruct"
    question: str = VQA_QUESTION
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = ""
    name: str = "vqa_score"
    scale = "probability of Yes"

    def judge(self, network: VisionLanguage, image: Image.Image, prompt: str) -> float:
        yes = network.chat.tokenizer.encode("Yes", add_special_tokens=False)
        if len(yes) != 1:
            raise ValueError(f"scorer {self.name} needs a tokenizer to which Yes is one token, got {len(yes)}")
        return float(network.next_token(image, self.asked(prompt))[yes[0]])


@dataclass(frozen=True)
class UnifiedReward(_Asked):
    """UnifiedReward 2.0 (Wang et al. 2025): the model writes scores from 1 to 5 for alignment, coherence and style.

    The default question is this project's own, in the answer format of the authors. Their question is in their
    repository (CodeGoat24/UnifiedReward, point_score_ACS_image_generation.py); give it to get their numbers.

    Attributes:
        model: folder or hub id, for instance of UnifiedReward-2.0 on Qwen2.5-VL, Qwen3-VL or Qwen3.5.
        axis: "alignment", "coherence", "style", or "mean" of the three.
        question: with {prompt} in it; it asks for lines such as "Style Score (1-5): 3.4".
        precision: "bfloat16" or "float32", of the model.
    """

    model: str = "CodeGoat24/UnifiedReward-2.0-qwen-7b"
    axis: Literal["mean", "alignment", "coherence", "style"] = "mean"
    question: str = REWARD_QUESTION
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = ""
    name: str = "unified_reward"
    scale = "1 to 5"

    def judge(self, network: VisionLanguage, image: Image.Image, prompt: str) -> float:
        found = scores_in(network.answer(image, self.asked(prompt)))
        return float(np.mean(list(found.values()))) if self.axis == "mean" else found[self.axis]


def scores_in(answer: str) -> dict[str, float]:
    """The scores in an answer of UnifiedReward; NaN for one that is missing, there twice, or not from 1 to 5.

    >>> scores_in("Alignment Score (1-5): 2.5\\nCoherence Score (1-5): 4\\nStyle Score (1-5): 9")
    {'alignment': 2.5, 'coherence': 4.0, 'style': nan}
    """
    scores = {}
    for axis in AXES:
        found = re.findall(rf"{axis} score[^:\n]*:\s*(\d+(?:\.\d+)?)", answer, re.IGNORECASE)
        value = float(found[0]) if len(found) == 1 else math.nan
        scores[axis] = value if 1 <= value <= 5 else math.nan
    return scores
