"""The service against LitServe and BentoML: the same model, that takes no time, and the same load.

All answer the same small picture inline. Ours has also accepted, recorded and finished a durable job
by then: that is checked in its database. "Ours, file" stores the picture and answers its URL.
The servers take turns, round by round; every figure is the median of the rounds, ratios too. CPU is
that of all the server's processes, per request: it says less of what else the machine was doing.
"""

from __future__ import annotations

import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from serving import NO_OP_SERVER, Row, Serving

SCRIPTS = Path(__file__).parent
CLIENTS = (1, 8, 64)
ROUNDS, SECONDS, WARM_UP = 5, 2.5, 1.0

BODY = {"prompt": "x", "image_size": {"width": 64, "height": 64}}
INLINE = json.dumps({**BODY, "sync_mode": True}).encode()
FILE = json.dumps({**BODY, "sync_mode": False}).encode()
PATH = "/fal-ai/z-image/turbo"
PEERS = {"LitServe": "litserve_no_op.py", "BentoML": "bentoml_no_op.py"}


class Target(NamedTuple):
    server: Serving
    path: str
    body: bytes

    def load(self, clients: int, seconds: float) -> Row:
        url = f"http://127.0.0.1:{self.server.port}{self.path}"
        command = [sys.executable, str(SCRIPTS / "load.py"), url, str(clients), str(seconds)]
        before = self.server.cpu_seconds
        done = subprocess.run(command, input=self.body, capture_output=True, check=True)
        result: Row = json.loads(done.stdout)
        result["CPU ms"] = (self.server.cpu_seconds - before) / result["requests"] * 1e3
        return result

    def warm_up(self) -> Row:
        """Waits for workers that start after their server."""
        while True:
            try:
                return self.load(8, WARM_UP)
            except subprocess.CalledProcessError:
                time.sleep(0.5)


def against_peers(python: Path, say: Callable[[str], None]) -> list[Row]:
    with ExitStack() as running:
        home = running.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))

        def serve(program: Path, interpreter: str | Path) -> Serving:
            server = Serving([str(interpreter), str(program)], f"{home}/{program.stem}")
            running.enter_context(server)
            return server

        ours = serve(NO_OP_SERVER, sys.executable)
        targets = {"ours": Target(ours, PATH, INLINE), "ours, file": Target(ours, PATH, FILE)}
        for peer, program in PEERS.items():
            if version := _version(python, peer):
                server = serve(SCRIPTS / "peers" / program, python)
                targets[f"{peer} {version}"] = Target(server, "/predict", INLINE)
            else:
                say(f"{peer} is not installed for {python}; see --peers")
        answers = [(target, target.warm_up()) for target in targets.values()]
        results: dict[tuple[int, str], list[Row]] = {}
        for _ in range(ROUNDS):
            for clients in CLIENTS:
                for name, target in targets.items():
                    result = target.load(clients, SECONDS)
                    results.setdefault((clients, name), []).append(result)
                    answers.append((target, result))
        recorded = _recorded(Path(home) / NO_OP_SERVER.stem)
    answered = sum(result["requests"] for target, result in answers if target.server is ours)
    if recorded != answered:
        raise SystemExit(f"{answered} requests were answered, {recorded} jobs are on record")
    say(f"ours: {answered:,} requests answered, as many jobs COMPLETED on record")
    return _rows(results)


def _rows(results: dict[tuple[int, str], list[Row]]) -> list[Row]:
    rows = []
    for (clients, name), each in results.items():
        row: Row = {"case": f"{name}, {clients} client{'s' * (clients > 1)}"}
        row["n"] = sum(result["requests"] for result in each)
        for figure in ("p50 ms", "p99 ms", "requests/s", "CPU ms"):
            row[figure] = statistics.median(result[figure] for result in each)
        for other, theirs in results.items():
            if other[0] == clients and not other[1].startswith("ours") and name.startswith("ours"):
                ratios = [
                    a["requests/s"] / b["requests/s"] for a, b in zip(each, theirs, strict=True)
                ]
                row[f"× {other[1].split()[0]}"] = statistics.median(ratios)
        rows.append(row)
    return rows


def _recorded(home: Path) -> int:
    with closing(sqlite3.connect(home / "zimage.db")) as db:
        (count,) = db.execute("SELECT COUNT(*) FROM jobs WHERE status='COMPLETED'").fetchone()
    return int(count)


def _version(python: Path, package: str) -> str | None:
    code = f"from importlib.metadata import version; print(version({package.lower()!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
