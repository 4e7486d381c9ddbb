"""Our engine against a bare diffusers script, on demo weights."""

from __future__ import annotations

from functools import partial

from diffusers import ZImageImg2ImgPipeline
from rivals import Rivals
from serving import Row
from timing import alternate

from inference.engine import Engine
from inference.weights import locate


def on_demo_weights(rounds: int = 7) -> list[Row]:
    """Image-to-image at strength 0.6: five forwards."""
    ours = Engine.load("demo", device="cpu")
    rivals = Rivals(ours, (256, 512))
    # A VAE of its own: ours has its channels last, a script's has not.
    dtype = ours.models.transformer.dtype
    rivals.image_to_image = ZImageImg2ImgPipeline.from_pretrained(locate("demo").path, dtype=dtype)
    rivals.image_to_image.set_progress_bar_config(disable=True)
    rows = []
    for side in rivals.photos:
        for name, n, prompt in (
            ("1 picture", 1, "a cat, number {}"),
            ("4 pictures", 4, "a cat, number {}"),
            ("repeated prompt", 1, "the same cat"),
        ):
            medians = alternate(
                {
                    "bare": partial(rivals.bare, side, n, 0.6, prompt),
                    **{
                        level: partial(rivals.ours, side, n, 0.6, level, prompt)
                        for level in ("none", "regular")
                    },
                },
                rounds,
            )
            rows.append(
                {
                    "case": f"{name}, {side}², {str(dtype).removeprefix('torch.')}",
                    "bare diffusers ms": medians["bare"] * 1e3,
                    "none ms": medians["none"] * 1e3,
                    "regular ms": medians["regular"] * 1e3,
                    "none: times faster": medians["bare"] / medians["none"],
                    "regular: times faster": medians["bare"] / medians["regular"],
                }
            )
    ours.close()
    return rows
