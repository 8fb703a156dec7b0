"""The card beside tuned weights: what they are, how they were made, how they are used, what they inherit."""

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from dkto.config import TrainConfig
from dkto.models import DiffusionModel
from dkto.records import read_records, versions

SHOWN = ("loss", "reward/margin", "implicit_accuracy/sample", "implicit_accuracy/pair", "mean_abs_reward")
FIELDS = (
    "objective",
    "utility",
    "beta",
    "desirable_fraction",
    "estimator",
    "lora_rank",
    "learning_rate",
    "warmup_steps",
    "max_train_steps",
    "batch_size",
    "prompt_dropout",
    "mixed_precision",
    "ema_decay",
    "seed",
)
CSFT_HINTS = {
    "prefix": 'trained with the like in the prompt: write "good image, " before yours',
    "negative": 'trained with the dislike in the prompt: pass negative_prompt="Weird image. "',
}
FULL = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER")
pipeline("a prompt").images[0]"""
LORA = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("FOLDER")
pipeline("a prompt").images[0]"""


def write_card(folder: Path, run: Path, config: TrainConfig, model: DiffusionModel, state: dict) -> None:
    """Write `README.md` with the front matter that the model hub reads.

    Args:
        folder: where the weights lie.
        run: the run's folder, with its records.
        config: what was trained.
        model: on what.
        state: steps done and skipped, seconds.
    """
    base = Path(config.model).name if Path(config.model).exists() else config.model
    method = {"kto": "Diffusion-KTO", "dpo": "Diffusion-DPO"}.get(config.objective, config.objective.upper())
    tags = ["text-to-image", "diffusion-kto", config.objective, *(["lora"] if config.lora_rank else [])]
    front = ModelCardData(base_model=base, library_name="diffusers", pipeline_tag="text-to-image", tags=tags)
    usage = LORA.format(base=base) if config.lora_rank else FULL
    if config.objective == "csft":
        hint = {
            "prefix": 'Write "good image, " before a prompt.',
            "negative": 'Use "Weird image. " as negative prompt.',
        }
        usage += f"\n\n# {hint[config.csft_style]}"
    sampled = hasattr(config, "reward")  # AlignProp and D3PO draw their own pictures and have a scorer judge them
    if sampled:
        data, likes = (
            f"Its own pictures of {len(config.prompts())} prompts, judged by {config.reward}",
            LIKES_OF_A_SCORER,
        )
    else:
        prepared = Path(config.prepared_dir) / "prepared.json"
        rows = json.loads(prepared.read_text())["rows"] if prepared.exists() else 0
        data = f"{rows} rated images"
        likes = LIKES_OF_PEOPLE
    records = read_records(run / "metrics.jsonl")[-20:]
    measured = {name: [r[name] for r in records if name in r] for name in SHOWN}
    figures = "\n".join(f"| {name} | {sum(v) / len(v):.4g} |" for name, v in measured.items() if v)
    settings = "\n".join(f"| {name} | {getattr(config, name)} |" for name in FIELDS if hasattr(config, name))
    what = f"a LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights"
    text = CARD.format(
        front=front.to_yaml(),
        base=base,
        method=method,
        what=what,
        kind=model.pipeline_class.__name__,
        usage=usage,
        data=data,
        likes=likes,
        settings=settings,
        steps=state["global_step"],
        skipped=state["skipped_steps"],
        hours=state["seconds"] / 3600,
        figures=figures,
        count=len(records),
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
    )
    (folder / "README.md").write_text(text)


LIKES_OF_PEOPLE = """on likes and dislikes (Li et al., *Aligning Diffusion Models
by Optimizing Human Utility*, arXiv 2404.04465)"""
LIKES_OF_A_SCORER = "on what a scorer says of its own pictures"


CARD = """---
{front}
---

# {base}, tuned with {method}

A {kind} of which {what} of the denoiser were trained {likes}.

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

These say how well the policy tells its training data apart, not how good its pictures are: judge those on prompts that
were not trained on.

## Limits

The model inherits the biases of the people whose likes it was trained on, and likes can reward unsafe or unwanted
pictures (paper, section 8). Its licence is that of {base}. No safety checker was trained or is part of these weights;
one that the base model has works with them as before.
"""
