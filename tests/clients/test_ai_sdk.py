"""Vercel's AI SDK with its fal provider, unmodified, in node."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.conftest import KEY
from tests.clients.npm import install, node
from tests.clients.readme import pointing
from tests.conftest import ENDS, Server

PRELUDE = """
import {{ createFal }} from "@ai-sdk/fal";
import {{ generateImage }} from "ai";
const fal = {create};
const model = fal.image("fal-ai/z-image/turbo");
const small = {{ fal: {{ image_size: {{ width: 64, height: 48 }} }} }};
const show = (value) => console.log(JSON.stringify(value));
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("npm"), "ai@7.0.173", "@ai-sdk/fal@3.0.41")


def program(local: Server, text: str, key: str = KEY) -> str:
    (create,) = pointing("AI SDK", local.url)
    return PRELUDE.format(create=create.replace(KEY, key)) + text


def test_generate_image(project: Path, local: Server) -> None:
    output = node(
        project,
        program(
            local,
            """
const { images, providerMetadata } = await generateImage(
  { model, prompt: "a red apple", n: 2, seed: 4, size: "64x48", providerOptions: small });
show([images.length, images[0].mediaType, images[0].uint8Array.length > 100]);
""",
        ),
    )
    assert output == [2, "image/png", True]


def test_a_422_shows_its_detail(project: Path, local: Server) -> None:
    output = node(
        project,
        program(
            local,
            """
try {
  await generateImage({ model, prompt: "x", size: "64x48",
    providerOptions: { fal: { num_inference_steps: 20 } } });
} catch (error) { show([error.statusCode, error.message]); }
""",
        ),
    )
    status, message = output
    assert status == 422 and "num_inference_steps" in message


def test_a_wrong_key(project: Path, local: Server) -> None:
    output = node(
        project,
        program(
            local,
            """
try { await generateImage({ model, prompt: "x", size: "64x48" }); }
catch (error) { show([error.statusCode, error.message]); }
""",
            key="id:not-the-secret-at-all",
        ),
    )
    assert output == [401, "No user found for Key ID and Secret"]


@pytest.mark.parametrize("end", ENDS)
def test_an_end_without_pictures(project: Path, local: Server, end: str) -> None:
    text = """
try { await generateImage({ model, prompt: "x", maxRetries: 0, providerOptions: small }); }
catch (error) { show([error.statusCode, error.message]); }
"""
    with local.ending(end, KEY):
        assert tuple(node(project, program(local, text))) == ENDS[end]
