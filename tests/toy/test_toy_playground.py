import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from toy.objectives import Method
from toy.playground import RECIPE, Playground, grid_methods, key_of

SHORT = RECIPE.replace(pretrain_steps=300, max_train_steps=60, num_samples=200, width=8)


@pytest.fixture(scope="module")
def playground():
    return Playground(SHORT)


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


def test_the_grid_holds_every_choice_of_the_page_once(playground):
    assert len(grid_methods()) == 2 + 6 + 3 * 3 * 2 * 2 * 2 and len(playground.clouds) == 81
    cloud = np.frombuffer(playground.clouds["dpo beta=1 flip=0.3"], dtype=np.float32).reshape(-1, 2)
    np.testing.assert_array_equal(cloud, playground.points["dpo beta=1 flip=0.3"].numpy())


def test_a_setting_trained_alone_is_the_one_of_the_grid(playground):
    alone = playground.train(Method(beta=1.0))
    torch.testing.assert_close(alone, playground.points[key_of(Method(beta=1.0))], rtol=1e-3, atol=1e-3)


def test_the_cloud_follows_the_liked_gaussian(playground):
    means = {"desirable": [0.8, 1.0], "undesirable": [0.2, 0.6]}
    frames = []
    playground.observe(lambda change: frames.append(change["new"]["step"]), "trained")
    moved = playground.train(Method("sft", desirable_fraction=1.0), means)
    assert frames == [10, 20, 30, 40, 50, 60] and playground.means == means
    base, place = playground.points["base"].mean(0), torch.tensor([0.8, 1.0])
    assert (moved.mean(0) - place).norm() < (base - place).norm()


def test_the_page_trains_and_reads_why_not(playground):
    message = {
        "type": "train",
        "settings": {"method": "dpo", "beta": 1, "gamma": 0.5, "clamp": True, "flip": 0},
        "means": {"desirable": [0.3, 0.8], "undesirable": [0.3, 0.6]},
    }
    playground.receive(message)
    assert playground.trained["key"] == "dpo beta=1 flip=0" and playground.message == "" and not playground.busy
    playground.receive(message | {"means": {"desirable": [9, 0], "undesirable": [0, 0]}})
    assert "the desirable Gaussian must lie in" in playground.message
    playground.receive(message | {"settings": message["settings"] | {"method": "kt"}})
    assert "unknown utility 'kt'" in playground.message


def test_the_static_figure_shows_the_named_clouds(playground):
    assert len(playground.figure(["base", "sft flip=0"]).axes) == 2
    with pytest.raises(KeyError, match="no cloud 'nothing' among"):
        playground.figure(["nothing"])
