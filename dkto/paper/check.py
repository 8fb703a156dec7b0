"""Did a training work? One verdict on a finished run: held-out likes, its records, images on equal noise, controls."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes

from dkto.common.files import read_records, write_atomically, write_json
from dkto.common.frames import read_frame
from dkto.common.settings import checked_number
from dkto.data.encoded import PreparedFeedback
from dkto.data.prompts import load_prompts
from dkto.evaluation.generate import generate_all
from dkto.evaluation.monitors import folder_drift
from dkto.evaluation.scorers import check_scorers
from dkto.evaluation.scoring import score_all
from dkto.evaluation.win_rates import mean_scores, win_rate_table
from dkto.models import System, family_of
from dkto.models.system import TRAINING_RECORD, read_training
from dkto.paper.experiment import side_by_side
from dkto.plotting import COLOURS, plot_training
from dkto.runs.page import figure_html, html_page, table_html, text_html
from dkto.training.calibration import slope_at
from dkto.training.health import MOST_ERROR, training_health
from dkto.training.rewards import Margin, config_of_run, error_gaps, load_run, margin_interval

STILL_REWARD, STILL_PIXELS = 0.01, 0.5 / 255  # below both a policy is its base: no like moves it, no image shows it
PER_FIGURE = 6  # prompts
TUNED, BASE, SHUFFLED = "tuned", "base", "shuffled likes"


def check_run(
    run: str | Path,
    *,
    output_dir: str | Path | None = None,
    held_out: str | Path | None = None,
    prompts: str = "",
    count: int = 50,
    images_per_prompt: int = 1,
    scorers: tuple[str, ...] = (),
    shuffled: str | Path | None = None,
    guidance: float = 0.0,
    guidance_scales: tuple[float, ...] = (),
    samples: int = 512,
    draws: int = 4,
    seed: int = 0,
    num_processes: int = 1,
) -> dict:
    """Judge a finished run in one page; called again, what is drawn and scored is kept.

    The folder gets `index.html`, `check.json`, which is returned, and the images.

    Args:
        run: folder of the training, which `dkto train` finished.
        output_dir: folder for the page; `RUN/check` if left out.
        held_out: likes that were not trained on; what `dkto prepare --held-out` set apart if left out.
        prompts: a file or a set of prompts that were not trained on; those of the held-out likes if left out.
        count: prompts to take at most.
        images_per_prompt: images of each prompt, from the same noise for every system.
        scorers: names of scorers, or none.
        shuffled: folder of the same training on shuffled likes, the control.
        guidance: scale for all systems; 0 takes the one of the model's family.
        guidance_scales: of the base, of which the one with the best mean of the first scorer is compared too;
            chosen on the judged prompts, which favours the base.
        samples: held-out images that are measured at most.
        draws: noises of each held-out image.
        seed: of all starting noise.
        num_processes: workers that draw and score (0: this process).

    Raises:
        FileNotFoundError: if the run is not finished, or there is neither held-out feedback nor a list of prompts.
        ValueError: if guidance scales are given without a scorer, the control was trained on the same likes, or as what
            it calls.
    """
    run = Path(run)
    folder, config = Path(output_dir or run / "check"), config_of_run(run)
    if guidance_scales and not scorers:
        raise ValueError(f"guidance_scales need scorers, which say what is best, got {guidance_scales} and none")
    if shuffled and config_of_run(shuffled) and _feedback(run) == _feedback(Path(shuffled)):
        raise ValueError(f"shuffled must be a training on shuffled likes, but {shuffled} was trained on those of {run}")
    held_out = Path(held_out or config.prepared_dir / "held_out")
    texts = _prompts(prompts, held_out, checked_number("count", count, least=1), seed)
    check_scorers(scorers, texts)
    records, health = read_records(run / "metrics.jsonl"), None
    if any("utility_slope" in record for record in records):
        health = training_health(records, config.utility)
    rewards, liked = _held_out_rewards(run, held_out, samples, draws)
    found: dict[str, object] = {"run": run.name, "objective": config.objective, "steps": config.max_train_steps}
    first, last = (np.nanmean([r.get("policy_error", np.nan) for r in part]) for part in (records[:20], records[-20:]))
    found |= {"error": float(last / first), "light": health.light if health else "none"}
    found |= {"slope": health.slope, "health": health.sentence} if health else {}
    found["reward"] = float(np.abs(rewards).mean()) if len(rewards) else records[-1].get("mean_abs_reward", np.nan)
    if min(liked.sum(), (~liked).sum()) > 1:
        found["margin"] = margin_interval(rewards, liked)._asdict()
        found["held_out_slope"] = slope_at(rewards.mean(1), liked, 1.0, config).mean_slope
        if shuffled:
            other = _held_out_rewards(Path(shuffled), held_out, samples, draws)[0]
            found["shuffled_margin"] = margin_interval(other, liked)._asdict()
            found["over_shuffled"] = margin_interval(rewards - other, liked)._asdict()
    family = family_of(System(model=config.model).opened())
    drawing = family.drawing() | ({"guidance": guidance} if guidance else {})
    systems = {BASE: System(model=config.model, **drawing), TUNED: System.of_run(run, **drawing)}
    systems |= {SHUFFLED: System.of_run(shuffled, **drawing)} if shuffled else {}
    scales = {f"{BASE} at {scale:g}": replace(systems[BASE], guidance=scale) for scale in guidance_scales}
    options = {"images_per_prompt": images_per_prompt, "seed": seed, "num_processes": num_processes}
    folders = generate_all(systems | scales, texts, folder / "images", **options, **family.passes())
    found |= {"drift": folder_drift(folders[TUNED], folders[BASE]), "prompts": len(texts)}
    rates = means = pd.DataFrame()
    if scorers:
        scores = score_all(folders, scorers, num_processes=num_processes)
        best = max(scales, key=lambda name: scores[name, scorers[0]].mean(), default=None)
        others = [BASE, *([SHUFFLED] if shuffled else []), *([best] if best else [])]
        rates, means = win_rate_table(scores, [(TUNED, other) for other in others]), mean_scores(scores)
        found["win_rates"] = rates.astype(object).where(rates.notna(), None).to_dict("records")
    verdict, sentences = judge(found)
    found = {"verdict": verdict, "sentences": sentences, **found}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "check.json", {k: None if v != v else v for k, v in found.items()})
    shown = {name: folders[name] for name in systems}
    _write_page(folder, found, records, (rewards, liked), shown, rates, means)
    return found


def judge(found: Mapping) -> tuple[str, list[str]]:
    """The verdict on the measures of `check_run`, and the sentences behind it.

    The first that holds: "nothing moved", "sick", "open", "likes not used", "control missing", "worked". A margin above
    0 alone is no proof: what any training on these images changes may differ between liked and disliked ones.

    >>> judge({"reward": 0.001, "drift": 0.0, "light": "green", "error": 1.0})[0]
    'nothing moved'
    """
    moved = f"rewards are {found['reward']:.2g} on average, and images differ from the base's by {found['drift']:.2%}"
    if found["reward"] < STILL_REWARD and found["drift"] < STILL_PIXELS:
        return "nothing moved", [f"The model is still its base: {moved}.", "Raise the learning rate, or train longer."]
    sentences = [f"The model moved: {moved} of the range of a pixel."]
    if found["light"] == "red" or not found["error"] <= MOST_ERROR:
        why = found.get("health") or f"the denoising error is {found['error']:.2f} times that of the first steps"
        smaller = "Take a smaller beta or learning rate; `dkto calibrate` proposes a beta."
        return "sick", [f"The training is sick. {why.capitalize()}.", smaller, *sentences]
    if "margin" not in found:
        missing = "Whether the likes did it is open: there are no two liked and two disliked held-out images."
        return "open", [missing, "Prepare with `--held-out 0.1`, and train again.", *sentences]
    margin = Margin(**found["margin"])
    about = f"on {margin.liked} liked and {margin.disliked} disliked held-out images the margin of the rewards is "
    about += _interval(margin)
    if margin.low <= 0:
        width = (margin.high - margin.low) / 2
        few = f"A margin below {width:.2g} could not be seen with so few images." if margin.high > 0 else ""
        holds = "which holds 0" if margin.high >= 0 else "which is below 0: it learned the opposite"
        unused = f"The labels were not used as far as can be seen: {about}, {holds}."
        return "likes not used", [*filter(None, (unused, few)), *sentences]
    if found["light"] == "yellow":
        sentences.append(f"Take care. {found['health'].capitalize()}.")
    if "over_shuffled" not in found:
        parts = f"The likes part from the dislikes: {about}."
        missing = "Whether the labels did it, or any training on these images, a control says: train the same on what "
        missing += "`dkto shuffle` makes, and give it as --shuffled."
        return "control missing", [parts, missing, *sentences, *_rates(found)]
    over = Margin(**found["over_shuffled"])
    if over.low <= 0:
        same = f"The same training on shuffled likes parts the images as well: the difference is {_interval(over)}."
        return "likes not used", [same, f"By itself, {about}.", *sentences, *_rates(found)]
    more = f"That is more than after the same training on shuffled likes, by {_interval(over)}."
    return "worked", [f"It worked: {about}.", more, *sentences, *_rates(found)]


def _interval(margin: Margin) -> str:
    return f"{margin.mean:.3g} [{margin.low:.3g}, {margin.high:.3g}]"


def _rates(found: Mapping) -> list[str]:
    """A sentence for each win-rate."""
    kinds = {True: "wins against", False: "is not shown to win against"}
    return [
        f"The tuned model {kinds[row['low'] > 0.5]} the {row['opponent']} under {row['scorer']}: on "
        f"{row['win_rate']:.0%} [{row['low']:.0%}, {row['high']:.0%}] of {row['n']} prompts."
        for row in found.get("win_rates", ())
    ]


def _held_out_rewards(run: Path, held_out: Path, samples: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, draws) implicit rewards of held-out rows by a run, and (N,) whether each was liked; none where there are no
    rows."""
    if not (held_out / "prepared.json").is_file():
        return np.zeros((0, draws)), np.zeros(0, bool)
    config, model, pair = load_run(run)
    data = PreparedFeedback(held_out, model)
    rows = np.unique(np.linspace(0, len(data) - 1, min(samples, len(data))).astype(np.int64))
    pair.to("cuda" if torch.cuda.is_available() else "cpu")
    gaps = error_gaps(model, pair, data, config, draws=draws, rows=rows)
    del pair
    torch.cuda.empty_cache()  # the pipelines need the room
    return config.beta * gaps, data.is_desirable[rows]


