"""The same components several times: in our engine, and in diffusers' pipelines as a script has them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from PIL import Image

from inference.engine import Engine
from inference.sampling import forwards
from media.decode import to_picture
from media.fit import fit
from schemas.task import Acceleration, Lora, Result, Task

CAT = Path(__file__).parent.parent / "examples" / "cat.jpg"
STEPS = 8


class Rivals:
    """Text-to-image at strength 1, image-to-image below; a prompt has a place for the round's number."""

    def __init__(self, engine: Engine, sides: tuple[int, ...]) -> None:
        models = engine.models
        components: dict[str, Any] = {
            "transformer": models.transformer,
            "scheduler": models.scheduler,
            "text_encoder": models.text_encoder,
            "tokenizer": models.encode_prompt._tokenizer,
            "vae": models.autoencoder.vae,
        }
        self.engine = engine
        self.text_to_image = ZImagePipeline(**components)
        self.image_to_image = ZImageImg2ImgPipeline(**components)
        for pipeline in (self.text_to_image, self.image_to_image):
            pipeline.set_progress_bar_config(disable=True)
        self.photos = {side: Image.open(CAT).convert("RGB").resize((side, side)) for side in sides}
        self.pictures = {
            side: fit(to_picture(photo), side, side) for side, photo in self.photos.items()
        }

    def ours(
        self,
        side: int,
        n: int,
        strength: float,
        level: Acceleration,
        prompt: str,
        k: int,
        loras: tuple[Lora, ...] = (),
    ) -> Result:
        image = self.pictures[side] if strength < 1 else None
        return self.engine(
            Task(
                prompt.format(k),
                *(side, side, STEPS, strength, 7, n, image),
                safety=False,
                acceleration=level,
                loras=loras,
            )
        )

    def bare(self, side: int, n: int, strength: float, prompt: str, k: int) -> None:
        options: dict[str, Any] = {}
        if strength < 1:
            options = {"image": self.photos[side], "strength": strength}
        images = (
            self.pipeline(strength)(
                prompt.format(k),
                width=side,
                height=side,
                num_inference_steps=STEPS,
                guidance_scale=0.0,
                num_images_per_prompt=n,
                generator=torch.Generator().manual_seed(7),
                **options,
            )
        ).images
        for image in images:
            image.save(io.BytesIO(), "PNG", compress_level=1)

    def pipeline(self, strength: float) -> Any:
        return self.image_to_image if strength < 1 else self.text_to_image

    @contextmanager
    def caching(self, strength: float) -> Iterator[None]:
        """The bare pipeline with cache-dit, which skips two of its last four forwards.

        Which, is fixed, as in its own example for Z-Image-Turbo: on weights that mean nothing, steps
        never resemble each other, and it would skip none. Raises ImportError without cache-dit.
        """
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        import cache_dit

        n = forwards(STEPS, strength)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            num_inference_steps=n,
            max_warmup_steps=0,
            steps_computation_mask=[1] * (n - 4) + [0, 1, 0, 1],
            steps_computation_policy="static",
        )
        pipeline = self.pipeline(strength)
        cache_dit.enable_cache(pipeline, cache_config=config)
        try:
            yield
        finally:
            cache_dit.disable_cache(pipeline)
