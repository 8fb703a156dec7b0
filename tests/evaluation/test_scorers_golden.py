"""Published values of the published scorers, where their weights are: skipped, and reported so, elsewhere.

Set DKTO_GOLDEN_IMAGES to a folder with 1.webp to 4.webp of zai-org/ImageReward's assets/images, and DKTO_WEIGHTS as
for any use of the scorers. The values of ImageReward are from its README; the others from the QualityMetric
README of modelscope/DiffSynth-Studio, which scores the same four pictures.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dkto.evaluation.scorers import SCORERS, score

PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
GOLDEN = {
    "image_reward": ([0.58, 0.27, -1.41, -2.03], 0.015),
    "laion_aesthetics": ([5.9009, 5.7766, 5.7999, 5.0520], 0.02),
    "pickscore": ([0.20737, 0.20444, 0.20661, 0.19426], 0.001),
    "clip_h14": ([0.38946, 0.35446, 0.33861, 0.32878], 0.002),
    "hps_v2": ([0.26725, 0.25495, 0.24889, 0.24303], 0.002),
    "hps_v2_1": ([0.23211, 0.20234, 0.19783, 0.19230], 0.002),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_values(name):
    folder = os.environ.get("DKTO_GOLDEN_IMAGES")
    if not folder:
        pytest.skip("DKTO_GOLDEN_IMAGES is not set")
    images = [Image.open(Path(folder) / f"{number}.webp") for number in range(1, 5)]
    try:
        network = SCORERS[name].network()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    found = score(name, images, [PROMPT] * 4)
    if name == "pickscore":  # published there as the plain cosine
        found = found / float(network.model.logit_scale.exp())
    values, tolerance = GOLDEN[name]
    np.testing.assert_allclose(found, values, atol=tolerance)