def _feedback(run: Path) -> str | None:
    """Hash of what a run was trained on."""
    return read_training(run / TRAINING_RECORD, {}).get("feedback")


def _prompts(source: str, held_out: Path, count: int, seed: int) -> list[str]:
    """At most `count` prompts of a list, or of held-out likes."""
    path = held_out / "prompts.parquet"
    if source:
        found = load_prompts(source)
        return list(found.take(min(count, len(found)), seed).prompts)
    if not path.is_file():
        raise FileNotFoundError(f"{held_out} holds no held-out likes: prepare with --held-out, or give --prompts")
    texts = [text for text in read_frame(path, "prompts", {"prompt": "text"})[0]["prompt"] if text]
    return [texts[i] for i in np.unique(np.linspace(0, len(texts) - 1, count).astype(int))]


def _write_page(
    folder: Path,
    found: Mapping,
    records: list[dict],
    measured: tuple[np.ndarray, np.ndarray],
    folders: Mapping[str, Path],
    rates: pd.DataFrame,
    means: pd.DataFrame,
) -> None:
    """One page with all figures in it."""
    title = f"Did it work? {found['run']}: {found['verdict']}"
    parts = [text_html(title, "h1"), *(text_html(each, kind="lead") for each in found["sentences"])]
    rewards, liked = measured
    if len(rewards):
        sides = pd.DataFrame({"implicit reward": rewards.mean(1), "image": np.where(liked, "liked", "disliked")})
        colours = {"liked": COLOURS["desirable"], "disliked": COLOURS["undesirable"]}
        options = {"hue": "image", "palette": colours, "stat": "density", "common_norm": False, "element": "step"}
        axes = sns.histplot(sides, x="implicit reward", ax=plt.subplots(figsize=(6, 3))[1], **options)
        parts += ["<h2>Held-out likes</h2>", _figure(folder / "rewards.png", axes, "Rewards of images not trained on")]
    parts += ["<h2>While it trained</h2>", text_html(found.get("health", "This objective has no slope to judge."))]
    parts.append(_figure(folder / "training.png", plot_training(records)[0], "Loss and rewards, step by step"))
    if len(rates):
        parts += ["<h2>Scores</h2>", table_html(rates, "Win-rates per prompt, with 95 % intervals"), table_html(means)]
    parts.append("<h2>Images from the same noise</h2>")
    for start in range(0, found["prompts"], PER_FIGURE):
        rows = range(start, start + PER_FIGURE)
        parts.append(
            _figure(folder / f"images_{start}.png", side_by_side(folders, rows), f"Prompts from {start + 1} on")
        )
    page = html_page(title, "\n".join(parts))
    write_atomically(folder / "index.html", lambda part: part.write_text(page, encoding="utf-8"))


def _figure(path: Path, axes: Axes, caption: str) -> str:
    axes.figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(axes.figure)
    return figure_html(path, caption)
