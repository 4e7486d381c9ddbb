"""The directory of LoRA files: what goes, what stays, and what happens when it cannot be kept."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from ipaddress import ip_network
from pathlib import Path

import pytest
from safetensors.torch import save

from gateway import loras
from gateway.fetch import Fetcher
from gateway.files import DirectoryFiles
from gateway.loras import LoraStore
from inference.engine import Engine
from schemas.errors import InputError
from tests.gateway.test_endpoints import hub
from tests.inference.lora_files import pairs, weights, written

LOC = ("body", "loras", 0, "path")


@pytest.fixture(scope="module")
def files(engine: Engine) -> list[bytes]:
    changes = pairs(weights(engine.models.transformer), seed=3)
    return [save({k: v + n for k, v in written("kohya", changes).items()}) for n in range(4)]


def path_of(store: LoraStore, data: bytes) -> Path:
    return store._path(hashlib.sha256(data).hexdigest())


async def store_at(directory: Path, **hooks: object) -> tuple[LoraStore, DirectoryFiles]:
    uploads = DirectoryFiles(directory / "files")
    return LoraStore(directory / "loras", Fetcher(), uploads, **hooks), uploads  # type: ignore[arg-type]


async def uploaded(uploads: DirectoryFiles, data: bytes) -> str:
    return f"http://localhost/files/{await uploads.put(data, 'bin', 1000)}"


def test_a_full_directory_loses_what_was_used_longest_ago(
    tmp_path: Path, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        store, uploads = await store_at(tmp_path)
        monkeypatch.setattr(loras, "DIRECTORY_BYTES", 2 * len(files[0]) + 10)
        urls = [await uploaded(uploads, data) for data in files]
        for url in urls[:2]:
            await store(url, LOC)
        (tmp_path / "loras" / "mine.safetensors").write_bytes(files[3])
        half = tmp_path / "loras" / "half.part"
        half.write_bytes(b"left by a killed process")
        for age, path in (
            (9000, half),
            (8000, path_of(store, files[0])),
            (7000, path_of(store, files[1])),
        ):
            os.utime(path, (time.time() - age,) * 2)
        await store(urls[0], LOC)  # used again
        await store(urls[2], LOC)
        assert not path_of(store, files[1]).exists() and not half.exists()
        assert path_of(store, files[0]).exists() and path_of(store, files[2]).exists()
        assert (tmp_path / "loras" / "mine.safetensors").exists()  # somebody's own
        await store(urls[1], LOC)  # comes again; the others may be waited for
        assert all(path_of(store, data).exists() for data in files[:3])

    asyncio.run(go())


def test_a_file_that_could_not_be_made_durable_is_not_believed_in(
    tmp_path: Path, files: list[bytes]
) -> None:
    saves: list[str] = []

    async def saved() -> None:
        saves.append("tried")
        if len(saves) == 1:
            raise ConnectionError("the Volume is away")

    async def go() -> None:
        store, uploads = await store_at(tmp_path, saved=saved)
        url = await uploaded(uploads, files[0])
        with pytest.raises(ConnectionError):
            await store(url, LOC)
        await store(url, LOC)
        await store(url, LOC)
        assert len(saves) == 2

    asyncio.run(go())


def test_many_at_once_fetch_one_file_once(tmp_path: Path, files: list[bytes]) -> None:
    saves: list[str] = []

    async def saved() -> None:
        saves.append("once")
        await asyncio.sleep(0.05)

    async def go() -> None:
        store, uploads = await store_at(tmp_path, saved=saved)
        url = await uploaded(uploads, files[0])
        digests = await asyncio.gather(*(store(url, LOC) for _ in range(8)))
        assert len(set(digests)) == 1 and len(saves) == 1

    asyncio.run(go())


def test_a_name_that_appears_later_is_found(tmp_path: Path, files: list[bytes]) -> None:
    async def refresh() -> None:
        (tmp_path / "loras" / "late.safetensors").write_bytes(files[0])

    async def go() -> None:
        store, _ = await store_at(tmp_path, refresh=refresh)
        assert await store("late", LOC) == hashlib.sha256(files[0]).hexdigest()

    asyncio.run(go())


def test_the_hubs_token_is_shown_to_the_hub_alone(
    tmp_path: Path, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to the storage that the hub redirects to, nor to a URL that somebody wrote."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_operator\n")
    with hub() as (url, site), hub() as (storage, elsewhere):
        monkeypatch.setenv("HF_ENDPOINT", url)
        site.files["/api/models/me/private"] = b'{"siblings": [{"rfilename":"a.safetensors"}]}'
        site.moved |= {
            "/me/private/resolve/main/a.safetensors": "/cache/a",
            "/cache/a": f"{storage}/signed",
        }
        elsewhere.files |= {"/signed": files[0], "/other": files[1]}

        async def go() -> None:
            fetcher = Fetcher([ip_network("127.0.0.0/8")])
            store = LoraStore(tmp_path / "loras", fetcher, DirectoryFiles(tmp_path / "files"))
            assert await store("me/private", LOC) == hashlib.sha256(files[0]).hexdigest()
            await store(f"{storage}/other", LOC)
            await fetcher.close()

        asyncio.run(go())
    assert site.shown == ["Bearer hf_of_the_operator"] * 3
    assert elsewhere.asked == ["/signed", "/other"] and elsewhere.shown == [None, None]


def test_a_token_that_is_none_is_not_used_nor_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two lines pasted into a secret, say."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\nhf_other")
    with hub() as (url, site):
        monkeypatch.setenv("HF_ENDPOINT", url)

        async def go() -> None:
            fetcher = Fetcher([ip_network("127.0.0.0/8")])
            store = LoraStore(tmp_path / "loras", fetcher, DirectoryFiles(tmp_path / "files"))
            with pytest.raises(InputError):
                await store("me/private", LOC)
            await fetcher.close()

        asyncio.run(go())
    assert site.shown == [None]
    assert "HF_TOKEN" in caplog.text and "hf_secret" not in caplog.text
