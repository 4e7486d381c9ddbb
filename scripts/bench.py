"""Measurements, side by side in one run: ratios mean something, seconds depend on the machine.

    python scripts/bench.py [engine] [gateway] [encode] [gpu] [--peers PYTHON] [--json FILE]

engine   our engine against a bare diffusers script on the same demo weights, in the same dtype
gpu      the same on random weights of full size: every level, 512² to 2048², memory, dollars; attention
         kernels, stages of a request, LoRAs; cache-dit beside it where it is installed
         (`pip install cache-dit==1.5.3`); without a GPU the demo's sizes, to see that it runs
gateway  the service over an engine that takes no time, against LitServe and BentoML over the same;
         and how status answers under load. The two need an environment of their own:
         `python -m venv peers && peers/bin/pip install litserve bentoml`, `--peers peers/bin/python`
encode   file formats at a megapixel, ours against Pillow's defaults
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from peer_bench import against_peers
from PIL import Image
from rich.console import Console
from rich.table import Table
from serving import NO_OP_SERVER, Row, Serving
from timing import alternate

ROOT = Path(__file__).parent.parent
CAT = ROOT / "examples" / "cat.jpg"

console = Console(width=None if sys.stdout.isatty() else 140)


def gateway(peers: Path, requests: int = 400) -> list[Row]:
    rows = [*against_peers(peers, console.print), imports()]
    photo = "data:image/jpeg;base64," + base64.b64encode(CAT.read_bytes()).decode()
    small = {"prompt": "x", "image_size": {"width": 64, "height": 64}}
    with (
        tempfile.TemporaryDirectory() as home,
        Serving([sys.executable, str(NO_OP_SERVER)], home) as http,
    ):
        for name, path, body in (
            ("text-to-image, no-op engine", "turbo", small),
            (
                "39 kB photograph in, no-op engine",
                "turbo/image-to-image",
                {"prompt": "x", "image_url": photo},
            ),
        ):
            post = partial(http.post, f"/fal-ai/z-image/{path}", json=body)
            seconds = [timed(post) for _ in range(requests + 50)]
            rows.append(latencies(name, seconds[50:]))
            decoding = [post().json()["timings"]["input_decode"] for _ in range(50)]
            rows[-1]["of it decoding, p50 ms"] = statistics.median(decoding) * 1e3
        rows.append(burst(str(http.base_url), small))
    zimage = [str(Path(sys.executable).parent / "zimage"), "serve", "--home"]
    large = {"prompt": "x", "image_size": {"width": 512, "height": 512}, "num_images": 4}
    with tempfile.TemporaryDirectory() as home, Serving(zimage, home, "--port") as http:
        job = http.post("/queue/fal-ai/z-image/turbo", json=large).json()
        while http.get(job["status_url"]).json()["status"] != "IN_PROGRESS":
            pass
        poll, seconds = partial(http.get, job["status_url"]), []
        while True:
            seconds.append(timed(poll))
            if poll().json()["status"] == "COMPLETED":
                break
            time.sleep(0.01)
        rows.append(latencies("status while four pictures are denoised", seconds))
    return rows


def burst(base: str, body: dict[str, Any], clients: int = 50, jobs: int = 20) -> Row:
    """Status, asked by one more client, while many submit jobs and wait for them."""
    import httpx2

    queue = "/queue/fal-ai/z-image/turbo"

    def client(_: int) -> None:
        with httpx2.Client(base_url=base, timeout=60) as http:
            urls = [http.post(queue, json=body).json()["status_url"] for _ in range(jobs)]
            for url in urls:
                while http.get(url).json()["status"] != "COMPLETED":
                    time.sleep(0.1)

    with ThreadPoolExecutor(clients) as threads, httpx2.Client(base_url=base) as http:
        url = http.post(queue, json=body).json()["status_url"]
        waiting = [threads.submit(client, k) for k in range(clients)]
        seconds = []
        while not all(future.done() for future in waiting):
            seconds.append(timed(partial(http.get, url)))
            time.sleep(0.005)
        for future in waiting:
            future.result()
    return latencies(f"status while {clients} clients run {clients * jobs} jobs", seconds)


def imports() -> Row:
    code = (
        "import time; t = time.perf_counter(); import gateway.app, gateway.platforms.local;"
        "print(time.perf_counter() - t)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(7)
    ]
    return latencies("import of the gateway", seconds)


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def latencies(case: str, seconds: list[float]) -> Row:
    ordered = sorted(seconds)
    return {
        "case": case,
        "n": len(ordered),
        "p50 ms": statistics.median(ordered) * 1e3,
        "p99 ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3,
    }


def encode(rounds: int = 5) -> list[Row]:
    from media.encode import CONTENT_TYPES as FORMATS
    from media.encode import encode as ours
    from schemas.task import Format

    photo = Image.open(CAT).convert("RGB").resize((1024, 1024), Image.Resampling.LANCZOS)

    def run_ours(format: Format, k: int = 0) -> bytes:
        return ours(photo, format)

    def run_pillow(format: Format, k: int = 0) -> bytes:
        buffer = io.BytesIO()
        photo.save(buffer, format)
        return buffer.getvalue()

    rows = []
    for format in FORMATS:
        medians = alternate(
            {"ours": partial(run_ours, format), "pillow": partial(run_pillow, format)}, rounds
        )
        rows.append(
            {
                "case": f"{format}, 1024²",
                "ours ms": medians["ours"] * 1e3,
                "Pillow's defaults ms": medians["pillow"] * 1e3,
                "ours KiB": len(run_ours(format)) / 1024,
                "Pillow's defaults KiB": len(run_pillow(format)) / 1024,
            }
        )
    return rows


DEFAULT = ("engine", "gateway", "encode")


def engine() -> list[Row]:
    from engine_bench import on_demo_weights

    return on_demo_weights()


def gpu(price: float) -> list[Row]:
    from gpu_bench import on_full_size

    return on_full_size(price)


def show(title: str, rows: list[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title)
    table.columns[0].no_wrap = True
    for row in rows:
        values = (row.get(name, "") for name in names)
        table.add_row(*(f"{v:,.2f}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="part",
        help="engine, gateway, encode, gpu; the first three if none is named",
    )
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument(
        "--peers", type=Path, default=sys.executable, help="an interpreter that has the peers"
    )
    parser.add_argument(
        "--price", type=float, default=0.001261, help="dollars a second of GPU, for `gpu`"
    )
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], list[Row]]] = {
        "engine": engine,
        "gpu": partial(gpu, arguments.price),
        "gateway": partial(gateway, arguments.peers),
        "encode": encode,
    }
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"unknown part: {', '.join(unknown)}")
    results = {}
    for name in arguments.parts or DEFAULT:
        results[name] = parts[name]()
        show(name, results[name])
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")


def machine() -> dict[str, Any]:
    import os
    from importlib.metadata import version

    names = (
        "torch",
        "diffusers",
        "transformers",
        "pillow",
        "fastapi",
        "uvicorn",
        "uvloop",
        "pydantic",
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": next(
            (
                line.partition(":")[2].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        ),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
