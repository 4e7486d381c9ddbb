"""How the commands of one machine come by an engine, and by a platform in front of it.

The engine is the composition root's: commands find `OpenEngine` as their context's object, and know no
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gateway.commands.terminal import fail
from schemas.task import Progress, Result, Task, Variant

if TYPE_CHECKING:
    from gateway.platform import Platform
    from gateway.services import GenerateAsync
    from gateway.settings import Settings


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """weights: which, their revisions and the device, for people to read."""

    generate: GenerateAsync
    weights: str


class OpenEngine(Protocol):
    def __call__(self, settings: Settings, *wanted: Variant) -> AbstractContextManager[LocalEngine]:
        """An engine for the wanted variants, or for all that are served."""


@contextmanager
def platform_and_engine(
    settings: Settings, open_engine: OpenEngine, when_in_use: str = ""
) -> Iterator[tuple[Platform, LocalEngine]]:
    """The platform, not yet entered, and the engine it asks.

    Real weights take minutes, so the platform comes first: it may find ZIMAGE_HOME in use, or unusable.
    """
    from gateway.platforms.home import HomeInUse
    from gateway.platforms.local import LocalPlatform

    async def generate(task: Task, on_progress: Callable[[Progress], None]) -> Result:
        return await engine.generate(task, on_progress)

    try:
        platform = LocalPlatform(settings, generate)
    except HomeInUse as error:
        fail(f"{error}{when_in_use}")
    except OSError as error:
        fail(f"ZIMAGE_HOME {settings.home} cannot be used: {error.strerror}")
    with open_engine(settings) as engine:
        yield platform, engine
