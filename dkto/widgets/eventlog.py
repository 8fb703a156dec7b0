"""An append-only log of what people did, one JSON object a line, that a crash cannot corrupt.

A line is written in one piece and forced to the disk before the next event is taken. A crash can cut the
line that was being written: it is skipped on reading, and the next event starts on a line of its own.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class EventLog:
    """Events of one file; several sessions, and several processes, may append to it.

    Attributes:
        path: the .jsonl file; made with its folder on the first event.
        session: who or which sitting; stands in every event.
        cut_lines: how many lines the last reading skipped, since a crash had cut them.
    """

    path: Path
    session: str
    cut_lines: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        if not isinstance(self.session, str) or not self.session.strip():
            raise ValueError(f"session must be a name, got {self.session!r}")

    def append(self, **event) -> dict:
        """Write one event with its session and UTC time; it is on disk when this returns."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        event = {"session": self.session, "time": now, **event}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash cut the last line
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return event

    def read(self, *, every_session: bool = False) -> list[dict]:
        """This session's events, oldest first; those of all sessions on request.

        Raises:
            ValueError: if a line is JSON but no event; the sentence names the line.
        """
        self.cut_lines, events = 0, []
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                event = json.loads(line)
            except ValueError:  # cut, also in the middle of a letter
                self.cut_lines += bool(line.strip())
                continue
            if not isinstance(event, dict) or not isinstance(event.get("session"), str):
                raise ValueError(f"{self.path}, line {number}: expected an object with a session, got {event!r}")
            if every_session or event["session"] == self.session:
                events.append(event)
        return events
