import json
import subprocess
import sys

from dkto.models import SMALL_WORLD_FOLDER
from dkto.workshop.tokenizer import build_tokenizer, world_words


def test_every_word_of_the_world_is_one_token_and_other_words_are_bytes(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    assert [word for word in world_words() if len(tokenizer(word).input_ids) != 3] == []
    assert len(tokenizer("zebra").input_ids) > 4


def test_it_is_the_same_in_every_process(tmp_path):
    """Weights are trained over several sessions and exported by another: one word must not change its number."""
    code = "import sys, pathlib; from dkto.workshop.tokenizer import build_tokenizer as b; b(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True)
    for number in range(4):
        build_tokenizer(tmp_path / str(number))
        for name in ("vocab.json", "merges.txt"):
            assert (tmp_path / str(number) / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_one_that_lies_in_the_folder_is_kept(tmp_path):
    shipped = SMALL_WORLD_FOLDER / "tokenizer"
    for path in shipped.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = build_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == json.loads((shipped / "vocab.json").read_text())
    assert (tmp_path / "merges.txt").read_bytes() == (shipped / "merges.txt").read_bytes()
