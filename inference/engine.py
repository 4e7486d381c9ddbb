"""The engine: one set of weights on one device, and the promises kept about it.

1. Picture k of a request with seed s is byte for byte picture 0 of the same request with seed s + k.
   Hence pictures are denoised and decoded one at a time; prompt and input picture are encoded once.
2. strength is continuous: see `sampling.forwards` and `sampling.sigmas`. 0 returns the input without
   a forward, 1 equals text-to-image.
3. Output has exactly the size asked for.
4. Acceleration changes time, never meaning: see `plan`.
5. Every picture passes the safety checker unless the task says otherwise; flagged ones leave black.
6. Prompts are expanded by the text encoder itself: see `expansion`.
7. A cancelled task stops between two steps and leaves nothing behind.
8. A LoRA is applied whole or refused, and is gone when its task is: see `lora`.

Tensor work is serialised by a lock. Checking and file encoding of a finished picture run on the CPU
beside the denoising of the next one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from inference import sampling
from inference.autoencoder import is_out_of_memory, release_memory
from inference.clock import StageClock
from inference.drawing import Drawing
from inference.models import Models
from inference.plan import Plan, default_device, plan
from inference.safety import THRESHOLD, OpenNSFW, SafetyChecker
from inference.tiling import resize
from inference.weights import Weights
from media.decode import to_image
from media.encode import encode
from schemas.errors import InputError, Loc
from schemas.lora import LoraError
from schemas.task import Acceleration, EncodedImage, Progress, Result, Task, TaskCancelled

ACCELERATED: tuple[Acceleration, ...] = ("regular", "high")

logger = logging.getLogger(__name__)


class Engine:
    """Draws tasks with one set of models. Safe to call from several threads."""

    def __init__(self, models: Models, safety: SafetyChecker) -> None:
        self.models = models
        self._safety = safety
        self._tensors = threading.Lock()
        self._finishers = ThreadPoolExecutor(2, thread_name_prefix="finish")

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        safety: SafetyChecker | None = None,
        safety_threshold: float = THRESHOLD,
        loras: Path = Path("loras"),
    ) -> Engine:
        """Load `demo`, a directory or a hub id from this machine. Raises WeightsError.

        device: "cuda", "cpu", …; the first GPU if there is one. dtype: see `models.default_dtype`.
        loras: directory of the files that tasks name by their digest.
        """
        models = Models.load(spec, device or default_device(), dtype, loras)
        return cls(models, safety or OpenNSFW(safety_threshold))

    @property
    def device(self) -> torch.device:
        return self.models.device

    @property
    def weights(self) -> Weights:
        return self.models.weights

    def to(self, device: str) -> None:
        """Move all weights to another device."""
        with self._tensors:
            self.models.to(device)

    def warm_up(self, width: int, height: int) -> None:
        """Run a step at a size, on every plan, so that the first request there pays for itself only."""
        task = Task("warm up", width, height, steps=1, strength=1.0, seed=0, num_images=1)
        for level in {plan(level, self.device): level for level in ACCELERATED}.values():
            self(replace(task, acceleration=level))

    def close(self) -> None:
        """Stop the helper threads; the engine cannot be used afterwards."""
        self._finishers.shutdown(cancel_futures=True)

    def __call__(
        self,
        task: Task,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Result:
        """Generate. Never returns an unchecked picture.

        Raises TaskCancelled; InputError for what these weights or this device cannot do; or whatever
        broke.
        """
        clock = StageClock()
        how = plan(task.acceleration, self.device)
        try:
            if task.loras:  # at strength 0, too: whole or refused
                with clock.stage("lora"), _refusing(task):
                    self.models.loras.prefetch(task.loras)
            task = self._expanded(task, clock, cancelled)
            n = sampling.forwards(task.steps, task.strength)
            pictures = (
                self._denoised(task, n, how, clock, on_progress, cancelled)
                if n
                else self._unchanged(task)
            )
            images = self._finished(pictures, task, clock)
            done = self.models.what_ran(how) if n else ""
            return Result(images, task.seed, task.prompt, n, clock.timings(), done)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Out of the except block, where the error and the tensors in its frames are no longer held.
        release_memory()
        raise InputError(
            ("body", "image_size"),
            f"{task.width}×{task.height} pixels need more memory than this deployment has",
            "image_too_large",
        )

    def _expanded(self, task: Task, clock: StageClock, cancelled: Callable[[], bool]) -> Task:
        """The task with the prompt that is used."""
        if not task.expand_prompt:
            return task
        if not self.weights.language_model:
            raise InputError(
                ("body", "enable_prompt_expansion"),
                f"The weights {self.weights.spec} cannot expand prompts: their text encoder is not a "
                "language model",
                "feature_not_supported",
                input=True,
            )
        with (
            self._turn(cancelled),
            torch.inference_mode(),
            clock.stage("prompt_expansion"),
        ):
            return replace(task, prompt=self.models.expand_prompt(task.prompt, cancelled))

    def _unchanged(self, task: Task) -> Iterator[Image.Image]:
        assert task.image is not None, "strength 0 needs an input picture"
        picture = to_image(task.image)
        if task.tiling:
            picture = resize(picture, task.width, task.height)
        else:
            picture = picture.crop((0, 0, task.width, task.height))
        for _ in range(task.num_images):
            yield picture

    def _denoised(
        self,
        task: Task,
        n: int,
        how: Plan,
        clock: StageClock,
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> Iterator[Image.Image]:
        """Pictures of a task one after the other. The lock is free between two of them."""
        drawing = None
        for k in range(task.num_images):

            def on_step(step: int, k: int = k) -> None:
                on_progress(Progress(step, n, k + 1, task.num_images))
                if cancelled():
                    raise TaskCancelled

            with self._turn(cancelled), torch.inference_mode():
                self._merge(task, clock)
                drawing = drawing or Drawing(self.models, task, how, clock)
                picture = drawing.picture(k, on_step)
            yield picture

    def _merge(self, task: Task, clock: StageClock) -> None:
        """Make the weights the task's; since its last picture another one may have had its turn."""
        if task.loras != self.models.loras.active:
            with clock.stage("lora"), _refusing(task):
                self.models.merge(task.loras)
                self.models.synchronize()

    @contextmanager
    def _turn(self, cancelled: Callable[[], bool]) -> Iterator[None]:
        """The tensor lock; a task that is cancelled while it waits leaves the line."""
        while not self._tensors.acquire(timeout=0.05):
            if cancelled():
                raise TaskCancelled
        try:
            if cancelled():
                raise TaskCancelled
            yield
        finally:
            self._tensors.release()

    def _finished(
        self, pictures: Iterator[Image.Image], task: Task, clock: StageClock
    ) -> tuple[EncodedImage, ...]:
        """Check and encode each picture while the next one is made."""
        finishing: list[Future[EncodedImage]] = []
        try:
            for picture in pictures:
                finishing.append(self._finishers.submit(self._finish, picture, task, clock))
            return tuple(future.result() for future in finishing)
        except BaseException:
            for future in finishing:
                future.cancel()
            raise

    def _finish(self, image: Image.Image, task: Task, clock: StageClock) -> EncodedImage:
        flagged = False
        if task.safety:
            with clock.stage("safety_check"):
                flagged = self._safety(image)
        if flagged:
            image = Image.new("RGB", image.size)
        with clock.stage("file_encode"):
            return EncodedImage(encode(image, task.output_format), flagged)


@contextmanager
def _refusing(task: Task) -> Iterator[None]:
    """Raises InputError, naming the LoRA, for one that cannot be applied."""
    try:
        yield
    except LoraError as error:
        loc: Loc = ("body", "loras")
        for k, lora in enumerate(task.loras):
            if lora.digest == error.digest:
                loc = ("body", "loras", k, "path")
        raise InputError(loc, f"This LoRA cannot be used: {error}", "value_error") from None
