"""Experiments: processes, diverged seeds, tables, the verdict card and the figures, on small runs."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from toy.experiment import run_experiment, seconds_one_by_one
from toy.measures import over_seeds
from toy.objectives import METHODS, Method
from toy.plotting import (
    LIMITS,
    animation,
    method_label,
    plot_cloud,
    plot_clouds,
    plot_estimates,
    plot_field,
    plot_reward_map,
    plot_sweep,
    plot_tradeoff,
)
from toy.training import Recipe
from toy.verdicts import CLAIMS, Setting, headline_settings, verdict_card

TINY = Recipe(
    num_train_timesteps=20,
    width=8,
    batch_size=32,
    pretrain_steps=300,
    pretrain_learning_rate=1e-2,
    max_train_steps=40,
    num_samples=300,
)


@pytest.fixture(scope="module")
def experiment():
    return run_experiment(METHODS, [0, 1, 2], TINY, processes=1, record_every=20)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_shapes_and_names(experiment):
    assert experiment.names == ["base", *METHODS]
    assert experiment.points.shape == (10, 3, 300, 2)
    assert experiment.policy.members == 27 and experiment.reference.members == 3
    assert all(values.shape == (10, 3) for values in experiment.measures.values())
    assert [record.global_step for record in experiment.records] == [20, 40]
    assert set(experiment.seconds) == {"ensemble", "measures"} and experiment.seconds["ensemble"] > 0


@pytest.mark.process
def test_two_processes_give_what_one_gives(experiment):
    """Batched products round differently in ensembles of other sizes; float32 over 100 steps keeps 3 digits."""
    two = run_experiment(METHODS, [0, 1, 2], TINY, processes=2, record_every=20)
    assert torch.allclose(two.points, experiment.points, atol=2e-3)
    assert torch.allclose(two.policy.parameters, experiment.policy.parameters, atol=2e-3)
    assert torch.allclose(two.records[-1].loss, experiment.records[-1].loss, atol=2e-3, equal_nan=True)


def test_model_gives_the_members_of_a_method(experiment):
    row = list(METHODS).index("kahneman_tversky")
    assert torch.equal(experiment.model("kahneman_tversky", 1).parameters[0], experiment.policy.parameters[3 * row + 1])
    assert experiment.model("base").members == 3


def test_metrics_have_the_flat_keys(experiment):
    metrics = experiment.metrics(("kl", "undesirable_share", "pair_accuracy"))
    for name in experiment.names:
        for measure in ("kl", "undesirable_share"):
            low, mean, high = (metrics[f"{measure}/{name}{end}"] for end in ("/low", "", "/high"))
            assert 0 <= low <= mean <= high
    assert "pair_accuracy/base" not in metrics and 0 < metrics["pair_accuracy/dpo"] <= 1
    assert all(math.isfinite(value) for value in metrics.values())


def broken(experiment, name, seeds):
    """The experiment with some seeds of a method diverged."""
    measures = {key: values.clone() for key, values in experiment.measures.items()}
    points = experiment.points.clone()
    points[experiment.names.index(name), :seeds] = torch.nan
    for values in measures.values():
        values[experiment.names.index(name), :seeds] = torch.nan
    return replace(experiment, measures=measures, points=points)


def test_diverged_seeds_are_counted_and_shown(experiment):
    one, every = broken(experiment, "dpo", 1), broken(experiment, "dpo", 3)
    assert "1 of 3 seeds diverged" in one.table(("kl",)).loc["dpo", "kl"]
    assert one.table(("kl",)).loc["dpo", "diverged"] == "1 of 3"
    assert every.estimate("kl", "dpo").n == 0 and "kl/dpo" not in every.metrics(("kl",))
    assert every.metrics(("kl",))["diverged/dpo"] == 3
    assert experiment.table(("pair_accuracy",)).loc["base", "pair_accuracy"] == "-"
    figure = plot_clouds(one, ["base", "dpo"], 1, columns=2)
    assert "1 of 3 seeds diverged" in " ".join(text.get_text() for ax in figure.axes for text in ax.texts)


def test_a_literal_risk_seeker_diverges_and_is_said_to():
    recipe = replace(TINY, learning_rate=0.05, max_train_steps=150)
    experiment = run_experiment(
        {"risk_seeking_literal": Method(utility="risk_seeking_literal", desirable_fraction=0.5)}, [0], recipe, 1
    )
    assert experiment.diverged.tolist() == [[False], [True]]
    assert experiment.table(("kl",)).loc["risk_seeking_literal", "kl"] == "all 1 seeds diverged"


def test_one_by_one_is_extrapolated_from_a_seed():
    methods = {"sft": METHODS["sft"]}
    assert seconds_one_by_one(methods, 10, TINY) > seconds_one_by_one(methods, 1, replace(TINY, max_train_steps=2)) > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (({}, [0]), "methods must be named, and none 'base', got: none"),
        (({"base": Method()}, [0]), "methods must be named, and none 'base', got: base"),
        ((METHODS, [1, 1]), r"seeds must be distinct and not empty, got \[1, 1\]"),
        ((METHODS, [0], TINY, 0), "processes must be 1 or above, got 0"),
    ],
)
def test_wrong_arguments_raise_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_experiment(*arguments)


def test_unknown_recipe_settings_are_refused():
    with pytest.raises(ValueError, match=r"unknown recipe setting 'steps'.*known: num_train_timesteps, width"):
        TINY.replace(steps=3)


def with_values(experiment, **measures):
    """The experiment with given values of measures by method, the same for all seeds but for a small spread."""
    changed = {key: values.clone() for key, values in experiment.measures.items()}
    spread = torch.tensor([-0.001, 0.0, 0.001], dtype=torch.float64)
    for measure, by_method in measures.items():
        for name, value in by_method.items():
            changed[measure][experiment.names.index(name)] = value + spread
    return replace(experiment, measures=changed)


KL = {"base": 3.6, "dpo": 15, "kahneman_tversky": 0.2, "risk_seeking": 0.9, "loss_averse": 1.3}
KL |= {"kahneman_tversky@0.5": 0.9, "risk_seeking@0.5": 0.8, "loss_averse@0.5": 1.9}
SHARE = {"base": 0.3, "dpo": 0.002, "sft": 0.15, "risk_seeking": 0.01, "risk_seeking@0.5": 0.01}
ACCURACY = {"dpo": 0.917, "kahneman_tversky": 0.87, "kahneman_tversky@0.5": 0.914}


def test_the_card_follows_the_runs(experiment):
    """The experiment's own measures say what the card says; other measures turn every verdict round."""
    paper = with_values(experiment, kl=KL, undesirable_share=SHARE, pair_accuracy=ACCURACY)
    card = verdict_card(headline_settings(paper))
    verdicts = ["holds", "does not hold", "does not hold", "holds when γ = 0.8", "holds when γ = 0.5"]
    assert card.verdict.tolist() == verdicts and len(CLAIMS) == 5
    assert card.changes.tolist()[3:] == ["fails at γ = 0.5", "fails at γ = 0.8"]
    turned = with_values(
        paper,
        kl={"dpo": 1.0, "kahneman_tversky": 2.0, "kahneman_tversky@0.5": 2.5},
        undesirable_share={"dpo": 0.5, "risk_seeking": 0.17, "risk_seeking@0.5": 0.13},
        pair_accuracy={"dpo": 0.6},
    )
    expected = ["does not hold", "holds", "holds", "does not hold", "does not hold"]
    assert verdict_card(headline_settings(turned)).verdict.tolist() == expected


