"""Z-Image's forward without what a request needs only once: the same arithmetic, fewer operations.

Computed once a request: the caption's embedding and refinement, rotary tables, and the modulation of
every layer at every step. Query, key and value are one matrix product, so are both inputs of the gate;
a final projection is made of picture tokens only. The weights are the transformer's own: fused
matrices take the place of their parts, whose parameters become views into them.

Differs from `inference.velocity.reference` by rounding only: normalised values are multiplied by their
weight before they are rounded, not after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from inference import float8
from inference.attention import Kernel, attend
from inference.float8 import Float8Weight
from inference.velocity import Velocity, times

logger = logging.getLogger(__name__)

PATCH = 2
MULTIPLE = 32
"""Captions and pictures are padded to multiples of this many tokens, with learned tokens."""

Weight = torch.Tensor | Float8Weight


class Block(NamedTuple):
    """Weights of one transformer block. D model width, H heads, d = D/H, F feed-forward width."""

    qkv: Weight  # (3·D, D)
    qk_norm: torch.Tensor  # (2, 1, d)
    out: Weight  # (D, D)
    norms: tuple[torch.Tensor, ...]  # before and after attention, before and after feed-forward
    gate_up: Weight  # (2·F, D)
    down: Weight  # (D, F)
    eps: float


class Rope(NamedTuple):
    """Rotary embedding of each token: cos and sin, (tokens, 1, 1, d/2), float32."""

    cos: torch.Tensor
    sin: torch.Tensor


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return float8.linear(x, weight) if isinstance(weight, Float8Weight) else F.linear(x, weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Turn each neighbouring pair of the last dimension by its token's angle. float32."""
    even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    pairs = (even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos)
    return torch.stack(pairs, dim=-1).flatten(-2)


def run_block(
    block: Block, x: torch.Tensor, rope: Rope, modulation: torch.Tensor | None, attention: Kernel
) -> torch.Tensor:
    """x (tokens, D); modulation (4, D): scale and gate of attention, scale and gate of feed-forward."""
    tokens, width = x.shape
    heads = width // block.qk_norm.shape[-1]

    h = rms_norm(x, block.norms[0], block.eps)
    if modulation is not None:
        h = h * modulation[0]
    qkv = linear(h, block.qkv).view(tokens, 3, heads, -1)
    # diffusers' Attention normalises queries and keys with an epsilon of its own.
    qk = F.rms_norm(qkv[:, :2].float(), qkv.shape[-1:], eps=1e-5) * block.qk_norm
    q, k = rotate(qk, rope).to(x.dtype).transpose(0, 2).unbind(1)
    v = qkv[:, 2].transpose(0, 1)
    h = attend(q, k, v, attention).transpose(0, 1).reshape(tokens, width)
    h = linear(h, block.out)
    h = rms_norm(h, block.norms[1], block.eps)
    x = x + (h if modulation is None else h * modulation[1])

    h = rms_norm(x, block.norms[2], block.eps)
    if modulation is not None:
        h = h * modulation[2]
    gate, up = linear(h, block.gate_up).chunk(2, dim=-1)
    h = rms_norm(linear(F.silu(gate) * up, block.down), block.norms[3], block.eps)
    return x + (h if modulation is None else h * modulation[3])


RunBlock = Callable[[Block, torch.Tensor, Rope, torch.Tensor | None, Kernel], torch.Tensor]


