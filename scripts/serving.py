"""Servers in processes of their own, for measurements."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

NO_OP_SERVER = Path(__file__).parent / "no_op_server.py"
Row = dict[str, Any]


class Serving:
    """A server in a process of its own, `command home [option] port`, and a client for it."""

    def __init__(self, command: list[str], home: str, option: str | None = None) -> None:
        import socket

        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._command = [*command, home, *([option] if option else []), str(self.port)]

    def __enter__(self) -> Any:
        import httpx2

        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._http = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        while True:
            try:
                self._http.get("/ready")
                return self._http
            except httpx2.ConnectError:
                if self._process.poll() is not None:
                    raise SystemExit(f"{self._command[0]} did not start") from None
                time.sleep(0.05)

    @property
    def cpu_seconds(self) -> float:
        """Of the server and all that descends from it, as /proc has them."""
        parents, ticks = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields, pid = stat.read_text().rpartition(")")[2].split(), int(stat.parent.name)
                parents[pid] = int(fields[1])
                ticks[pid] = int(fields[11]) + int(fields[12])
        family = {self._process.pid}
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        return sum(ticks.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")

    def __exit__(self, *exc: object) -> None:
        self._http.close()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError):  # some leave workers behind
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
