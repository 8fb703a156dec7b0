"""The README's Python runs as it stands."""

import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_turn_likes_into_a_redder_picture(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(code.strip().splitlines()) <= 12
    shutil.copytree(ROOT / "notebooks" / "likes", tmp_path / "notebooks" / "likes")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    before, after = (
        np.asarray(Image.open(tmp_path / "my_run" / f"{name}.png")).astype(float) for name in ("before", "after")
    )
    assert before.shape == (256, 256, 3)
    red = [p[..., 0].mean() - p[..., 1:].mean() for p in (before, after)]
    assert red[1] > red[0] + 5  # of 255


def test_links_and_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    block = README.split("## Files")[1].split("```")[1]
    for line in block.strip().splitlines():
        assert (ROOT / line.split()[0].rstrip(",")).exists(), line


def test_the_example_table_reads():
    from dkto import read_feedback

    table = read_feedback(ROOT / "notebooks" / "likes" / "likes.csv")
    assert table.is_desirable.any() and not table.is_desirable.all()
