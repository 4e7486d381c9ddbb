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
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from inference import sampling
from inference.autoencoder import Autoencoder, is_out_of_memory, release_memory
from inference.clock import StageClock
from inference.expansion import PromptExpander
from inference.lean import LeanTransformer
from inference.lora import Loras
from inference.plan import Plan, plan
from inference.safety import THRESHOLD, OpenNSFW, SafetyChecker
from inference.text import PromptEncoder
from inference.velocity import Velocity, guided, reference
from inference.weights import Weights, locate
from media.decode import to_image
from media.encode import encode
from schemas.errors import InputError
from schemas.lora import LoraError
from schemas.sizes import generation_size
from schemas.task import Acceleration, EncodedImage, Progress, Result, Task, TaskCancelled

ACCELERATED: tuple[Acceleration, ...] = ("regular", "high")

logger = logging.getLogger(__name__)


class Engine:
    """Diffusers' own Z-Image components, called by us. Safe to call from several threads."""

    def __init__(
        self,
        components: dict[str, Any],
        safety: SafetyChecker,
        weights: Weights,
        loras: Path = Path("loras"),
    ) -> None:
        self.transformer = components["transformer"]
        self.scheduler = components["scheduler"]
        self.weights = weights
        self.device = torch.device(self.transformer.device)
        self.autoencoder = Autoencoder(components["vae"])
        self._text_encoder = components["text_encoder"]
        self._encode_prompt = PromptEncoder(components["tokenizer"], self._text_encoder)
        self._expand_prompt = PromptExpander(components["tokenizer"], self._text_encoder)
        self._loras = Loras(self.transformer, loras)
        self._lean: LeanTransformer | None = None
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

        loras: directory of the files that tasks name by their digest.
        device: "cuda", "cpu", …; the first GPU if there is one. dtype: see `default_dtype`.
        """
        from diffusers import ZImagePipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        weights = locate(spec)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or default_dtype(device)
        started = time.perf_counter()
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        pipeline = ZImagePipeline.from_pretrained(
            weights.path, dtype=dtype, local_files_only=True
        ).to(device)
        for name in ("transformer", "vae", "text_encoder"):
            getattr(pipeline, name).eval().requires_grad_(False)
        engine = cls(pipeline.components, safety or OpenNSFW(safety_threshold), weights, loras)
        logger.info(
            "loaded %s (%s) on %s as %s in %.1f s",
            *(spec, weights.revision, device, dtype, time.perf_counter() - started),
        )
        return engine

    def to(self, device: str) -> None:
        """Move all weights to another device."""
        with self._tensors:
            self._loras.forget()
            self._lean = None
            for model in (self.transformer, self.autoencoder.vae, self._text_encoder):
                model.to(device)
            self._encode_prompt.forget()
            self.device = torch.device(device)

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
            task = self._expanded(task, clock, cancelled)
            n = sampling.forwards(task.steps, task.strength)
            pictures = (
                self._denoised(task, n, how, clock, on_progress, cancelled)
                if n
                else self._unchanged(task)
            )
            images = self._finished(pictures, task, clock)
            return Result(images, task.seed, task.prompt, n, clock.timings(), str(how))
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
            return replace(task, prompt=self._expand_prompt(task.prompt, cancelled))

    def _unchanged(self, task: Task) -> Iterator[Image.Image]:
        assert task.image is not None, "strength 0 needs an input picture"
        picture = to_image(task.image).crop((0, 0, task.width, task.height))
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
        width, height = generation_size(task.width, task.height)
        tokens = (width // 16) * (height // 16)
        sigmas = sampling.sigmas(self.scheduler, task.steps, task.strength, tokens)
        first_sigma = float(sigmas[0])
        sigmas = sigmas.to(self.device)
        for k in range(task.num_images):

            def on_step(step: int, k: int = k) -> None:
                on_progress(Progress(step, n, k + 1, task.num_images))
                if cancelled():
                    raise TaskCancelled

            with self._turn(cancelled), torch.inference_mode():
                self._merge(task, clock)
                if k == 0:
                    with clock.stage("prompt_encode"):
                        velocity = self._velocity(task, how, sigmas, width, height)
                        self._synchronize()
                    with clock.stage("vae_encode"):
                        image_latents = None
                        if task.image is not None and first_sigma < 1.0:
                            image_latents = self.autoencoder.encode(task.image)
                        self._synchronize()
                with clock.stage("denoise"):
                    noise = sampling.noise(
                        task.seed + k, self.transformer.in_channels, width, height
                    ).to(self.device)
                    latents = sampling.start(image_latents, noise, first_sigma)
                    latents = sampling.denoise(velocity, latents, sigmas, on_step)
                with clock.stage("vae_decode"):
                    pixels = self.autoencoder.decode(latents)
                    array = pixels[: task.height, : task.width].cpu().numpy()
            yield Image.fromarray(array, "RGB")

    def _velocity(
        self, task: Task, how: Plan, sigmas: torch.Tensor, width: int, height: int
    ) -> Velocity:
        """What all pictures of a task have in common: prompts, schedule, size, and how to forward."""

        def of(prompt: str) -> Velocity:
            embeds = self._encode_prompt(prompt)
            if not how.lean:
                return reference(self.transformer, embeds, sigmas)
            if self._lean is None:
                self._lean = LeanTransformer(self.transformer, compiled=how.compiled)
            size = height // sampling.LATENT_FACTOR, width // sampling.LATENT_FACTOR
            return self._lean.velocity(embeds, sigmas, *size, in_8_bits=how.float8)

        if not task.guidance_scale:
            return of(task.prompt)
        return guided(of(task.prompt), of(task.negative_prompt), task.guidance_scale)

    def _merge(self, task: Task, clock: StageClock) -> None:
        """Make the weights the task's; since its last picture another one may have had its turn."""
        if task.loras == self._loras.active:
            return
        with clock.stage("lora"):
            try:
                self._loras.apply(task.loras)
            except LoraError as error:
                raise InputError(
                    ("body", "loras"), f"This LoRA cannot be used: {error}", "value_error"
                ) from None
            finally:
                if self._lean is not None:
                    self._lean.requantize()
            self._synchronize()

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

    def _synchronize(self) -> None:
        """Wait for the device where nothing else does, so that a stage's time is its own."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

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


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast (GPUs, CPUs with AMX or AVX512-BF16), else float32.

    Never float16: Z-Image overflows in it.
    """
    fast_cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.startswith("cuda") or fast_cpu else torch.float32
