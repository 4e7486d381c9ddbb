"""The document lists every endpoint, with examples that its own schemas accept."""

from __future__ import annotations

import re
from typing import Any

from inline_snapshot import snapshot

from schemas.endpoints import ENDPOINTS
from tests.conftest import Server


def test_every_endpoint_is_documented(server: Server) -> None:
    document: dict[str, Any] = server.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for endpoint in ENDPOINTS.values():
        for path in (f"/{endpoint.id}", f"/queue/{endpoint.id}"):
            operation = document["paths"][path]["post"]
            content = operation["requestBody"]["content"]["application/json"]
            assert content["schema"]["$ref"].rsplit("/", 1)[1] in schemas
            assert endpoint.input.model_validate(content["example"])
            assert {"200", "401", "422"} <= set(operation["responses"])


def test_the_page_needs_nobody_else(server: Server) -> None:
    page = server.http.get("/docs").text
    parts = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert "/openapi.json" in page and "https:" not in page
    assert {part.rpartition(".")[2] for part in parts} == {"js", "css", "png"}
    assert [server.http.get(part).status_code for part in parts] == [200] * len(parts)


def test_references_resolve(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                assert node["$ref"].removeprefix("#/components/schemas/") in schemas
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(document)


def test_fields_of_image_to_image(server: Server) -> None:
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    fields = schemas["ImageToImageInput"]["properties"]
    assert {name: field.get("default") for name, field in fields.items()} == snapshot(
        {
            "prompt": None,
            "num_inference_steps": 8,
            "seed": None,
            "sync_mode": False,
            "num_images": 1,
            "enable_safety_checker": True,
            "output_format": "png",
            "acceleration": "regular",
            "enable_prompt_expansion": False,
            "image_size": "auto",
            "image_url": None,
            "strength": 0.6,
        }
    )
    assert all(field.get("description") for field in fields.values())
    assert schemas["ImageToImageInput"]["required"] == ["prompt", "image_url"]


def test_the_documentation_page(server: Server) -> None:
    assert server.http.get("/docs").status_code == 200
