"""The verdict card: the paper's claims about its toy (section 7) against our runs, generated, never typed by hand.

Each claim is one comparison, tried at every setting that was run. It holds where the 95 % interval over seeds is
on its side, and a claim that two methods are alike where the whole interval of their difference is within a margin
(equivalence, not a difference that was not shown). The settings where it does and does not are listed from the runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from dkto.plotting import display_name
from toy.experiment import BASE, Experiment
from toy.measures import Estimate
from toy.objectives import KTO_FAMILY

ALIKE = 0.05  # largest difference of two undesirable shares that are called alike; SFT's own is 0.14
RIVALS = ("loss_averse", "risk_seeking", "dpo")


@dataclass(frozen=True)
class Setting:
    """One setting at which claims are tried."""

    name: str  # as the card shows it, "gamma 0.8"
    experiment: Experiment  # that holds the runs
    names: Mapping[str, str]  # the experiment's name of each method, by canonical name; one that was not run is missing

    def estimate(self, measure: str, method: str) -> Estimate:
        """A measure over seeds."""
        return self.experiment.estimate(measure, self.names[method])

    def gap(self, measure: str, method: str, other: str) -> Estimate:
        """Difference of two methods, seed by seed (they share data and noise)."""
        return self.experiment.difference(measure, self.names[method], self.names[other])


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper and how it is tried."""

    text: str  # what the paper says
    needs: tuple[str, ...]  # canonical methods
    trial: Callable[[Setting], tuple[str, bool]]  # our measure as text and whether the claim holds, for one setting


def _dpo_leaves(setting: Setting) -> tuple[str, bool]:
    gap = setting.gap("kl", "dpo", BASE)
    return f"KL of DPO minus KL of the base: {_shown(gap)}", gap.low > 0


def _dpo_undesirable(setting: Setting) -> tuple[str, bool]:
    share, gap = setting.estimate("undesirable_share", "dpo"), setting.gap("undesirable_share", "dpo", BASE)
    return f"DPO's undesirable share {_shown(share, 100)} %, minus the base's {_shown(gap, 100)}", gap.low > 0


def _seeker_is_sft(setting: Setting) -> tuple[str, bool]:
    gap = setting.gap("undesirable_share", "risk_seeking", "sft")
    share = setting.estimate("undesirable_share", "risk_seeking")
    text = f"risk-seeking's undesirable share {_shown(share, 100)} %, minus SFT's {_shown(gap, 100)}"
    return text, gap.low > -ALIKE and gap.high < ALIKE


def _kt_balances(setting: Setting) -> tuple[str, bool]:
    gaps = {rival: setting.gap("kl", "kahneman_tversky", rival) for rival in RIVALS}
    worst = max(gaps, key=lambda rival: gaps[rival].high)
    kl, rest = _shown(setting.estimate("kl", "kahneman_tversky")), _shown(gaps[worst])
    return f"KL of KT {kl}, minus {display_name(worst)}'s {rest}", all(gap.high < 0 for gap in gaps.values())


def _accurate(setting: Setting) -> tuple[str, bool]:
    both = [setting.estimate("pair_accuracy", name) for name in ("kahneman_tversky", "dpo")]
    text = f"pair accuracy of KT {_shown(both[0], 100)} %, of DPO {_shown(both[1], 100)} %"
    return text, all(estimate.low >= 0.9 for estimate in both)


CLAIMS = (
    Claim("DPO avoids losses so strongly that it leaves the desirable distribution", ("dpo",), _dpo_leaves),
    Claim("DPO clearly samples from the undesirable distribution", ("dpo",), _dpo_undesirable),
    Claim("Risk-seeking behaves like SFT and tolerates undesirable samples", ("sft", "risk_seeking"), _seeker_is_sft),
    Claim(
        "Kahneman-Tversky balances best: nearest to desirable of the preference objectives",
        ("kahneman_tversky", *RIVALS),
        _kt_balances,
    ),
    Claim("KTO and DPO reach more than 90 % implicit accuracy", ("kahneman_tversky", "dpo"), _accurate),
)


def verdict_card(settings: Sequence[Setting]) -> pd.DataFrame:
    """One row a claim: verdict, our measure at every setting, and where it changes.

    A claim skips settings that lack a method it needs. The columns are claim, verdict ("holds", "holds when ...",
    "does not hold", "not tried"), measure and changes. No setting raises a ValueError.
    """
    if not settings:
        raise ValueError("settings must hold at least one setting, got none")
    rows = []
    for claim in CLAIMS:
        trials = {s.name: claim.trial(s) for s in settings if set(claim.needs) <= set(s.names)}
        held = [name for name, (_, holds) in trials.items() if holds]
        failed = [name for name in trials if name not in held]
        if held and failed:
            verdict, changes = f"holds when {', '.join(held)}", f"fails at {', '.join(failed)}"
        else:
            verdict = "holds" if held else "does not hold" if failed else "not tried"
            changes = "at none of the settings tried" if trials else ""
        measure = "; ".join(f"{name}: {text}" for name, (text, _) in trials.items())
        rows.append({"claim": claim.text, "verdict": verdict, "measure": measure, "changes": changes})
    return pd.DataFrame(rows)


def headline_settings(experiment: Experiment) -> list[Setting]:
    """The two settings of the headline: gamma 0.8, the paper's choice, and 0.5, at which DPO's pairs are drawn."""
    shared = {name: name for name in (BASE, "sft", "csft", "dpo")}
    return [
        Setting(f"γ = {label}", experiment, shared | {name: name + suffix for name in KTO_FAMILY})
        for label, suffix in (("0.8", ""), ("0.5", "@0.5"))
    ]


def _shown(estimate: Estimate, scale: float = 1.0) -> str:
    if not estimate.n:
        return str(estimate)
    ends = f"{scale * estimate.mean:.3g} [{scale * estimate.low:.3g}, {scale * estimate.high:.3g}]"
    return ends + (f" ({estimate.diverged} diverged)" if estimate.diverged else "")
