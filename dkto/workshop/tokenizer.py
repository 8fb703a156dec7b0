"""A real CLIP byte-level BPE tokenizer in which every word of the small world is one token."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from dkto.world.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, STYLES

MAX_LENGTH = 24  # tokens, with start and end
EXTRA_WORDS = ["good", "bad", "weird", "image", "picture", "photo", "of", "on", "a", "an", "background", "and", "the"]
EXTRA_WORDS += ["right", "below"]  # no relation uses them, but the shipped text encoder's vocabulary holds them
_END = "</w>"


def world_words() -> list[str]:
    """Every word that captions and control prefixes use, sorted."""
    phrases = [*SHAPES, *COLOURS, *BACKGROUNDS, *STYLES, *SIZES, *RELATIONS, *EXTRA_WORDS]
    return sorted({word for phrase in phrases for word in phrase.split()})


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, after which every word is whole."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=_END))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.decoder = decoders.BPEDecoder(suffix=_END)
    # the trainer would number last letters in the order of a hash table, and it breaks ties by number
    last_letters = [letter + _END for letter in sorted(set("".join(words)))]
    options = {"vocab_size": 10_000, "min_frequency": 1, "end_of_word_suffix": _END, "show_progress": False}
    bpe.train_from_iterator([words], trainers.BpeTrainer(special_tokens=last_letters, **options))
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Make the tokenizer and write `vocab.json` and `merges.txt` beside what transformers saves.

    Any text can be encoded: unknown words fall back to bytes. A tokenizer that lies in the folder already is read
    and not made again: weights that were trained with it go with its numbers.
    """
    if (folder / "vocab.json").exists():
        return CLIPTokenizer.from_pretrained(folder)
    merges = _learn_merges(world_words())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + _END for a in alphabet), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return tokenizer
