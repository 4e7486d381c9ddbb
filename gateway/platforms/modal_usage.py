"""Usage on a Volume: Parquet files, one folder per day, one row per finished request.

A round of housekeeping that was cut short writes some rows again, in another file; a request id
counts once, so whoever reads the files takes one row for each. `Usage.read` does.
"""

from __future__ import annotations

import datetime
import hashlib
import io
from collections import defaultdict
from typing import Any

import modal

from gateway.jobs import Job
from gateway.platforms.modal_parts import Parts


def row(job: Job) -> dict[str, Any]:
    """units are megapixels; seconds are GPU seconds of the successful run, null where there was none."""
    assert job.outcome is not None and job.finished is not None
    return {
        "request_id": job.request_id,
        "key_id": job.key_id,
        "endpoint": job.endpoint,
        "created": job.created,
        "finished": job.finished,
        "status": job.outcome.status,
        "units": job.outcome.units,
        "seconds": job.outcome.inference_time,
    }


class Usage:
    def __init__(self, volume: modal.Volume) -> None:
        self._volume = volume

    async def add(self, rows: list[dict[str, Any]]) -> None:
        """Write rows to the days on which their requests ended (UTC)."""
        import pyarrow
        from pyarrow import parquet

        days = defaultdict(list)
        for each in rows:
            ended = datetime.datetime.fromtimestamp(each["finished"], datetime.UTC)
            days[ended.date().isoformat()].append(each)
        for day, some in days.items():
            ids = "".join(sorted(each["request_id"] for each in some))
            name = hashlib.sha256(ids.encode()).hexdigest()[:16]
            buffer = io.BytesIO()
            parquet.write_table(pyarrow.Table.from_pylist(some, schema=_schema()), buffer)
            buffer.seek(0)
            async with self._volume.batch_upload.aio(force=True) as batch:
                batch.put_file(buffer, f"/date={day}/{name}.parquet")

    async def read(self, since: str = "") -> list[dict[str, Any]]:
        """Rows of the days from `since` (YYYY-MM-DD) on, each request once."""
        from pyarrow import parquet

        found: dict[str, dict[str, Any]] = {}
        for entry in await self._volume.listdir.aio("/", recursive=True):
            day, _, name = entry.path.strip("/").removeprefix("date=").partition("/")
            if not name.endswith(".parquet") or day < since:
                continue
            data = b"".join([chunk async for chunk in self._volume.read_file.aio(entry.path)])
            for each in parquet.read_table(io.BytesIO(data)).to_pylist():
                found[each["request_id"]] = each
        return list(found.values())


async def summary(parts: Parts, since: str, snapshot: str) -> str:
    """For people: the days from `since` (YYYY-MM-DD) on, and how GPU containers started."""
    served, reloaded = await parts.records.restores(snapshot)
    return (
        f"{table(await Usage(parts.usage).read(since))}\n\n"
        f"GPU containers since seven days: {served} started from their snapshot ({snapshot}), "
        f"{reloaded} had to load anew"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Rows summed by day (UTC) and key, as text."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    for each in rows:
        day = datetime.datetime.fromtimestamp(each["finished"], datetime.UTC).date().isoformat()
        total = sums[day, each["key_id"]]
        total[0] += 1
        total[1] += each["status"] >= 400
        total[2] += each["units"]
        total[3] += each["seconds"] or 0.0
    lines = [f"{'day':10}  {'key':20}  {'requests':>8}  {'failed':>6}  {'MP':>10}  {'GPU s':>10}"]
    for (day, key_id), (requests, failed, units, seconds) in sorted(sums.items()):
        lines.append(
            f"{day:10}  {key_id:20}  {requests:8.0f}  {failed:6.0f}  {units:10.3f}  {seconds:10.1f}"
        )
    return "\n".join(lines)


def _schema() -> Any:
    import pyarrow

    text, number = pyarrow.string(), pyarrow.float64()
    return pyarrow.schema(
        [
            ("request_id", text),
            ("key_id", text),
            ("endpoint", text),
            ("created", number),
            ("finished", number),
            ("status", pyarrow.int32()),
            ("units", number),
            ("seconds", number),
        ]
    )
