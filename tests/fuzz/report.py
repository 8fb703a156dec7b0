"""The table of `make fuzz`, and what is promised of it."""

from collections import Counter

from fuzz.outcome import FATAL, KINDS, REFUSED

CLEAR_SHARE = 0.99  # of the refusals
_OFTEN = "feedback.csv feedback.scores feedback.sqlite feedback.jsonl feedback.parquet pairs.parquet rankings.json"
_OFTEN += " rankings.csv folder.txt folder.metadata"
_OFTEN += " prompts image likelog expression config settings yaml notebook sweep run.json metrics.json metrics.jsonl"
_OFTEN += " prepared.json prepared.shard"
_LESS = "unpack unpack.scores unpack.tar preferences.parquet"
_LESS += " study.questions study.answers manifest training.json explorer weights adapter"
_SELDOM = "messages scores prepare.again resume checkpoint.weights fingerprint"
SHARES = {name: share for share, names in ((3, _OFTEN), (2, _LESS), (1, _SELDOM)) for name in names.split()}


def table(found: dict[str, tuple[str, str]]) -> str:
    """Cases by reader and outcome, and their sums."""
    rows: dict[str, Counter] = {}
    for case, (kind, _) in found.items():
        rows.setdefault(case.split(":")[0], Counter())[kind] += 1
    lines = [f"| reader | cases | {' | '.join(KINDS)} |", f"|{'---|' * (len(KINDS) + 2)}"]
    by_trouble = sorted(rows, key=lambda name: (-sum(rows[name][kind] for kind in KINDS[1:7]), name))
    for name, row in [*((name, rows[name]) for name in by_trouble), ("**all**", sum(rows.values(), Counter()))]:
        lines.append(f"| {name} | {row.total()} | {' | '.join(str(row[kind]) for kind in KINDS)} |")
    return "\n".join(lines)


def broken(found: dict[str, tuple[str, str]]) -> list[str]:
    """The promises that do not hold."""
    count = Counter(kind for kind, _ in found.values())
    refused = sum(count[kind] for kind in REFUSED)
    wrong = [f"{count[kind]} x {kind}, where there may be none" for kind in FATAL if count[kind]]
    if refused and count["clear"] < CLEAR_SHARE * refused:
        wrong.append(
            f"{count['clear']} of {refused} refusals are one sentence with its place, fewer than {CLEAR_SHARE:.0%}"
        )
    return wrong
