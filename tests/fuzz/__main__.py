"""`python -m fuzz [N]` in `tests/`: N damaged inputs, a table by reader, exit code 1 where a promise is broken."""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

STUCK = 30.0, 600.0  # seconds of computing, or of waiting, in one case: it hangs where no alarm reaches it
STARTING = 10  # times as long for the imports before the first case
MOST_ADDRESS_SPACE = 4 << 30  # bytes above what the libraries take
ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of all cases; each one makes others")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="readers, comma-separated")
    parser.add_argument("--case", default="", help="the id of one case, to run it again")
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "papermill_runs" / "outputs" / "fuzz", help="failing inputs"
    )
    parser.add_argument("--show", type=int, default=20, help="failing cases to print")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.keep)
        return 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        return run(given, Path(folder))


def run(given: argparse.Namespace, folder: Path) -> int:
    from fuzz.report import FATAL, broken, table

    share = -(-given.count // len(given.seed))
    ids = [given.case] if given.case else [each for seed in given.seed for each in cases(share, seed, given.only)]
    began, found = time.monotonic(), {}
    parts = [ids[number :: given.processes] for number in range(given.processes)]
    threads = [
        threading.Thread(target=supervise, args=(part, folder / str(number), given.keep, found))
        for number, part in enumerate(parts)
        if part
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bad = {
        case: (kind, said) for case, (kind, said) in sorted(found.items()) if kind in FATAL or kind == "internal error"
    }
    bad |= {case: each for case, each in sorted(found.items()) if each[0] == "unclear sentence"}
    shown = bad or (found if given.case else {})
    for case, (kind, said) in list(shown.items())[: given.show]:
        print(f"{case}: {kind}: {ascii(said)[1:-1]:.300}")
    if len(shown) > given.show:
        print(f"and {len(shown) - given.show} more; all of them, with their inputs, are in {given.keep}")
    seeds, seconds = " and ".join(map(str, given.seed)), time.monotonic() - began
    print(f"<!-- figures -->\n{len(found)} cases of seed {seeds} in {seconds:.0f} seconds.\n")
    print(f"{table(found)}\n<!-- end of figures -->")
    wrong = broken(found) + [f"{len(ids) - len(found)} cases did not run"] * (len(found) < len(ids))
    print("\n".join(wrong) or "every promise is kept")
    return bool(wrong)


def cases(count: int, seed: int, only: str) -> list[str]:
    """Ids "reader:seed:number", shared out by each reader's share, in an order that mixes them."""
    from fuzz.report import SHARES

    names = only.split(",") if only else list(SHARES)
    deck = [name for name in names for _ in range(SHARES[name])]
    random.Random(seed).shuffle(deck)
    deck = [*names, *deck]  # each reader at least once
    numbers: Counter = Counter()
    ids = []
    for name in itertools.islice(itertools.cycle(deck), count):
        numbers[name] += 1
        ids.append(f"{name}:{seed}:{numbers[name]}")
    return ids


def supervise(ids: list[str], folder: Path, keep: Path, found: dict) -> None:
    """Run cases in a process of its own, and in another one after the case that ended it.

    A case that hangs is run once more by that other process: a machine with other work may have been slow.
    """
    todo, attempt, slow = list(ids), 0, set()
    while todo:
        attempt += 1
        place = folder / str(attempt)
        place.mkdir(parents=True)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "Agg",
            "HOME": str(place),
            "MPLCONFIGDIR": str(folder),  # fonts are looked up once, not by every process
        }
        command = [sys.executable, "-m", "fuzz", "--work", str(place), "--keep", str(keep)]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT / "tests"
        )
        last = [time.monotonic()]  # of its lines
        watch = threading.Thread(target=_end_when_stuck, args=(child, last), daemon=True)
        watch.start()
        threading.Thread(target=_feed, args=(child, list(todo)), daemon=True).start()
        current, stopped = None, False
        for line in child.stdout:
            last[0] = time.monotonic()
            message = json.loads(line)
            current = message["case"]
            if "kind" in message:
                stopped = message["kind"] == "hang"
                if not stopped or current in slow:
                    found[current] = message["kind"], message["said"]
                    todo.remove(current)
                slow |= {current} if stopped else set()
                current = None
        code = child.wait()
        if todo and current is None and not stopped:
            raise RuntimeError(
                f"the process ended with {code} outside of a case: {(place / 'log').read_text()[-2000:]}"
            )
        if current is not None:
            kind = "hang" if code == -9 else "uncaught"
            found[current] = kind, f"ended the process with {code}"
            todo.remove(current)
        shutil.rmtree(place, ignore_errors=True)


def _feed(child: subprocess.Popen, ids: list[str]) -> None:
    try:
        child.stdin.write("\n".join(ids))
        child.stdin.close()
    except BrokenPipeError:  # it ended; another one gets the rest
        pass


def _end_when_stuck(child: subprocess.Popen, last: list[float]) -> None:
    process, since, busy, began = psutil.Process(child.pid), None, 0.0, last[0]
    while child.poll() is None:
        time.sleep(1)
        with contextlib.suppress(psutil.Error):
            if since != last[0]:
                since, busy = last[0], sum(process.cpu_times()[:2])
            computing, waiting = (limit * (STARTING if since == began else 1) for limit in STUCK)
            if sum(process.cpu_times()[:2]) - busy > computing or time.monotonic() - since > waiting:
                child.kill()


def work(place: Path, keep: Path) -> None:
    """Run the cases named on standard input; one line of JSON as each begins and ends."""
    out = os.fdopen(os.dup(1), "w")
    with (place / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import resource

    import torch

    from fuzz import readers
    from fuzz.outcome import observe

    torch.set_num_threads(1)
    readers.use(place)
    limited = False
    for case in sys.stdin.read().split():
        name = case.split(":")[0]
        reader = readers.READERS[name]
        pristine = readers.valid(name)
        if not limited:  # what is made once is made before
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MOST_ADDRESS_SPACE, resource.RLIM_INFINITY))
            limited = True
        print(json.dumps({"case": case}), file=out, flush=True)
        folder = place / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder, symlinks=True)
        value = reader.spoil(random.Random(case), folder)
        kept = place / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept, symlinks=True, ignore=_no_pipes)
        places = [
            *reader.places,
            str(folder),
            *{path.name for path in folder.rglob("*")},
            *{p.name for p in pristine.rglob("*")},
        ]
        outcome = observe(
            lambda reader=reader, folder=folder, value=value: reader.read(folder, value),
            lambda found, warned, reader=reader, folder=folder, value=value: reader.check(folder, value, found, warned),
            places,
        )
        if outcome.kind not in ("clear", "warned", "accepted"):
            target = keep / case.replace(":", "-")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(kept, target, symlinks=True)
            (target / "outcome.txt").write_text(f"{outcome.kind}\n{outcome.said!a}\n{value!a:.3000}\n")
        print(json.dumps({"case": case, "kind": outcome.kind, "said": outcome.said[:2000]}), file=out, flush=True)
        if outcome.kind == "hang":  # the alarm left libraries in the middle of something
            return


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_fifo()]


if __name__ == "__main__":
    sys.exit(main())
