"""The `dkto` command: a table of functions, each of which calls what notebooks call too."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from dkto.common.commands import Calls, run_commands

if TYPE_CHECKING:
    from dkto.training.config import RunConfig

READ_FEEDBACK = "dkto.data.feedback:read_feedback"
Threads = Annotated[int, "CPU threads, 0 leaves torch's default"]
Recipe = Annotated[
    Literal["paper", "lora"], "settings that are not given: paper, or lora for what fits the model's family"
]
Scorers = Annotated[tuple[str, ...], "names of scorers"]


def feedback(
    read: Calls(READ_FEEDBACK),
    held_out: Annotated[float, "share of the prompts that `dkto prepare --held-out` would set apart"] = 0.1,
    gamma: Annotated[float, "chance that training draws a liked sample, no unit (paper 0.8)"] = 0.8,
) -> None:
    """Read likes and say what they hold, without encoding anything."""
    from dkto.data.feedback import describe_feedback

    print(describe_feedback(read(), held_out, gamma))


def unpack(convert: Calls("dkto.data.pairs:convert_pairs")) -> None:
    """Unpack tables that carry their images (Pick-a-Pic's shards and others) to image files and a table of likes."""
    path = convert()
    print(path.with_suffix(".json").read_text().strip())
    rule = "; `dkto feedback` makes likes of them: --score COLUMN" if path.stem == "scores" else ""
    print(f"{path.stem.partition('_')[0]} are in {path}{rule}")


def prepare(
    read: Calls(READ_FEEDBACK),
    encode: Calls("dkto.data.encode:prepare_feedback", without="feedback output_dir"),
    output_dir: Annotated[Path, "folder for the encoded data; called again, it encodes what is missing"],
    held_out: Annotated[float, "share of the prompts to set apart, encoded in OUTPUT_DIR/held_out"] = 0.0,
) -> None:
    """Encode the images and prompts of a feedback table to disk, once."""
    table = read()
    print(table)
    encode = _fitting(encode, encode.keywords.get("model", ""), "encoding")
    train, rest = table.split_by_prompt(held_out)
    for part, folder in ((train, output_dir), (rest, output_dir / "held_out")):
        if len(part) or part is train:
            encode(part, folder)
            print(f"encoded in {folder}: {(folder / 'summary.json').read_text()}".strip())


def shuffle(shuffled: Calls("dkto.data.encode:shuffle_prepared")) -> None:
    """Copy prepared feedback with its likes shuffled, to train the control that carries no preference."""
    print(f"the same images with shuffled likes are in {shuffled()}")


def train(config: Calls("dkto.training.config:TrainConfig"), recipe: Recipe = "paper", threads: Threads = 0) -> None:
    """Tune a model on prepared likes and dislikes; called again, it goes on where it stopped."""
    _tune(_by_recipe(config, recipe), threads)


def _by_recipe(config: partial, recipe: str) -> "RunConfig":
    from dkto.data.encoded import preparing_model

    if recipe == "paper":
        return config()
    model = config.keywords.get("model") or preparing_model(Path(config.keywords["prepared_dir"]))
    return _fitting(config, model, "training")()


def train_online(config: Calls("dkto.training.config:OnlineConfig"), threads: Threads = 0) -> None:
    """Tune a model on images that it draws while it learns: AlignProp or D3PO; resumes as `train` does."""
    _tune(config(), threads)


def _tune(config: "RunConfig", threads: int) -> None:
    from dkto.training.loop import run_training
    from dkto.training.run_folder import RunFolder

    _use_threads(threads)
    run_training(config)
    stopped = "stopped at a checkpoint; the same command goes on from it:"
    finished = RunFolder(config).is_finished()
    print("finished; records and weights are in" if finished else stopped, config.output_dir)


def _use_threads(count: int) -> None:
    if count:
        import torch

        torch.set_num_threads(count)


def calibrate(
    measure: Calls("dkto.training.calibration:calibrate", without="config draws"),
    config: Calls("dkto.training.config:TrainConfig"),
    recipe: Recipe = "paper",
    threads: Threads = 0,
) -> None:
    """Measure the gap of errors that a short trial training makes, and propose beta for it."""
    from dkto.training.calibration import CONVENTIONS, convert_beta

    _use_threads(threads)
    found = measure(_by_recipe(config, recipe))
    print(f"{found}\nthe same in the words of other codes:")
    for name, (_, reduction, about) in CONVENTIONS.items():
        if reduction == "mean" and name != "dkto":
            print(f"{convert_beta(found.beta, 'dkto', name):>10.4g}  {name}: {about}")


def memory(
    row: Calls("dkto.training.memory:memory_row", without="name lora_rank"),
    models: Annotated[
        tuple[str, ...], "which denoisers: small-world, sd15, sdxl, sd3, qwen-image, z-image, flux2-klein"
    ] = ("sd15", "sdxl", "sd3"),
    lora_ranks: Annotated[tuple[int, ...], "ranks of adapters; 0 is full fine-tuning"] = (0, 32),
    measure: Annotated[bool, "measure batch 1 in float32 on this CPU instead, beside the computed memory"] = False,
) -> None:
    """Say how much memory a training takes, and the largest batch for some GPUs, without taking it; minutes a row."""
    from dkto.common.progress import progress
    from dkto.training.memory import SIZES, measured_step_memory, memory_table, step_memory, text_memory

    wanted = [(name, rank) for name in models for rank in lora_ranks]
    if not measure:
        print(memory_table([row(*each) for each in progress(wanted, desc="computing", unit="row")]))
        for name in (name for name in models if SIZES[name].text):
            print(f"{SIZES[name].title}: dkto prepare holds text encoders of {text_memory(name):.1f} GB on a GPU")
        return
    for name, rank in wanted:
        computed, measured = (gb(name, lora_rank=rank) for gb in (step_memory, measured_step_memory))
        print(f"{SIZES[name].title}, rank {rank}: computed {computed:.2f} GB, measured {measured:.2f} GB")


def generate(
    prompts: Annotated[str, "a file (one prompt a line, TSV, CSV, JSON), or a set such as world_test or hps_v2"],
    system: Calls("dkto.models.system:System"),
    draw: Calls("dkto.evaluation.generate:generate_images", without="system prompts"),
    count: Annotated[int, "prompts to take, evenly from the styles; 0 takes all"] = 0,
) -> None:
    """Draw images for a list of prompts with the same starting noise for every method."""
    from dkto.data.prompts import load_prompts
    from dkto.models import System
    from dkto.models.base import EXAMPLE, SMALL_WORLD

    given, texts = system.keywords, load_prompts(prompts, count=count).prompts
    model = given.get("model") or System.model_trained(given.get("lora") or given.get("unet", ""))
    if not model:
        raise ValueError(f"--model must name what draws, as {EXAMPLE} or {SMALL_WORLD!r}, got nothing")
    system = _fitting(partial(system, model=model), model, "drawing")
    print(f"images are in {_fitting(draw, model, 'passes')(system(), texts)}")


def _fitting(call: partial, model: str, kind: str) -> partial:
    """A call with what fits the model's family, see `dkto.models.families`, where no option says otherwise."""
    from dkto.models import family_of, load_model

    return partial(call, **(getattr(family_of(load_model(model)), kind)() | call.keywords)) if model else call


def score(
    folder: Annotated[Path, "written by `dkto generate`"],
    score_all: Calls("dkto.evaluation.scoring:score_all", without="folders scorers"),
    scorers: Scorers = ("world_fidelity",),
) -> None:
    """Score a folder of generated images."""
    for (_, name), scores in score_all({folder.name: folder}, scorers).items():
        print(f"{name}: mean {scores.mean():.4f} over {scores.size} images, kept in {folder / 'scores'}")


def evaluate(
    ours: Annotated[Path, "images of the method whose wins are counted"],
    theirs: Annotated[tuple[Path, ...], "images of the methods it is compared with"],
    scorers: Scorers = ("world_fidelity",),
) -> None:
    """Win-rate of one folder of images over others: median image per prompt, ties half, Tango's score interval."""
    from dkto.evaluation.scoring import score_all
    from dkto.evaluation.win_rates import win_rate_table

    paths = (ours, *theirs)
    alike = len({path.name for path in paths}) < len(set(paths))
    names = [str(path) if alike else path.name for path in paths]
    scores = score_all(dict(zip(names, paths, strict=True)), scorers)
    print(win_rate_table(scores, [(names[0], other) for other in names[1:]]).to_string(index=False))


def export(write: Calls("dkto.models.export:export_lora")) -> None:
    """Write a run's LoRA as one file for ComfyUI and AUTOMATIC1111, or for diffusers."""
    print(f"the LoRA is in {write()}")


def check(measure: Calls("dkto.paper.check:check_run")) -> None:
    """Say whether a finished training worked: held-out likes, health, images on equal noise, scores and controls."""
    found = measure()
    folder = measure.keywords.get("output_dir") or Path(measure.keywords["run"], "check")
    print("\n".join([f"verdict: {found['verdict']}", *found["sentences"], f"figures are in {folder}/index.html"]))


def run(
    notebook: Annotated[Path, "the notebook"],
    output: Annotated[Path, "where the executed copy goes"],
    parameters: Annotated[tuple[str, ...], "NAME=VALUE, read by the type that the notebook declares"] = (),
    gpus: Annotated[int, "with --cards: how many of them this run takes, waiting until they are free"] = 0,
    cards: Annotated[str | None, "GPUs that runs share, as in CUDA_VISIBLE_DEVICES; all if left out"] = None,
) -> None:
    """Execute a notebook with papermill, refusing parameters that it does not declare."""
    from dkto.common.names import printable
    from dkto.common.processes import graphics_cards
    from dkto.common.progress import QUIET_VARIABLE
    from dkto.runs.notebooks import run_notebook

    given: dict[str, str] = {}
    for text in parameters:
        name, equals, value = text.partition("=")
        if not equals or name in given:
            raise ValueError(f"--parameters takes NAME=VALUE, each name once, got {text!r}")
        given[name] = value
    shared = [card for card in (cards or "").split(",") if card]
    with graphics_cards(gpus if cards is not None else 0, shared) as mine:
        if cards is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        metrics = run_notebook(notebook, output, given, progress=QUIET_VARIABLE not in os.environ)
    for name, value in metrics.items():
        print(f"{printable(name)} = {value}")


def sweep(
    read: Calls("dkto.runs.sweeps:read_sweep", without="changes"),
    start: Calls("dkto.runs.runner:run_sweep", without="plan"),
    only: Annotated[tuple[str, ...], "names of runs: these and those that they read; all if left out"] = (),
    dry_run: Annotated[bool, "check everything and show the plan; nothing starts"] = False,
) -> None:
    """Run every notebook of a sweep; called again, it does only what is missing or failed."""
    from dkto.runs.runner import show_plan

    plan = read().only(only)
    if dry_run:
        print(show_plan(plan))
    else:
        start(plan)


def demo(
    output_dir: Annotated[Path, "folder for everything the demo makes"] = Path("papermill_runs/outputs/demo"),
) -> None:
    """The main job, end to end: likes of generated images to a win-rate table, by papermill."""
    from dkto.paper.demo import run_demo

    run_demo(output_dir)


def paper(replay: Calls("dkto.paper.replay:run_paper")) -> None:
    """Replay the paper on the small world: notebooks through papermill, metrics.json and one HTML page."""
    replay()


def paper_search(
    config: Calls("dkto.paper.search_config:SearchConfig"),
    keep: Annotated[Path, "JSON file for the result"] = Path("papermill_runs/paper_settings.json"),
) -> None:
    """Search the settings of every method, the same number of tries for each, on validation prompts."""
    from dkto.paper.search import search_settings

    print(f"{search_settings(config(), keep).to_string(index=False)}\nkept in {keep}")


COMMANDS = (
    *(feedback, unpack, prepare, shuffle, calibrate, memory, train, train_online, generate, score, evaluate),
    *(check, export, run, sweep, demo, paper, paper_search),
)


def main(arguments: list[str] | None = None) -> int:
    """Run one sub-command; a mistake of the user ends in one sentence and exit code 2."""
    return run_commands(COMMANDS, arguments, "dkto")


if __name__ == "__main__":
    sys.exit(main())
