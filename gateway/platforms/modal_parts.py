"""What the app has deployed on Modal, as the platform calls it, and what a failing call means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import modal

from gateway.jobs import disconnected
from gateway.platforms.modal_files import VolumeFiles
from gateway.platforms.modal_ledger import Ledger
from gateway.platforms.modal_records import ModalRecords
from schemas.errors import ServiceError

UNREACHED = (
    modal.exception.ConnectionError,
    modal.exception.ServiceError,
    modal.exception.InternalError,
    modal.exception.ResourceExhaustedError,
    modal.exception.ClientClosed,
    modal.exception.AuthError,
)
"""Modal's servers could not be asked. Whatever else a look at a call raises is what the call raised, or
that it is gone; jobs raise nothing of these, see JobFailed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Functions:
    """The app's functions: `job` runs `run_job`, `webhook` runs `deliver`, `engines` are the GPU class's
    method for each set of weights, which runs `modal_engine.generate`."""

    job: Any
    engines: Mapping[str, Any]
    webhook: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What the app has deployed: functions; Dicts of requests and of what is to be done about them;
    Volumes of pictures, of usage, of what schedules make, and of LoRAs."""

    functions: Functions
    entries: modal.Dict
    tasks: modal.Dict
    pictures: modal.Volume
    usage: modal.Volume
    scheduled: modal.Volume
    loras: modal.Volume

    @property
    def records(self) -> ModalRecords:
        return ModalRecords(self.entries)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.tasks)

    @property
    def files(self) -> VolumeFiles:
        return VolumeFiles(self.pictures)


def lost(error: BaseException) -> ServiceError:
    """What a caller learns of a call that Modal has given up."""
    if isinstance(error, modal.exception.FunctionTimeoutError):
        return ServiceError(504, "The request took too long", "generation_timeout")
    return disconnected()
