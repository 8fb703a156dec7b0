"""`make gpu`: everything that only a graphics card can show, in at most eight minutes, without the network.

Each stage of `stages.py` is a process of its own with a limit of time: one that fails, or runs out of memory, leaves
what the others measured. The figures go to `results.json` beside what was expected of them, and to one table.
`DRY=1 make gpu` tries the script on any machine with tiny networks; its figures mean nothing and are kept nowhere.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dkto.common.files import write_json
from dkto.common.machine import git_commit, hardware, versions
from gpu.expected import EXPECTED

RESULTS = Path(__file__).parent / "results.json"
MOST_SECONDS = 480.0
DRY_SECONDS = 600.0  # of each stage: the machine may be a slow one


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny networks, on any machine; nothing is kept")
    parser.add_argument("--only", nargs="+", default=[], help="these stages alone")
    parser.add_argument("--results", type=Path, help="where the figures go instead")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    from gpu import stages

    if given.stage:
        stages.main(given.stage, given.folder, given.dry)
        return 0
    if not (stages.ON_GPU or given.dry):
        print("make gpu needs a CUDA device and torch sees none here; DRY=1 make gpu tries the script without one")
        return 1
    results = given.results or (None if given.dry else RESULTS)
    began, ends = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="dkto-gpu-") as folder:
        for name, (_, limit) in stages.STAGES.items():
            if given.only and name not in given.only:
                continue
            left = DRY_SECONDS if given.dry else MOST_SECONDS - (time.monotonic() - began)
            start, limit = time.monotonic(), DRY_SECONDS if given.dry else limit
            end = perform(name, Path(folder), given.dry, min(limit, left)) if left > 15 else "no time was left"
            ends[name] = {"seconds": round(time.monotonic() - start, 1), "end": end}
            print(f"{name}: {end}, {ends[name]['seconds']} s", flush=True)
        path = Path(folder) / "rows.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    about = {"dry": given.dry, "seconds": round(time.monotonic() - began, 1), "commit": git_commit()}
    found = {**about, "hardware": hardware(), "versions": versions(), "stages": ends, "rows": rows_of(lines)}
    if results:
        write_json(results, found)
    print(table(found))
    return int(any(row["verdict"] == "missed" for row in found["rows"].values()) and not given.dry)


def perform(name: str, folder: Path, dry: bool, limit: float) -> str:
    """Run a stage; says how it ended. Whatever it started ends with it."""
    command = [sys.executable, "-m", "gpu", "--stage", name, "--folder", str(folder), *["--dry"] * dry]
    log = folder / f"{name}.log"
    with log.open("w") as output:
        options = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], **options)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1][:300]
    if code is None:
        return f"ended after its {limit:.0f} s"
    return "done" if code == 0 else f"failed with code {code}: {last}"


def rows_of(lines: list[dict]) -> dict[str, dict]:
    """Every expected row with what was measured of it."""
    rows = {}
    for key, expected in EXPECTED.items():
        none = {"value": None, "why": "its stage did not come to it"}
        line = next((line for line in lines if line["key"] == key), none)
        verdict = expected.verdict(line["value"]) if line["value"] is not None else f"not measured: {line['why']}"
        rows[key] = {"what": expected.what, "wanted": expected.wanted, "measured": line["value"], "verdict": verdict}
    return rows


def table(found: dict) -> str:
    """The rows as a table in Markdown."""
    card = f"{found['hardware']['accelerators']}, {found['seconds']:.0f} s"
    head = "a dry run at tiny sizes: no figure means anything" if found["dry"] else f"measured on {card}"
    lines = [head, "", "| what | measured | wanted | verdict |", "|---|---|---|---|"]
    for row in found["rows"].values():
        value = "" if row["measured"] is None else f"{row['measured']:.4g}"
        lines.append(f"| {row['what']} | {value} | {row['wanted']} | {row['verdict']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
