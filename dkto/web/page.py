"""Build the page: `python -m dkto.web.page [FOLDER]` writes one offline HTML file, and the same page to be served.

Both hold the same files, packed: inside the HTML as base64, or beside it.
"""

import base64
import gzip
import json
import sys
from dataclasses import asdict
from pathlib import Path

from dkto.common.ends import guarded
from dkto.common.files import read_json, write_atomically
from dkto.models.base import SMALL_WORLD_FOLDER
from dkto.models.system import System
from dkto.web.blob import BATCH, BLOB, KNOTS, NAMES, REACH, read_graph, read_layout, weights_of, wire_bytes
from dkto.web.lora import RANK
from dkto.web.runtime import ONNXRUNTIME, package_file
from dkto.widgets.base import FOLDER as WIDGETS
from dkto.widgets.base import SHARED
from dkto.world import scenes
from dkto.world.tastes import blotchy_prompt

HERE = Path(__file__).parent
OUTPUT = HERE.parents[1] / "papermill_runs" / "outputs" / "page"
SINGLE, SERVED = "teach_your_taste.html", "served"
UTILITIES = SHARED[-1]
FORMULA = WIDGETS / "formula.js"
ENGINE = (UTILITIES, FORMULA, *(HERE / f"{name}.js" for name in ("numbers", "tokenizer", "engine")))
PARTS = ("numbers", "verdicts", "zip", "settings", "machine", "state")
SECTIONS = ("feelings", "judging", "tuning", "comparing", "taking", "kept", "page")
KEPT = HERE / "kept_run.json"  # of dkto.web.keep: what is shown where the model cannot run
PAGE = (*SHARED, FORMULA, *(HERE / f"{name}.js" for name in (*PARTS, *SECTIONS)))
KEPT_FIELDS = ("settings", "prompts", "liked", "log", "positions", "sprite")
STYLES_OF_PAGE = (WIDGETS / "common.css", HERE / "page.css")


def prompt_pools() -> dict[str, dict[str, list[str]]]:
    """Prompts to judge, others that are held out, and those of these for which base and tuned are compared; by pool.

    `open` leaves colour and background to the model. Four that are held out ask for a colour, to show that it stays; no
    taste for a colour can win there, so they are not compared. `paintings` are full captions: every second one, and
    each that is held out, is a painting on white or grey, which the model draws cloudy.

    >>> pools = prompt_pools()
    >>> [(name, *map(len, pool.values())) for name, pool in pools.items()]
    [('open', 16, 12, 8), ('paintings', 40, 12, 12)]
    """
    train, held = scenes.open_prompts(("star", "ring", "circle", "cross", "square", "triangle"))
    stated = ["an icon of a red triangle", "a toy of a green square", "a sticker of a yellow cross"]
    cloudy = scenes.prompts_for("train", 20, where=blotchy_prompt)
    others = [text for text in scenes.prompts_for("train", 26) if scenes.parse(text).style != "painting"]
    paintings = scenes.prompts_for("test", 12, where=blotchy_prompt)
    every_second = [text for pair in zip(cloudy, others, strict=True) for text in pair]
    return {
        "open": {
            "train": train[::3] + train[1::3] + train[2::3],
            "held": [*held, *stated, "a painting of a blue star"],
            "compared": held,
        },
        "paintings": {"train": every_second, "held": paintings, "compared": paintings},
    }