def test_the_card_shows_measures_with_intervals_and_what_was_not_tried(experiment):
    paper = with_values(experiment, kl=KL, undesirable_share=SHARE, pair_accuracy=ACCURACY)
    card = verdict_card([Setting("early", paper, {"base": "base", "dpo": "dpo"})])
    assert card.verdict.tolist() == ["holds", "does not hold", "not tried", "not tried", "not tried"]
    assert card.measure[0].startswith("early: KL of DPO minus KL of the base: 11.4 [")
    with pytest.raises(ValueError, match="settings must hold at least one setting"):
        verdict_card([])


def test_an_interval_across_zero_does_not_hold(experiment):
    """Kahneman-Tversky and risk-seeking tie: a claim needs its whole interval on its side."""
    tie = with_values(experiment, kl=KL | {"risk_seeking": 0.2})
    assert not verdict_card([headline_settings(tie)[0]]).verdict[3].startswith("holds")


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_methods_are_alike_by_evidence_and_not_by_lack_of_it(experiment, spread):
    """Equal means: with seeds that agree the claim holds, with a wide interval around zero it does not."""
    equal = with_values(experiment, kl=KL, undesirable_share=SHARE | {"risk_seeking": 0.15}, pair_accuracy=ACCURACY)
    equal.measures["undesirable_share"][experiment.names.index("risk_seeking")] += spread * torch.tensor([-1, 0, 1])
    gap = headline_settings(equal)[0].gap("undesirable_share", "risk_seeking", "sft")
    assert gap.low <= 0 <= gap.high
    assert verdict_card(headline_settings(equal)[:1]).verdict[2] == ("does not hold" if spread else "holds")
    more = with_values(equal, undesirable_share={"risk_seeking": 0.25})
    assert verdict_card(headline_settings(more)[:1]).verdict[2] == "does not hold", "neither is more of it likeness"


