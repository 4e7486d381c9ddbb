"""Records of requests in a real `modal.Dict`, through Modal's own client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import modal
from modal_proto import api_pb2 as api

from gateway.jobs import Job, Outcome
from gateway.platforms.modal_records import Finished, Loaded, ModalRecords, ProgressReporter
from schemas.errors import Cancelled
from schemas.task import Progress
from tests.modal.control_plane import control_plane

JOB = Job("r1", "fal-ai/z-image/turbo", "alice", "https://host", created=1.0)
DONE = Finished(Outcome(200, b'{"images": []}', units=0.5, inference_time=0.4), 9.0, [])
STEP = Progress(step=3, steps=8, image=1, images=2)


def with_records(scenario: Callable[[ModalRecords], Awaitable[None]]) -> None:
    async def run(url: str) -> None:
        client = modal.Client(url, api.CLIENT_TYPE_CLIENT, ("ak-test", "as-test"))
        async with client:
            entries = modal.Dict.from_name("records", create_if_missing=True, client=client)
            await scenario(ModalRecords(entries))

    with control_plane() as (_, url):
        asyncio.run(run(url))


def test_a_job_is_what_its_entries_say() -> None:
    async def scenario(records: ModalRecords) -> None:
        assert await records.load("r1") is None
        assert await records.call_id("r1") is None
        await records.insert(JOB)
        await records.set_call("r1", "fc-1")
        assert await records.load("r1") == Loaded(JOB, 0)
        assert await records.call_id("r1") == "fc-1"

        assert await records.start("r1", 2.0) == 1
        await records.set_progress("r1", STEP, [])
        loaded = await records.load("r1")
        assert loaded is not None
        job, progress = loaded.job, loaded.progress
        assert (job.status, job.started, progress) == ("IN_PROGRESS", 2.0, STEP)
        assert await records.outcome("r1") is None

        assert await records.finish("r1", DONE)
        loaded = await records.load("r1")
        assert loaded is not None
        job, progress = loaded.job, loaded.progress
        assert (job.status, job.started, job.finished, progress) == ("COMPLETED", 2.0, 9.0, None)
        assert job.outcome is not None and (job.outcome.units, job.outcome.body) == (0.5, b"")
        assert await records.outcome("r1") == DONE.outcome

    with_records(scenario)


def test_the_first_end_of_a_job_is_its_end() -> None:
    async def scenario(records: ModalRecords) -> None:
        cancelled = Finished(Outcome.of_error(Cancelled()), 3.0, [])
        for first, second in ((cancelled, DONE), (DONE, cancelled)):
            request_id = str(first.outcome.status)
            await records.insert(JOB)
            assert await records.finish(request_id, first)
            assert not await records.finish(request_id, second)
            assert await records.outcome(request_id) == first.outcome

    with_records(scenario)


def test_progress_is_reported_without_holding_up_the_engine() -> None:
    async def scenario(records: ModalRecords) -> None:
        await records.insert(JOB)
        await records.start("r1", 2.0)
        report = ProgressReporter(records, "r1")
        for step in range(1, 9):
            report(Progress(step, 8, 1, 1))  # returns at once; one write is under way at a time
        await report.close()
        loaded = await records.load("r1")
        assert loaded is not None and loaded.progress == Progress(8, 8, 1, 1)
        assert [entry["message"] for entry in loaded.job.logs][-1] == "image 1/1: step 8/8"
        assert len(loaded.job.logs) == 8

    with_records(scenario)