def about() -> dict:
    """What the engine needs beside weights and graphs: layout, tokenizer, schedule, the sampler's settings."""
    layout, system = read_layout(), System()
    tokenizer, scheduler, unet = SMALL_WORLD_FOLDER / "tokenizer", "scheduler/scheduler_config.json", "unet/config.json"
    schedule = read_json(SMALL_WORLD_FOLDER / scheduler, "configuration of a scheduler")
    vocabulary = read_json(tokenizer / "vocab.json", "vocabulary")
    settings = read_json(tokenizer / "tokenizer_config.json", "configuration of a tokenizer")
    merges = (tokenizer / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    names = {"bos": "bos_token", "eos": "eos_token", "pad": "pad_token"}
    return {
        "tensors": layout.tensors,
        "lora": [asdict(layer) for layer in layout.lora],
        "blob": BLOB,
        "rank": RANK,
        "batch": BATCH,
        "knots": KNOTS,
        "reach": REACH,
        "width": read_json(SMALL_WORLD_FOLDER / unet, "configuration of a UNet")["cross_attention_dim"],
        "guidance": system.guidance,
        "steps": system.steps,
        "schedule": {key: schedule[key] for key in ("beta_start", "beta_end", "num_train_timesteps")},
        "tokenizer": {
            "vocab": vocabulary,
            "merges": [line for line in merges if line],
            "length": settings["model_max_length"],
            **{key: vocabulary[settings[name]] for key, name in names.items()},
        },
    }


def files() -> dict[str, bytes]:
    """What the page reads, by name.

    Raises:
        FileNotFoundError: if the runtime is not in the cache and cannot be fetched.
    """
    layout = read_layout()
    return {
        "runtime": package_file(ONNXRUNTIME, "dist/ort.wasm.min.js"),
        "glue": package_file(ONNXRUNTIME, "dist/ort-wasm-simd-threaded.mjs"),
        "wasm": package_file(ONNXRUNTIME, "dist/ort-wasm-simd-threaded.wasm"),
        "worker": joined((*ENGINE, HERE / "worker.js")).encode(),
        "about": json.dumps(about(), separators=(",", ":")).encode(),
        "weights": wire_bytes(layout, weights_of(layout)),
        **{name: read_graph(name) for name in NAMES},
    }


def joined(paths: tuple[Path, ...]) -> str:
    """Scripts or styles behind one another."""
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def html(inside: dict[str, bytes]) -> str:
    """The page; `inside` are packed files that it holds itself."""
    script = f"window.DKTO_POOLS = {json.dumps(prompt_pools())};\n{joined(PAGE)}"
    if "</script" in script.lower():
        raise ValueError("a script of the page must not hold its own end tag")
    held = [
        f'<script type="application/x-gzip-base64" id="file-{name}">{base64.b64encode(data).decode()}</script>'
        for name, data in inside.items()
    ]
    page = (HERE / "page.html").read_text(encoding="utf-8")
    parts = {"CONNECT": "data:" if inside else "'self' data:", "/*STYLE*/": joined(STYLES_OF_PAGE)}
    parts["/*KEPT*/"] = json.dumps(read_json(KEPT, "kept run of the page", KEPT_FIELDS)).replace("</", "<\\/")
    for mark, text in (parts | {"<!--FILES-->": "\n".join(held), "/*SCRIPT*/": script}).items():
        before, found, after = page.partition(mark)
        if not found:
            raise ValueError(f"page.html must hold {mark}")
        page = before + text + after
    return page


def build_page(output: Path = OUTPUT) -> Path:
    """Write the page twice: one offline file that opens by a double click, and a folder to be served.

    Returns:
        The offline file.

    Raises:
        FileNotFoundError: if the runtime is not in the cache and cannot be fetched.
    """
    packed = {name: gzip.compress(data, 9, mtime=0) for name, data in files().items()}
    served = output / SERVED
    (served / "files").mkdir(parents=True, exist_ok=True)
    for name, data in packed.items():
        write_atomically(served / "files" / f"{name}.gz", lambda part, data=data: part.write_bytes(data))
    for path, inside in ((served / "index.html", {}), (output / SINGLE, packed)):
        write_atomically(path, lambda part, inside=inside: part.write_text(html(inside), encoding="utf-8"))
    return output / SINGLE


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    sys.exit(guarded(lambda: print(f"the page is {build_page(folder)}; {folder / SERVED} is to be served"), "dkto"))
