"""The paper's published win-rates of Diffusion-KTO, in both of its versions; nothing here is measured by us.

Tables 1-3 of the first version (arXiv) and of the second (NeurIPS 2024). That prints other numbers, has a row for D3PO,
and trains on 4 GPUs with 2 images each instead of 16 with 2.

The first version heads its third column HPS and its fifth ImageReward; the second heads them the other way round, over
numbers that continue the same columns. The means and intervals of the second give, as medians of five, the third column
under ImageReward and not under HPS (see the solution of the notebook "published checkpoints"). So the headings of the
first are almost certainly exchanged: an inference from numbers, which nobody has confirmed. The names here are those of
the second.
"""

import pandas as pd

from dkto.common.names import check_choice

SCORER_ORDER = ("aesthetic", "pickscore", "imagereward", "clip", "hps")
HEADED_FIRST = {"imagereward": "HPS", "hps": "ImageReward"}
"""What the first version prints over these columns."""
PUBLISHED_WIN_RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "Pick-a-Pic test (Table 1)": {
        "base": (82.8, 84.0, 86.4, 56.4, 60.6),
        "sft": (56.0, 73.0, 60.6, 57.6, 57.2),
        "csft": (45.8, 68.6, 57.4, 56.8, 58.2),
        "alignprop": (86.2, 96.8, 82.2, 96.0, 90.6),
        "dpo": (70.4, 59.6, 74.2, 48.4, 49.2),
    },
    "HPS v2 (Table 2)": {
        "base": (70.0, 74.5, 72.0, 53.7, 54.2),
        "sft": (54.1, 62.0, 54.0, 54.6, 52.3),
        "csft": (49.5, 60.5, 52.7, 53.0, 53.4),
        "alignprop": (83.3, 96.7, 78.4, 91.1, 86.4),
        "dpo": (58.8, 58.6, 63.9, 48.7, 48.8),
    },
    "PartiPrompts (Table 3)": {
        "base": (68.3, 60.2, 66.9, 52.3, 52.8),
        "sft": (50.3, 58.6, 54.7, 54.2, 51.4),
        "csft": (47.3, 57.0, 54.2, 51.6, 53.1),
        "alignprop": (74.3, 93.1, 76.7, 88.0, 82.8),
        "dpo": (59.5, 48.3, 59.3, 48.6, 48.2),
    },
}
PUBLISHED_AGAIN: dict[str, dict[str, tuple[float, ...]]] = {
    "Pick-a-Pic test (Table 1)": {
        "base": (86.0, 85.2, 87.2, 62.0, 62.0),
        "sft": (56.4, 72.8, 64.8, 64.8, 54.6),
        "csft": (50.6, 73.6, 65.2, 62.8, 60.4),
        "alignprop": (86.8, 96.6, 84.4, 96.2, 90.2),
        "d3po": (68.0, 73.6, 71.6, 56.8, 55.6),
        "dpo": (74.2, 61.8, 78.4, 53.2, 51.6),
    },
    "HPS v2 (Table 2)": {
        "base": (76.2, 77.7, 74.3, 53.5, 53.6),
        "sft": (60.1, 66.6, 54.5, 54.9, 51.9),
        "csft": (51.5, 64.7, 52.2, 54.5, 55.3),
        "alignprop": (86.2, 98.0, 81.0, 93.2, 89.7),
        "d3po": (76.0, 76.9, 75.6, 54.4, 53.9),
        "dpo": (63.9, 60.3, 66.3, 47.3, 48.9),
    },
    "PartiPrompts (Table 3)": {
        "base": (74.2, 67.1, 66.9, 53.8, 52.5),
        "sft": (55.0, 65.0, 53.6, 54.4, 53.2),
        "csft": (50.9, 62.3, 53.9, 51.8, 53.0),
        "alignprop": (76.6, 95.5, 79.0, 91.2, 86.8),
        "d3po": (75.1, 67.0, 68.9, 51.5, 53.0),
        "dpo": (66.2, 52.7, 56.4, 49.6, 46.1),
    },
}
VERSIONS = {"first version": PUBLISHED_WIN_RATES, "NeurIPS": PUBLISHED_AGAIN}
TABLES = tuple(PUBLISHED_WIN_RATES)
SD_2_1 = {"base": (71.4, 70.0, 69.2, 53.4, 49.6), "dpo": (63.8, 67.4, 66.2, 50.0, 44.8)}
"""KTO on Stable Diffusion 2.1 over its base and DPO, Pick-a-Pic test prompts; in the second version alone."""
USER_STUDY = {"base": 75.0, "dpo": 69.0}
"""Share of judges who preferred Diffusion-KTO on 100 HPS v2 prompts, in per cent (paper 5.2)."""
USER_STUDY_AGAIN = {"base": 75.0, "sft": 72.0, "dpo": 69.0}
"""The same in the second version."""


def published_table(scorer: str = "pickscore") -> pd.DataFrame:
    """The published win-rates of KTO under one scorer: opponents as rows, prompt sets by version as columns, per cent.

    Raises:
        ValueError: if the paper has no such scorer.

    >>> published_table("imagereward").loc["dpo"].head(2).to_dict()
    {'Pick-a-Pic test (Table 1), first version': 74.2, 'Pick-a-Pic test (Table 1), NeurIPS': 78.4}
    """
    check_choice("scorer", scorer, SCORER_ORDER)
    place = SCORER_ORDER.index(scorer)
    columns = {
        f"{table}, {version}": {opponent: values[place] for opponent, values in rates[table].items()}
        for table in TABLES
        for version, rates in VERSIONS.items()
    }
    return pd.DataFrame(columns, index=list(PUBLISHED_AGAIN[TABLES[0]]))


def both_versions(table: str = TABLES[0]) -> pd.DataFrame:
    """One prompt set whole: opponents as rows, scorers as columns, first version / second, as text.

    >>> both_versions().loc["d3po", "pickscore"], both_versions().loc["base", "pickscore"]
    ('- / 73.6', '84.0 / 85.2')
    """
    first, second = (pd.DataFrame(rates[table], index=SCORER_ORDER).T for rates in VERSIONS.values())
    return first.reindex(second.index).map("{:.1f} / ".format).replace("nan / ", "- / ") + second.map("{:.1f}".format)
