"""HPS v3 (Ma et al. 2025): a Qwen2-VL-7B with a head on the state of one special token, over transformers' own classes.

The authors' package (PyPI `hpsv3`) is bound to transformers 4.45 and torchvision; this adapter reads their weights into
transformers 5. Their question is part of the scorer and is not shipped here: `take_question` reads it, as data, from a
copy of their file `hpsv3/dataset/data_collator_qwen.py`, and its hash is compared.
"""

import ast
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from dkto.common.files import write_atomically
from dkto.common.tensors import check_fits, read_tensors
from dkto.evaluation.scorers.vision_language import CHAT_FILES, CHAT_OPTIONAL, Chat, Judge, plain_words
from dkto.evaluation.scorers.weights import model_about, model_folder, weights_folder

WEIGHTS = "HPSv3.safetensors"
REWARD_TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28  # of every image, as near as multiples of 28 allow
QUESTION_SHA256 = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


class HPSv3Model(nn.Module):
    """Qwen2-VL without its language head, the reward head, and the chat with the special token."""

    def __init__(self, config: object, chat: Chat | None = None) -> None:
        from dkto.common.quiet_transformers import transformers

        super().__init__()
        self.model = transformers.Qwen2VLModel(config)
        width = config.text_config.hidden_size
        layers = (nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))
        self.rm_head, self.chat = nn.Sequential(*layers), chat

    def rewards(self, image: Image.Image, question: str) -> Tensor:
        """(2,) mean and spread of the reward.

        Positions count up one by one, over the image too: the authors' model passes embeddings on without the grid of
        the image, so that its three-dimensional positions are never computed.
        """
        given = self.chat.inputs(_resized(image), question, self.model.device)
        length = given["input_ids"].shape[1]
        given["position_ids"] = torch.arange(length, device=self.model.device).expand(3, 1, length)
        states = self.model(**given, use_cache=False).last_hidden_state[0]
        at = given["input_ids"][0] == self.chat.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        return self.rm_head(states[at].float())[0]


def _resized(image: Image.Image) -> Image.Image:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    height, width = smart_resize(image.height, image.width, 28, PIXELS, PIXELS)
    return image.resize((width, height))


@dataclass(frozen=True)
class HPSv3(Judge):
    """mu of HPS v3, about 0 to 15; higher is better.

    Attributes:
        weights: folder or hub id with the authors' HPSv3.safetensors.
        model: folder or hub id of Qwen2-VL-7B-Instruct, of which configuration, tokenizer and image settings are read.
        question: file that `take_question` wrote, or "" for its place in the weights folder.
        precision: of the backbone; the authors' is "bfloat16". The head is in float32.
    """

    weights: str = "MizzenAI/HPSv3"
    model: str = "Qwen/Qwen2-VL-7B-Instruct"
    question: str = ""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = ""
    name: str = "hps_v3"
    scale = "mu"

    def weights_about(self) -> dict[str, str | None]:
        return {**model_about(self.weights), "question": QUESTION_SHA256, "model": self.model}

    def load(self) -> HPSv3Model:
        from accelerate import init_empty_weights

        from dkto.common.quiet_transformers import transformers

        read_question(self.question)
        folder = model_folder(self.model, self.name, CHAT_FILES, CHAT_OPTIONAL)
        path = model_folder(self.weights, self.name, (WEIGHTS,)) / WEIGHTS
        chat = Chat.from_folder(folder)
        chat.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        state = hps_v3_to_qwen(read_tensors(path, "scorer"))
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.text_config.vocab_size = len(chat.tokenizer)  # as the authors' own call leaves it
        with init_empty_weights(include_buffers=False):
            network = HPSv3Model(config, chat)
        check_fits(state, network.state_dict(), path, "HPSv3Model")
        dtype = getattr(torch, self.precision)
        head = {name: torch.float32 for name in state if name.startswith("rm_head.")}
        network.load_state_dict({name: value.to(head.get(name, dtype)) for name, value in state.items()}, assign=True)
        return network.eval().requires_grad_(False)

    def judge(self, network: HPSv3Model, image: Image.Image, prompt: str) -> float:
        question = read_question(self.question).replace("{text_prompt}", plain_words(prompt))
        return float(network.rewards(image, question)[0])


def hps_v3_to_qwen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published weights under `HPSv3Model`'s names, from those of transformers 4.45 or of later ones.

    >>> list(hps_v3_to_qwen(dict.fromkeys(["visual.a", "model.b", "model.visual.c", "rm_head.d", "lm_head.weight"])))
    ['model.visual.a', 'model.language_model.b', 'model.visual.c', 'rm_head.d']
    """
    later = re.compile(r"model\.(visual|language_model)\.")
    names = {name: name if later.match(name) else re.sub(r"^model\.", "model.language_model.", name) for name in state}
    names = {name: re.sub(r"^visual\.", "model.visual.", new) for name, new in names.items()}
    return {new: state[name] for name, new in names.items() if not name.startswith("lm_head.")}


def _place(question: str) -> Path:
    return Path(question) if question else weights_folder() / "hps_v3.txt"


def read_question(question: str = "") -> str:
    """The authors' question, with {text_prompt} in it.

    Raises:
        FileNotFoundError: if it was not taken yet; the sentence says how.
        ValueError: if it is another text.
    """
    path = _place(question)
    if not path.is_file():
        raise FileNotFoundError(
            f"scorer hps_v3 needs its question in {path}: `pip download hpsv3==1.0.0 --no-deps`, unzip it, then "
            "`python -m dkto.evaluation.scorers take-question hpsv3/dataset/data_collator_qwen.py`"
        )
    return _checked(path.read_bytes().decode(errors="replace"), path)


def take_question(source: Path) -> Path:
    """Keep the question of HPS v3 from a copy of the authors' file, which is read as text and never run.

    Args:
        source: data_collator_qwen.py of the package hpsv3.

    Raises:
        ValueError: if the file is no Python text, or holds another question than that of hpsv3 1.0.0.
    """
    try:
        lines = ast.parse(source.read_bytes()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{source} cannot be read as Python: {error}") from error
    assigned = [line for line in lines if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)]
    texts = {place.id: line.value.value for line in assigned for place in line.targets if isinstance(place, ast.Name)}
    question = "".join(str(texts.get(name, "")) for name in ("INSTRUCTION", "prompt_with_special_token"))
    text, path = _checked(question, source), _place("")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: part.write_bytes(text.encode()))
    return path


def _checked(question: str, place: Path) -> str:
    if hashlib.sha256(question.encode()).hexdigest() != QUESTION_SHA256:
        raise ValueError(f"{place} does not hold the question of hpsv3 1.0.0, on whose words the score depends")
    return question
