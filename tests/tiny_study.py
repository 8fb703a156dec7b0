"""Two methods whose pictures a test can tell apart by colour, and a judge who answers by it."""

from PIL import Image

from dkto.common.files import write_json
from dkto.evaluation.manifest import image_path

STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPT_STYLES = [*STYLES] * 6  # of the 24 prompts
OURS, THEIRS = (255, 0, 0), (0, 0, 255)


def draw_folders(tmp_path):
    """Two methods' folders for 6 prompts of each style: ours draws red pictures, theirs blue ones, two each."""
    found = {}
    for name, colour in (("kto", OURS), ("base", THEIRS)):
        folder = tmp_path / name
        folder.mkdir()
        prompts = [f"prompt {p}" for p in range(24)]
        write_json(folder / "manifest.json", {"system": {}, "prompts": prompts, "images_per_prompt": 2, "seed": 0})
        for p in range(24):
            for i in range(2):
                Image.new("RGB", (2, 2), (colour[0], 5 * i, colour[2])).save(image_path(folder, p, i))
        found[name] = folder
    return found


def is_ours(path):
    return Image.open(path).getpixel((0, 0))[0] > 100


def finish(session, prefers_ours):
    """Answer what is left; `prefers_ours(pair)` says whether the red picture is taken."""
    while (pair := session.next()) is not None:
        session.answer(pair.number, "left" if is_ours(pair.left) == prefers_ours(pair) else "right")
