"""The demo weights' autoencoder: its model, its diet and its loss.

A network of this size, started at random and trained for an hour, draws sharp shapes in wrong
colours: group normalisation hides the absolute level that flat colour is. So it starts as a linear
code instead, the principal components of 8×8 patches, written into the convolutions of diffusers'
own class (`start_linear`); training then only has to add the detail.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from demo_data import COLOURS, compose
from diffusers import AutoencoderKL

LATENTS, GROUPS = 16, 4
LEVEL = 4.0
"""Size of the constant channels that keep a normalisation's scale the same for every picture."""


def autoencoder_model(patches: torch.Tensor) -> AutoencoderKL:
    """3.1 M parameters; factor 8 and 16 latent channels, as Z-Image's own.

    patches: (n, 3, 8, 8), −1…1, from which the code it starts with is computed.
    """
    model = AutoencoderKL(
        block_out_channels=(16, 48, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=GROUPS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    start_linear(model, patches)
    return model


@torch.no_grad()
def start_linear(model: AutoencoderKL, patches: torch.Tensor) -> None:
    """Make `encode` the first principal components of every 8×8 patch, and `decode` the patches'
    mean colours, smoothly enlarged; every residual branch starts at zero.
    """
    mean, basis, scale = principal_components(patches)
    for module in model.modules():
        if type(module).__name__ == "ResnetBlock2D":
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    _start_encoder(model.encoder, mean, basis / scale[:, None, None, None])
    _start_decoder(model.decoder, mean, basis * scale[:, None, None, None])


def principal_components(
    patches: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of patches (n, 3, 8, 8): their mean (3, 8, 8), basis (16, 3, 8, 8) and deviations (16,)."""
    flat = patches.flatten(1)
    mean = flat.mean(dim=0)
    _, values, vectors = torch.linalg.svd(flat - mean, full_matrices=False)
    basis = vectors[:LATENTS].view(LATENTS, *patches.shape[1:])
    return mean.view(patches.shape[1:]), basis, values[:LATENTS] / len(flat) ** 0.5


def _start_encoder(encoder: Any, mean: torch.Tensor, analysis: torch.Tensor) -> None:
    """Three strided convolutions unfold a patch, the third projects it; the rest carries on."""
    first, second, third, last = encoder.down_blocks
    _clear(encoder.conv_in, 3)
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    channels = 3
    for block in (first, second):
        if block is second:
            _carry(block.resnets[0].conv_shortcut, channels)
        unfold = block.downsamplers[0].conv
        _clear(unfold, 4 * channels)
        for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            rows = torch.arange(channels) + (2 * y + x) * channels
            unfold.weight[rows, torch.arange(channels), y, x] = 1
        channels *= 4
    _carry(third.resnets[0].conv_shortcut, channels)
    project = third.downsamplers[0].conv
    _clear(project, LATENTS)
    # Channels of the second unfolding are (y₂, x₂, y₁, x₁, colour), the third's taps (y₃, x₃).
    kernel = analysis.view(LATENTS, 3, 2, 2, 2, 2, 2, 2)  # colour, y₃ y₂ y₁, x₃ x₂ x₁
    kernel = kernel.permute(0, 3, 6, 4, 7, 1, 2, 5).reshape(LATENTS, channels, 2, 2)
    project.weight[:LATENTS, :channels, :2, :2] = kernel
    project.bias[:LATENTS] = -(analysis * mean).sum(dim=(1, 2, 3))
    _pass_normalisation(last.resnets[0].conv_shortcut, encoder.conv_out, LATENTS)
    # A posterior that is narrow from the start: noise of size 1 hides colours.
    encoder.conv_out.bias[LATENTS:] = -6


def _start_decoder(decoder: Any, mean: torch.Tensor, synthesis: torch.Tensor) -> None:
    """Mean colours go straight through, smoothed at each enlargement; the components beside them."""
    _clear(decoder.conv_in, 3 + LATENTS)
    decoder.conv_in.weight[:3, :, 1, 1] = synthesis.mean(dim=(2, 3)).T
    decoder.conv_in.bias[:3] = mean.mean(dim=(1, 2))
    decoder.conv_in.weight[3 : 3 + LATENTS, :, 1, 1] = torch.eye(LATENTS)
    smooth = torch.tensor([0.25, 0.5, 0.25])
    for block in decoder.up_blocks[:3]:
        if block.resnets[0].conv_shortcut is not None:
            _carry(block.resnets[0].conv_shortcut, 3 + LATENTS)
        enlarge = block.upsamplers[0].conv
        _clear(enlarge, 3 + LATENTS)
        for k in range(3 + LATENTS):
            enlarge.weight[k, k] = smooth[:, None] * smooth
    _pass_normalisation(decoder.up_blocks[3].resnets[0].conv_shortcut, decoder.conv_out, 3)


def _clear(conv: Any, outputs: int) -> None:
    """Zero the first output channels; the others keep their random start."""
    conv.weight[:outputs] = 0
    conv.bias[:outputs] = 0


def _carry(conv: Any, channels: int) -> None:
    _clear(conv, channels)
    conv.weight[:channels, :channels, 0, 0] = torch.eye(channels)


def _pass_normalisation(before: Any, after: Any, values: int) -> None:
    """Carry the first `values` inputs of `before` linearly through normalisation and SiLU to the
    first outputs of `after`.

    Each travels as +v and −v, since silu(v) − silu(−v) = v, beside two constants ±LEVEL, which fix
    the scale of its group whatever the picture.
    """
    width = before.weight.shape[0] // GROUPS
    deviation = LEVEL * (2 * (values / GROUPS) / width) ** 0.5
    _clear(after, after.weight.shape[0])
    for k in range(values):
        base = k % GROUPS * width + k // GROUPS * 4
        before.weight[base : base + 4] = 0
        before.weight[base, k, 0, 0], before.weight[base + 1, k, 0, 0] = 1, -1
        before.bias[base : base + 4] = torch.tensor([0, 0, LEVEL, -LEVEL])
        after.weight[k, base, 1, 1], after.weight[k, base + 1, 1, 1] = deviation, -deviation


def autoencoder_pictures(
    pictures: torch.Tensor, photographs: list[torch.Tensor], batch: int, side: int
) -> Iterator[torch.Tensor]:
    """Endless batches (batch, 3, side, side), 0…1: three quarters subjects in shifted colours on any
    background, one quarter crops of photographs."""
    while True:
        n = batch * 3 // 4
        rgba = pictures[torch.randint(len(pictures), (n,))].float() / 255
        swap = torch.stack([torch.randperm(3) for _ in range(n)])
        recoloured = torch.gather(
            rgba[:, :3], 1, swap[:, :, None, None].expand(-1, -1, *rgba.shape[2:])
        )
        mix = (torch.rand(n) < 0.5)[:, None, None, None]
        rgba = torch.cat((torch.where(mix, recoloured, rgba[:, :3]), rgba[:, 3:]), dim=1)
        named = torch.tensor(random.choices(list(COLOURS.values()), k=n))
        colour = torch.where((torch.rand(n) < 0.5)[:, None], named, torch.rand(n, 3))
        scale = torch.empty(n).uniform_(0.4, 1.3)
        scenes = compose(rgba, colour, scale, torch.rand(n, 2), side)
        crops = [_crop(random.choice(photographs), side) for _ in range(batch - n)]
        yield torch.cat((scenes, torch.stack(crops)))


def _crop(photograph: torch.Tensor, side: int) -> torch.Tensor:
    height, width = photograph.shape[1:]
    taken = random.randint(side, min(height, width))
    top, left = random.randint(0, height - taken), random.randint(0, width - taken)
    crop = photograph[None, :, top : top + taken, left : left + taken]
    crop = F.interpolate(crop, (side, side), mode="area")[0]
    if random.random() < 0.5:
        crop = crop.flip(2)
    return crop[torch.randperm(3)] if random.random() < 0.2 else crop


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1, its gradients (edges stay sharp), and L1 of 8×8 means (flat colours stay right)."""
    loss = F.l1_loss(output, target)
    for axis in (2, 3):
        loss = loss + 0.5 * F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss + F.l1_loss(F.avg_pool2d(output, 8), F.avg_pool2d(target, 8))


def sample_patches(pictures: torch.Tensor, photographs: list[torch.Tensor]) -> torch.Tensor:
    """Patches (n, 3, 8, 8), −1…1, from the diet, for `autoencoder_model`."""
    batches = autoencoder_pictures(pictures, photographs, 64, 128)
    patches = next(batches).unfold(2, 8, 8).unfold(3, 8, 8)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2) * 2 - 1
