"""The toy to touch: choose method, beta, gamma, clamp and label noise, drag the two Gaussians, train now (paper 7).

The clouds of a grid of settings are computed once, all members in one stack; any other setting, and any place of
the Gaussians, is one member that trains while you watch.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from dkto.plotting import COLOURS, PAPER_UTILITIES
from dkto.widgets.base import ROLE_COLOURS, Instrument, script, style
from toy.network import Architecture, Ensemble, one_thread
from toy.objectives import Method
from toy.plotting import method_label
from toy.sampling import sample_ensemble
from toy.schedule import linear_schedule
from toy.training import SMALL, Recipe, pretrain, run, tune
from toy.world import DESIRABLE, PRETRAINING, UNDESIRABLE, Gaussian, to_paper_units

FOLDER = Path(__file__).parent
BETAS = (1.0, 10.0, 100.0)
GAMMAS = (0.5, 0.8)
FLIPS = (0.0, 0.3)
RECIPE = SMALL.replace(pretrain_steps=1500, max_train_steps=600, num_samples=700)
FRAMES = 6  # how often a training is shown on its way
NEAREST, FARTHEST = (-0.5, 0.0), (1.5, 2.0)  # corners that bound where the Gaussians can be dragged


def grid_methods() -> dict[str, Method]:
    """The settings whose clouds are computed beforehand, by key (see `key_of`); what a method ignores is not varied."""
    methods = [Method("sft", desirable_fraction=1.0, flip_rate=flip) for flip in FLIPS]
    methods += [Method("dpo", beta=beta, flip_rate=flip) for beta, flip in product(BETAS, FLIPS)]
    for utility, beta, gamma, clamp, flip in product(PAPER_UTILITIES, BETAS, GAMMAS, (True, False), FLIPS):
        methods.append(Method("kto", utility, clamp=clamp, beta=beta, desirable_fraction=gamma, flip_rate=flip))
    return {key_of(method): method for method in methods}


def key_of(method: Method) -> str:
    """A setting as text, without what its objective ignores.

    >>> key_of(Method("dpo", beta=10.0))
    'dpo beta=10 flip=0'
    """
    flip = f"flip={method.flip_rate:g}"
    if method.objective == "sft":
        return f"sft {flip}"
    if method.objective == "dpo":
        return f"dpo beta={method.beta:g} {flip}"
    gamma, clamp = f"gamma={method.desirable_fraction:g}", "yes" if method.clamp else "no"
    return f"{method.utility} beta={method.beta:g} {gamma} clamp={clamp} {flip}"


class Playground(Instrument):
    """Clouds of the toy for a grid of settings, and a button that trains any other in about a second.

    Args:
        recipe: sizes and rates; the small recipe, shortened, unless given.
        seed: of pretraining, tuning and sampling.
        precompute: compute the clouds of `grid_methods` now (some seconds); without, only the button draws.
    """

    _esm = script("playground", FOLDER)
    _css = style("playground", FOLDER)

    clouds = traitlets.Dict().tag(sync=True)  # by key: float32 bytes of (N, 2) points in paper units
    trained = traitlets.Dict().tag(sync=True)  # key, step, points (bytes), means; of the training on the button
    means = traitlets.Dict().tag(sync=True)  # desirable, undesirable: [x, y]
    world = traitlets.Dict().tag(sync=True)
    choices = traitlets.Dict().tag(sync=True)
    busy = traitlets.Bool(False).tag(sync=True)
    colours = traitlets.Dict(ROLE_COLOURS).tag(sync=True)

    def __init__(self, recipe: Recipe = RECIPE, *, seed: int = 0, precompute: bool = True) -> None:
        self._recipe, self._seed = recipe, seed
        self._schedule = linear_schedule(recipe.num_train_timesteps)
        self._reference = Ensemble.initial(Architecture(recipe.num_train_timesteps, recipe.width), [seed])
        run(pretrain(self._reference, self._schedule, [seed], recipe, recipe.pretrain_steps))
        self.points: dict[str, Tensor] = {"base": self._sample(self._reference, [0.0])[0]}
        if precompute:
            methods = grid_methods()
            policy = self._reference.copy(len(methods))
            run(tune(policy, self._reference, self._schedule, list(methods.values()), [seed], recipe))
            self.points |= dict(zip(methods, self._sample(policy, [0.0] * len(methods)), strict=True))
        means = {"desirable": list(DESIRABLE.mean), "undesirable": list(UNDESIRABLE.mean)}
        world = {"pretraining": [*PRETRAINING.mean, PRETRAINING.std], "std": DESIRABLE.std, "start": means}
        world |= {"low": list(NEAREST), "high": list(FARTHEST)}
        titles = {name: method_label(name, None) for name in ("sft", "dpo", *PAPER_UTILITIES)}
        choices = {"method": list(titles), "titles": titles}
        choices |= {"beta": list(BETAS), "gamma": list(GAMMAS), "flip": list(FLIPS)}
        clouds = {key: _bytes(points) for key, points in self.points.items()}
        super().__init__(clouds=clouds, means=means, world=world, choices=choices)

    def train(self, method: Method, means: dict[str, Sequence[float]] | None = None) -> Tensor:
        """Tune one model now, and show its cloud on the way; the Gaussians move to `means` if given.

        Returns (N, 2) points in paper units. A place outside of [-0.5, 1.5] x [0, 2] raises a ValueError.
        """
        means = {role: [float(x) for x in (means or self.means)[role]] for role in ("desirable", "undesirable")}
        classes = _placed(means, "desirable"), _placed(means, "undesirable")
        self.means, self.busy = means, True
        try:
            policy = self._reference.copy(1)
            options = {"record_every": max(1, self._recipe.max_train_steps // FRAMES), "classes": classes}
            with one_thread():
                steps = tune(policy, self._reference, self._schedule, [method], [self._seed], self._recipe, **options)
                for record in steps:
                    points = self._sample(policy, [method.label])[0]
                    about = {"key": key_of(method), "step": record.global_step, "means": means}
                    self.trained = about | {"points": _bytes(points)}
        finally:
            self.busy = False
        self.points["trained"] = points
        return points

    def figure(self, keys: Sequence[str]) -> Figure:
        """Clouds side by side, static: "base", "trained" or keys of the grid; another one raises a KeyError."""
        figure, axes = plt.subplots(1, len(keys), figsize=(2.6 * len(keys), 3.0), layout="constrained", squeeze=False)
        for ax, key in zip(axes[0], keys, strict=True):
            if key not in self.points:
                raise KeyError(f"no cloud {key!r} among {len(self.points)}, such as {', '.join([*self.points][:4])}")
            ax.scatter(*self.points[key].T, s=2, color=COLOURS["model"], alpha=0.3, lw=0)
            for role, mean in self.means.items():
                ax.add_patch(Circle(mean, 2 * DESIRABLE.std, fill=False, ec=COLOURS[role], lw=1.6))
            ax.add_patch(Circle(PRETRAINING.mean, 2 * PRETRAINING.std, fill=False, ec=COLOURS["pretraining"], ls=":"))
            ax.set(xlim=(NEAREST[0], FARTHEST[0]), ylim=(NEAREST[1], FARTHEST[1]), aspect="equal")
            ax.set_xlabel("x", fontsize="x-small")
            name, _, settings = key.partition(" ")
            ax.set_title(f"{method_label(name, None)}\n{settings}".strip(), fontsize="x-small", parse_math=False)
            ax.tick_params(labelsize="x-small")
        axes[0, 0].set_ylabel("y", fontsize="x-small")
        plt.close(figure)
        return figure

    def _sample(self, ensemble: Ensemble, labels: list[float]) -> Tensor:
        """(K, N, 2) points in paper units."""
        number = self._recipe.num_samples
        return to_paper_units(sample_ensemble(ensemble, self._schedule, [self._seed], number, labels))[:, 0]

    def _obey(self, message: dict) -> None:
        if message.get("type") == "train":
            self.train(_method_of(message["settings"]), message["means"])


def _method_of(settings: dict) -> Method:
    name, flip = str(settings["method"]), float(settings["flip"])
    if name == "sft":
        return Method("sft", desirable_fraction=1.0, flip_rate=flip)
    if name == "dpo":
        return Method("dpo", beta=float(settings["beta"]), flip_rate=flip)
    beta, gamma, clamp = float(settings["beta"]), float(settings["gamma"]), bool(settings["clamp"])
    return Method("kto", name, clamp=clamp, beta=beta, desirable_fraction=gamma, flip_rate=flip)


def _placed(means: dict[str, Sequence[float]], role: str) -> Gaussian:
    x, y = means[role]
    if not (NEAREST[0] <= x <= FARTHEST[0] and NEAREST[1] <= y <= FARTHEST[1]):
        raise ValueError(f"the {role} Gaussian must lie in [-0.5, 1.5] x [0, 2], got ({x:g}, {y:g})")
    return Gaussian((x, y), DESIRABLE.std)


def _bytes(points: Tensor) -> bytes:
    return points.float().contiguous().numpy().tobytes()
