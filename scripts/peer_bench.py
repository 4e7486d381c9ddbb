"""The service against LitServe and BentoML: the same model, that takes no time, and the same load.

All answer the same small picture inline. Ours has also accepted, recorded and finished a durable job
by then: that is checked in its database. "Ours, file" stores the picture and answers its URL.
The servers take turns, round by round; every figure is the median of the rounds.
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

from serving import NO_OP_SERVER, Row, Serving

SCRIPTS = Path(__file__).parent
CLIENTS = (1, 8, 64)
ROUNDS, SECONDS, WARM_UP = 5, 2.5, 1.0

BODY = {"prompt": "x", "image_size": {"width": 64, "height": 64}}
INLINE = json.dumps({**BODY, "sync_mode": True}).encode()
FILE = json.dumps({**BODY, "sync_mode": False}).encode()
PATH = "/fal-ai/z-image/turbo"
PEERS = {"LitServe": "litserve_no_op.py", "BentoML": "bentoml_no_op.py"}

Target = tuple[str, bytes]
"""URL and request body."""


def against_peers(python: Path, say: Callable[[str], None]) -> list[Row]:
    targets: dict[str, Target] = {}
    with ExitStack() as running:

        def serve(program: Path, interpreter: str | Path) -> str:
            home = running.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            homes.append(Path(home))
            http = running.enter_context(Serving([str(interpreter), str(program)], home))
            return str(http.base_url).rstrip("/")

        homes: list[Path] = []
        ours = serve(NO_OP_SERVER, sys.executable) + PATH
        targets["ours"], targets["ours, file"] = (ours, INLINE), (ours, FILE)
        for peer, program in PEERS.items():
            if version := _version(python, peer):
                url = serve(SCRIPTS / "peers" / program, python) + "/predict"
                targets[f"{peer} {version}"] = url, INLINE
            else:
                say(f"{peer} is not installed for {python.name}; see --peers")
        answered = sum(_warm_up(target) for target in targets.values() if target[0] == ours)
        for url, body in targets.values():
            if url != ours:
                _warm_up((url, body))
        results: dict[tuple[int, str], list[Row]] = {}
        for _ in range(ROUNDS):
            for clients in CLIENTS:
                for name, target in targets.items():
                    result = _load(target, clients, SECONDS)
                    results.setdefault((clients, name), []).append(result)
                    answered += result["requests"] if target[0] == ours else 0
        recorded = _recorded(homes[0])
    if recorded != answered:
        raise SystemExit(f"{answered} requests were answered, {recorded} jobs are on record")
    say(f"ours: {answered:,} requests answered, as many jobs COMPLETED on record")
    return _rows(results)


def _rows(results: dict[tuple[int, str], list[Row]]) -> list[Row]:
    rows = []
    for (clients, name), each in results.items():
        row: Row = {"case": f"{name}, {clients} client{'s' * (clients > 1)}"}
        row["n"] = sum(result["requests"] for result in each)
        for figure in ("p50 ms", "p99 ms", "requests/s"):
            row[figure] = statistics.median(result[figure] for result in each)
        for other, theirs in results.items():
            if other[0] == clients and not other[1].startswith("ours") and name.startswith("ours"):
                ratios = [
                    a["requests/s"] / b["requests/s"] for a, b in zip(each, theirs, strict=True)
                ]
                row[f"× {other[1].split()[0]}"] = statistics.median(ratios)
        rows.append(row)
    return rows


def _load(target: Target, clients: int, seconds: float) -> Row:
    command = [sys.executable, str(SCRIPTS / "load.py"), target[0], str(clients), str(seconds)]
    done = subprocess.run(command, input=target[1], capture_output=True, check=True)
    return dict(json.loads(done.stdout))


def _warm_up(target: Target) -> int:
    """Waits for workers that start after their server; returns how many requests it took."""
    while True:
        try:
            return int(_load(target, 8, WARM_UP)["requests"])
        except subprocess.CalledProcessError:
            time.sleep(0.5)


def _recorded(home: Path) -> int:
    with closing(sqlite3.connect(home / "zimage.db")) as db:
        (count,) = db.execute("SELECT COUNT(*) FROM jobs WHERE status='COMPLETED'").fetchone()
    return int(count)


def _version(python: Path, package: str) -> str | None:
    code = f"from importlib.metadata import version; print(version({package.lower()!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
