"""One set of weights on one device: diffusers' own Z-Image components, and what is derived from them.

Not safe for concurrent use; the engine holds its lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inference.autoencoder import Autoencoder
from inference.expansion import PromptExpander
from inference.lean import LeanTransformer
from inference.lora import Loras
from inference.plan import Plan
from inference.text import PromptEncoder
from inference.tiling import circular
from inference.velocity import Velocity, reference
from inference.weights import Weights, locate
from schemas.task import Lora, Tiling

logger = logging.getLogger(__name__)


class Models:
    """transformer, scheduler, text encoder, tokenizer and VAE, by diffusers' names in `components`."""

    def __init__(
        self, components: dict[str, Any], weights: Weights, loras: Path = Path("loras")
    ) -> None:
        self.transformer = components["transformer"]
        self.scheduler = components["scheduler"]
        self.text_encoder = components["text_encoder"]
        self.autoencoder = Autoencoder(components["vae"])
        self.weights = weights
        self.device = torch.device(self.transformer.device)
        self.encode_prompt = PromptEncoder(components["tokenizer"], self.text_encoder)
        self.expand_prompt = PromptExpander(components["tokenizer"], self.text_encoder)
        self.loras = Loras(self.transformer, loras)
        self._lean: LeanTransformer | None = None
        self._circular: dict[str, Autoencoder] = {}

    @classmethod
    def load(
        cls, spec: str, device: str, dtype: torch.dtype | None, loras: Path = Path("loras")
    ) -> Models:
        """See `Engine.load`."""
        from diffusers import ZImagePipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        weights = locate(spec)
        dtype = dtype or default_dtype(device)
        started = time.perf_counter()
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        pipeline = ZImagePipeline.from_pretrained(
            weights.path, dtype=dtype, local_files_only=True
        ).to(device)
        for name in ("transformer", "vae", "text_encoder"):
            getattr(pipeline, name).eval().requires_grad_(False)
        models = cls(pipeline.components, weights, loras)
        logger.info(
            "loaded %s (%s) on %s as %s in %.1f s",
            *(spec, weights.revision, device, dtype, time.perf_counter() - started),
        )
        return models

    def to(self, device: str) -> None:
        """Move all weights; what was made of them is made anew when it is needed."""
        self.loras.forget()
        self._lean = None
        self._circular.clear()
        for model in (self.transformer, self.autoencoder.vae, self.text_encoder):
            model.to(device)
        self.encode_prompt.forget()
        self.device = torch.device(device)

    def merge(self, loras: Sequence[Lora]) -> None:
        """Make the transformer's weights those with exactly these LoRAs. Raises LoraError."""
        try:
            self.loras.apply(loras)
        finally:
            if self._lean is not None:
                self._lean.requantize()

    def velocity(
        self, prompt: str, sigmas: torch.Tensor, height: int, width: int, how: Plan
    ) -> Velocity:
        """sigmas (n + 1,) on the device; height and width of latents."""
        embeds = self.encode_prompt(prompt)
        if not how.lean:
            return reference(self.transformer, embeds, sigmas)
        if self._lean is None:
            self._lean = LeanTransformer(self.transformer, compiled=how.compiled)
        return self._lean.velocity(
            *(embeds, sigmas, height, width), in_8_bits=how.float8, attention=how.attention
        )

    def what_ran(self, how: Plan) -> str:
        """The plan in words, as it turned out: blocks that cannot be compiled run as they are."""
        if how.compiled and self._lean is not None and not self._lean.compiled:
            how = replace(how, compiled=False)
        return str(how)

    def autoencoder_for(self, tiling: Tiling | None) -> Autoencoder:
        """The VAE, or the one whose padding goes round the edges that match."""
        if tiling is None:
            return self.autoencoder
        if tiling.mode not in self._circular:
            self._circular[tiling.mode] = Autoencoder(circular(self.autoencoder.vae, tiling))
        return self._circular[tiling.mode]

    def synchronize(self) -> None:
        """Wait for the device where nothing else does, so that a stage's time is its own."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast (GPUs, CPUs with AMX or AVX512-BF16), else float32.

    Never float16: Z-Image overflows in it.
    """
    fast_cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if device.startswith("cuda") or fast_cpu else torch.float32
