"""The card beside tuned weights: what they are, how they were made, how they are used, what they inherit."""

import json
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from dkto.common.files import read_json, records_of
from dkto.common.machine import versions
from dkto.common.names import printable
from dkto.models import SMALL_WORLD, T5_TOKENS, DiffusionModel, StableDiffusion3
from dkto.objective.methods import METHODS
from dkto.training.config import RunConfig

if TYPE_CHECKING:
    from dkto.training.step import Progress

SHOWN = ("loss", "reward/margin", "implicit_accuracy/sample", "implicit_accuracy/pair", "mean_abs_reward")
FIELDS = (
    *("objective", "csft_style", "reward", "utility", "beta", "desirable_fraction", "estimator", "backprop_steps"),
    *("sampling_steps", "guidance", "lora_rank", "learning_rate", "warmup_steps", "max_train_steps", "batch_size"),
    *("prompt_dropout", "precision", "ema_decay", "seed"),
)
CSFT_HINTS = {"prefix": 'Write "good image, " before a prompt.', "negative": 'Use "Weird image. " as negative prompt.'}
FULL = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER")
pipeline("a prompt").images[0]"""
LORA = """from diffusers import DiffusionPipeline
{imports}
pipeline = DiffusionPipeline.from_pretrained({base})
pipeline.load_lora_weights("FOLDER")
pipeline("a prompt").images[0]"""


def write_card(folder: Path, run: Path, config: RunConfig, model: DiffusionModel, progress: "Progress") -> None:
    """Write `README.md` beside weights, with the front matter that the model hub reads; `run` holds the records."""
    local = Path(config.model).exists()
    base = Path(config.model).name if local else config.model
    tags = ["text-to-image", f"diffusion-{config.objective}", *(["lora"] if config.lora_rank else [])]
    front = ModelCardData(base_model=base, library_name="diffusers", pipeline_tag="text-to-image", tags=tags)
    if hasattr(config, "reward"):  # AlignProp and D3PO draw their own images and have a scorer judge them
        data = f"Its own images of {len(config.prompts())} prompts, judged by {config.reward}"
    else:
        prepared = Path(config.prepared_dir) / "prepared.json"
        rows = read_json(prepared, "record of prepared feedback", ["rows"])["rows"] if prepared.exists() else 0
        data = f"{rows} rated images"
    records = deque(records_of(run / "metrics.jsonl"), 20)
    measured = {name: [r[name] for r in records if name in r] for name in SHOWN}
    figures = "\n".join(f"| {name} | {sum(v) / len(v):.4g} |" for name, v in measured.items() if v)
    method = METHODS[config.objective]
    special = set().union(*(each.settings for each in METHODS.values())) - set(method.settings)
    fields = [name for name in FIELDS if name not in special]
    settings = "\n".join(f"| {name} | {getattr(config, name)} |" for name in fields if hasattr(config, name))
    text = CARD.format(
        front=front.to_yaml(),
        base="`" + printable(base).replace("`", "'") + "`",  # in a span of code a name is only a name
        method=method.title,
        what=f"a LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights",
        kind=(kind := model.pipeline_name),
        usage=_usage(config, f"PATH/TO/{base}" if local else base, kind),
        data=data,
        trained_on=method.trained_on,
        settings=settings,
        steps=progress.global_step,
        skipped=progress.skipped_steps,
        hours=progress.seconds / 3600,
        figures=figures,
        count=len(records),
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
    )
    (folder / "README.md").write_text(text)


def _usage(config: RunConfig, base: str, kind: str) -> str:
    """Code for plain diffusers; the small world lies in this package, and no card tells a place on its machine."""
    usage = FULL
    if config.lora_rank and config.model == SMALL_WORLD:
        usage = LORA.format(imports="from dkto.models import SMALL_WORLD_FOLDER\n", base="SMALL_WORLD_FOLDER")
    elif config.lora_rank:
        usage = LORA.format(imports="", base=json.dumps(base))
    if kind == StableDiffusion3.pipeline_name:  # the T5 encoder takes as many tokens as in training
        usage = usage.replace('("a prompt")', f'("a prompt", max_sequence_length={T5_TOKENS})')
    return f"{usage}\n\n# {CSFT_HINTS[config.csft_style]}" if config.objective == "csft" else usage


CARD = """---
{front}
---

# {base}, tuned with {method}

A {kind} of which {what} of the denoiser were trained {trained_on}.

```python
{usage}
```

## Training

{data}; {steps} steps, of which {skipped} were skipped for a loss that was not finite; {hours:.2f} hours.

| setting | value |
|---|---|
{settings}

{versions}

## Measured in training, mean of the last {count} steps

| measure | value |
|---|---|
{figures}

These say how well the policy tells its training data apart, not how good its images are: judge those on prompts that
were not trained on.

## Limits

The model inherits the biases of the people whose likes it was trained on, and likes can reward unsafe or unwanted
images (paper, section 8). Its licence is that of {base}. No safety checker was trained or is part of these weights;
one that the base model has works with them as before.
"""