def fuse(parts: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """One matrix of several below each other; the parts become views into it."""
    whole = torch.cat([part.data for part in parts])
    sizes = [len(part) for part in parts]
    for part, view in zip(parts, torch.split(whole, sizes), strict=True):
        part.data = view
    return whole


def block_of(module: Any) -> Block:
    attention, feed_forward = module.attention, module.feed_forward
    qkv = fuse([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
    return Block(
        qkv=qkv,
        qk_norm=fuse([attention.norm_q.weight, attention.norm_k.weight]).view(2, 1, -1),
        out=attention.to_out[0].weight.data,
        norms=tuple(
            norm.weight.data
            for norm in (
                module.attention_norm1,
                module.attention_norm2,
                module.ffn_norm1,
                module.ffn_norm2,
            )
        ),
        gate_up=fuse([feed_forward.w1.weight, feed_forward.w3.weight]),
        down=feed_forward.w2.weight.data,
        eps=module.attention_norm1.eps,
    )


def in_float8(block: Block) -> Block:
    """The block's matrices quantised; norms stay as they are."""
    matrices = (block.qkv, block.out, block.gate_up, block.down)
    qkv, out, gate_up, down = (
        float8.quantize_weight(matrix) for matrix in matrices if isinstance(matrix, torch.Tensor)
    )
    return block._replace(qkv=qkv, out=out, gate_up=gate_up, down=down)


class LeanTransformer:
    """Prepares velocities from a ZImageTransformer2DModel's weights.

    Build it when the model is where it stays: moving the model undoes the fused matrices. Weights may
    be changed in place; call `requantize` then. Not safe for concurrent use.
    """

    # Not in inference mode: these tensors become the model's, to be moved and written outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, transformer: Any, *, compiled: bool = False) -> None:
        self.model = transformer
        self.noise_refiner = [block_of(block) for block in transformer.noise_refiner]
        self.context_refiner = [block_of(block) for block in transformer.context_refiner]
        self.layers = [block_of(block) for block in transformer.layers]
        self._float8: list[Block] = []
        self._run: RunBlock = run_block
        self.compiled = compiled
        if compiled:
            self._graph = torch.compile(run_block, fullgraph=True)
            self._run = self._run_graph

    def requantize(self) -> None:
        """Forget the 8-bit copies of the weights: they have changed."""
        self._float8 = []

    def velocity(
        self,
        prompt_embeds: torch.Tensor,
        sigmas: torch.Tensor,
        height: int,
        width: int,
        *,
        in_8_bits: bool = False,
        attention: Kernel = "torch",
    ) -> Velocity:
        """prompt_embeds (tokens, width); sigmas (n + 1,); height and width of latents, even.

        The first and the last layer stay as they are when the others have 8 bits.
        """
        if in_8_bits and not self._float8:
            self._float8 = [in_float8(block) for block in self.layers[1:-1]]
        layers = self.layers
        if in_8_bits:
            layers = [self.layers[0], *self._float8, self.layers[-1]]
        caption = self._caption(prompt_embeds, attention)
        return self._request(layers, caption, sigmas, height // PATCH, width // PATCH, attention)

    def _request(
        self,
        layers: list[Block],
        caption: torch.Tensor,
        sigmas: torch.Tensor,
        h: int,
        w: int,
        attention: Kernel,
    ) -> Velocity:
        model = self.model
        tokens = h * w
        padding = -tokens % MULTIPLE
        rope = self._rope(self._positions(len(caption) + 1, h, w, padding, caption.device))
        caption_rope = self._caption_rope(len(caption), caption.device)
        joint_rope = Rope(*(torch.cat(pair) for pair in zip(rope, caption_rope, strict=True)))

        time_embeds = model.t_embedder(times(sigmas[:-1]) * model.t_scale).to(caption.dtype)
        refiner_modulations = [modulations(block, time_embeds) for block in model.noise_refiner]
        layer_modulations = [modulations(block, time_embeds) for block in model.layers]
        final = model.all_final_layer[f"{PATCH}-1"]
        final_scales = 1.0 + final.adaLN_modulation(time_embeds)
        pad_tokens = model.x_pad_token.expand(padding, -1)
        embed = model.all_x_embedder[f"{PATCH}-1"]

        def velocity(latents: torch.Tensor, i: int) -> torch.Tensor:
            patches = latents.to(caption.dtype).view(-1, h, PATCH, w, PATCH)
            x = embed(patches.permute(1, 3, 2, 4, 0).reshape(tokens, -1))
            x = torch.cat([x, pad_tokens]) if padding else x
            self._mark_dynamic(x, *rope)
            for block, modulation in zip(self.noise_refiner, refiner_modulations, strict=True):
                x = self._run(block, x, rope, modulation[i], attention)
            x = torch.cat([x, caption])
            self._mark_dynamic(x, *joint_rope)
            for block, modulation in zip(layers, layer_modulations, strict=True):
                x = self._run(block, x, joint_rope, modulation[i], attention)
            x = final.linear(final.norm_final(x[:tokens]) * final_scales[i])
            x = x.view(h, w, PATCH, PATCH, -1).permute(4, 0, 2, 1, 3)
            noise_pred: torch.Tensor = -x.reshape(-1, h * PATCH, w * PATCH).float()
            return noise_pred

        return velocity

    def _caption(self, prompt_embeds: torch.Tensor, attention: Kernel) -> torch.Tensor:
        """Refined caption tokens, padded: (tokens, D)."""
        length = len(prompt_embeds)
        caption: torch.Tensor = self.model.cap_embedder(prompt_embeds)
        padding = -length % MULTIPLE
        caption = torch.cat([caption, self.model.cap_pad_token.expand(padding, -1)])
        rope = self._caption_rope(len(caption), caption.device)
        for block in self.context_refiner:  # once a request: not worth a graph of its own
            caption = run_block(block, caption, rope, None, attention)
        return caption

    def _caption_rope(self, length: int, device: torch.device) -> Rope:
        positions = torch.zeros(length, 3, dtype=torch.int32, device=device)
        positions[:, 0] = torch.arange(1, length + 1)
        return self._rope(positions)

    def _rope(self, positions: torch.Tensor) -> Rope:
        """positions (tokens, 3): caption or picture, row, column."""
        angles = self.model.rope_embedder(positions)[:, None, None]
        return Rope(angles.real.contiguous(), angles.imag.contiguous())

    @staticmethod
    def _positions(first: int, h: int, w: int, padding: int, device: torch.device) -> torch.Tensor:
        """Of picture tokens; those of the padding are zero."""
        positions = torch.zeros(h * w + padding, 3, dtype=torch.int32, device=device)
        rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
        positions[: h * w, 0] = first
        positions[: h * w, 1:] = torch.cartesian_prod(rows, columns)
        return positions

    def _run_graph(
        self,
        block: Block,
        x: torch.Tensor,
        rope: Rope,
        modulation: torch.Tensor | None,
        attention: Kernel,
    ) -> torch.Tensor:
        try:
            return self._graph(block, x, rope, modulation, attention)
        except torch._dynamo.exc.TorchDynamoException:
            logger.exception("blocks cannot be compiled here: they run as they are")
            self._run, self.compiled = run_block, False
            return run_block(block, x, rope, modulation, attention)

    def _mark_dynamic(self, *tensors: torch.Tensor) -> None:
        """One graph for all sizes and prompts: the number of tokens is not a constant of it."""
        if self.compiled:
            for tensor in tensors:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)


def modulations(block: Any, time_embeds: torch.Tensor) -> torch.Tensor:
    """What `run_block` wants of a diffusers block, for every step: (n, 4, D)."""
    scale_1, gate_1, scale_2, gate_2 = block.adaLN_modulation(time_embeds).chunk(4, dim=1)
    return torch.stack([1 + scale_1, gate_1.tanh(), 1 + scale_2, gate_2.tanh()], dim=1)
