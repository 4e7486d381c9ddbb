"""The engine: one set of weights on one device, and the promises kept about it.

1. Picture k of a request with seed s is byte for byte picture 0 of the same request with seed s + k.
   Hence pictures are denoised and decoded one at a time; prompt and input picture are encoded once.
2. strength is continuous: see `sampling.forwards` and `sampling.sigmas`. 0 returns the input without
   a forward, 1 equals text-to-image.
3. Output has exactly the size asked for.
4. Every picture passes the safety checker unless the task says otherwise; flagged ones leave black.
5. A cancelled task stops between two steps and leaves nothing behind.

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
from typing import Any

import torch
from PIL import Image

from inference import sampling
from inference.safety import THRESHOLD, OpenNSFW, SafetyChecker
from inference.text import PromptEncoder
from inference.weights import Weights, locate
from media.decode import to_image
from media.encode import encode
from schemas.sizes import generation_size
from schemas.task import EncodedImage, Picture, Progress, Result, Task, TaskCancelled

logger = logging.getLogger(__name__)


class Engine:
    """Diffusers' own Z-Image components, called by us. Safe to call from several threads."""

    def __init__(self, components: dict[str, Any], safety: SafetyChecker, weights: Weights) -> None:
        self.transformer = components["transformer"]
        self.vae = components["vae"]
        self.scheduler = components["scheduler"]
        self.weights = weights
        self.device = torch.device(self.transformer.device)
        self._text_encoder = components["text_encoder"]
        self._encode_prompt = PromptEncoder(components["tokenizer"], self._text_encoder)
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
    ) -> Engine:
        """Load `demo`, a directory or a hub id from this machine. Raises WeightsError.

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
        engine = cls(pipeline.components, safety or OpenNSFW(safety_threshold), weights)
        logger.info(
            "loaded %s (%s) on %s as %s in %.1f s",
            *(spec, weights.revision, device, dtype, time.perf_counter() - started),
        )
        return engine

    def to(self, device: str) -> None:
        """Move all weights to another device."""
        with self._tensors:
            for model in (self.transformer, self.vae, self._text_encoder):
                model.to(device)
            self._encode_prompt.forget()
            self.device = torch.device(device)

    def warm_up(self, width: int, height: int) -> None:
        """Run one step at a size, so that the first request there pays for nothing but itself."""
        self(Task("warm up", width, height, steps=1, strength=1.0, seed=0, num_images=1))

    def close(self) -> None:
        """Stop the helper threads; the engine cannot be used afterwards."""
        self._finishers.shutdown(cancel_futures=True)

    def __call__(
        self,
        task: Task,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Result:
        """Generate. Raises TaskCancelled, or whatever broke; never returns an unchecked picture."""
        clock = StageClock()
        n = sampling.forwards(task.steps, task.strength)
        pictures = (
            self._denoised(task, n, clock, on_progress, cancelled) if n else self._unchanged(task)
        )
        finishing: list[Future[EncodedImage]] = []
        try:
            for picture in pictures:
                finishing.append(self._finishers.submit(self._finish, picture, task, clock))
            images = tuple(future.result() for future in finishing)
        except BaseException:
            for future in finishing:
                future.cancel()
            raise
        return Result(images, task.seed, task.prompt, n, clock.timings())

    def _unchanged(self, task: Task) -> Iterator[Image.Image]:
        assert task.image is not None, "strength 0 needs an input picture"
        picture = to_image(task.image).crop((0, 0, task.width, task.height))
        for _ in range(task.num_images):
            yield picture

    def _denoised(
        self,
        task: Task,
        n: int,
        clock: StageClock,
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> Iterator[Image.Image]:
        """Pictures of a task one after the other. The lock is free between two of them."""
        width, height = generation_size(task.width, task.height)
        tokens = (width // 16) * (height // 16)
        sigmas = sampling.sigmas(self.scheduler, task.steps, task.strength, tokens)
        first_sigma = float(sigmas[0])
        for k in range(task.num_images):

            def on_step(step: int, k: int = k) -> None:
                on_progress(Progress(step, n, k + 1, task.num_images))
                if cancelled():
                    raise TaskCancelled

            with self._turn(cancelled), torch.inference_mode():
                if k == 0:
                    with clock.stage("prompt_encode"):
                        prompt_embeds = self._encode_prompt(task.prompt)
                        self._synchronize()
                    with clock.stage("vae_encode"):
                        image_latents = self._encode_image(task.image, first_sigma)
                        self._synchronize()
                with clock.stage("denoise"):
                    noise = sampling.noise(
                        task.seed + k, self.transformer.in_channels, width, height
                    ).to(self.device)
                    latents = sampling.start(image_latents, noise, first_sigma)
                    latents = sampling.denoise(
                        self.transformer, latents, prompt_embeds, sigmas, on_step
                    )
                with clock.stage("vae_decode"):
                    pixels = sampling.to_pixels(self._decode_image(latents))
                    array = pixels[: task.height, : task.width].cpu().numpy()
            yield Image.fromarray(array, "RGB")

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

    def _encode_image(self, picture: Picture | None, sigma: float) -> torch.Tensor | None:
        """The mode of the VAE's posterior: no randomness, so no seed is spent on it."""
        if picture is None or sigma == 1.0:
            return None
        rgb = torch.frombuffer(bytearray(picture.rgb), dtype=torch.uint8)
        rgb = rgb.view(picture.height, picture.width, 3).to(self.device)
        posterior = self.vae.encode(sampling.from_pixels(rgb).to(self.vae.dtype)).latent_dist
        config = self.vae.config
        latents: torch.Tensor = posterior.mode()[0].float() - config.shift_factor
        return latents * float(config.scaling_factor)

    def _decode_image(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        # Cast before scaling, as the pipeline does.
        latents = latents.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        decoded: torch.Tensor = self.vae.decode(latents.unsqueeze(0), return_dict=False)[0][0]
        return decoded

    def _synchronize(self) -> None:
        """Wait for the device where nothing else does, so that a stage's time is its own."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _finish(self, image: Image.Image, task: Task, clock: StageClock) -> EncodedImage:
        flagged = False
        if task.safety:
            with clock.stage("safety_check"):
                flagged = self._safety(image)
        if flagged:
            image = Image.new("RGB", image.size)
        with clock.stage("file_encode"):
            return EncodedImage(encode(image, task.output_format), flagged)


class StageClock:
    """Seconds per stage of one task, added up over pictures and threads."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._stages: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        with self._lock:
            self._stages[name] = self._stages.get(name, 0.0) + elapsed

    def timings(self) -> dict[str, float]:
        """`inference`: wall-clock seconds since the task began; and the stages."""
        return {"inference": time.perf_counter() - self._started, **self._stages}


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast (GPUs, CPUs with AMX or AVX512-BF16), else float32.

    Never float16: Z-Image overflows in it.
    """
    fast_cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.startswith("cuda") or fast_cpu else torch.float32