def test_clouds_share_limits_and_name_what_they_show(experiment):
    figure = plot_clouds(experiment, experiment.names, 1)
    axes = figure.axes
    assert len(axes) == 10
    assert {ax.get_xlim() for ax in axes} == {LIMITS["x"]} and {ax.get_ylim() for ax in axes} == {LIMITS["y"]}
    assert [ax.get_title() for ax in axes][:4] == ["base", "SFT", "CSFT", "Diffusion-DPO"]
    assert axes[9].get_title() == method_label("kahneman_tversky@0.5") == "Kahneman-Tversky, γ = 0.5"


def test_points_outside_the_frame_are_counted():
    points = torch.tensor([[0.3, 0.8], [9.0, 9.0], [torch.nan, 0.0], [0.3, 0.6]])
    texts = [text.get_text() for text in plot_cloud(points).texts]
    assert "50 % outside" in texts


def test_figures_take_and_return_axes(experiment):
    axes = plt.subplots(1, 4)[1]
    estimates = {name: experiment.estimate("kl", name) for name in experiment.names}
    assert plot_estimates(estimates, axes[0], label="KL (nats)", log=True, limits={"limit": 1.0}) is axes[0]
    assert plot_tradeoff(experiment, experiment.names, axes[1]) is axes[1]
    curves = {"dpo": {1.0: over_seeds([1.0, 2.0]), 10.0: over_seeds([3.0, 4.0, math.nan])}}
    assert plot_sweep(curves, axes[2], label="KL (nats)", setting="beta") is axes[2]
    assert plot_field(torch.rand(5, 2), torch.rand(5, 2), axes[3], longest=1.0) is axes[3]
    grid = torch.linspace(0, 1, 5)
    assert plot_reward_map(torch.randn(5, 5), grid, grid, label="reward") is not None


def test_rows_name_the_seeds_that_diverged(experiment):
    ax = plot_estimates({"dpo": over_seeds([math.nan, 1.0, 2.0])}, label="KL (nats)")
    assert "1 of 3 seeds diverged" in [text.get_text() for text in ax.texts]


def test_an_animation_has_buttons_and_each_frame_once():
    figure, drawn = plt.figure(figsize=(1, 1)), []
    html = animation(drawn.append, range(3), figure).data
    assert html.count("data:image/png;base64") == 3 and "<button" in html and drawn == [0, 1, 2]
    assert not plt.fignum_exists(figure.number)
