"""`modal deploy modal_app.py` with the real client: what it asks the control plane for."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from modal_proto import api_pb2 as api

from tests.conftest import ROOT
from tests.modal.cloud import deploy
from tests.modal.control_plane import Plane, control_plane


def deployment(home: Path, **settings: str) -> tuple[subprocess.CompletedProcess[str], Plane]:
    with control_plane() as (plane, url):
        return deploy(home, url, **settings), plane


SECRETS = {"ZIMAGE_KEYS": "alice:never-deployed-key", "ZIMAGE_WEBHOOK_KEY": "5ec7e70000abcdef" * 4}


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    done, plane = deployment(tmp_path_factory.mktemp("home"), **SECRETS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert plane.published
    yield plane


def gpu_class(plane: Plane) -> list[api.Function]:
    """The GPU class, once for every GPU type in order of preference."""
    data = plane.functions["Generator.*"]
    assert isinstance(data, api.FunctionData)
    return [ranked.function for ranked in sorted(data.ranked_functions, key=lambda r: r.rank)]


def image_of(plane: Plane, function: Any) -> str:
    """All build commands of a function's image."""
    commands: list[str] = []
    pending = [function.image_id]
    while pending:
        image = plane.images[pending.pop()]
        commands.extend(image.dockerfile_commands)
        pending.extend(base.image_id for base in image.base_images)
    return "\n".join(commands)


def test_what_is_deployed(plane: Plane) -> None:
    assert set(plane.functions) == {
        "Generator.*",
        "job",
        "webhook",
        "gateway",
        "housekeeping",
        "report",
        "fetch_weights",
    }
    assert len(plane.classes) == 1
    assert set(plane.volumes) == {"zimage-weights", "zimage-cache", "zimage-loras"}
    assert plane.secrets == {"zimage-keys": ["ZIMAGE_KEYS"]}


def test_the_gpu_class(plane: Plane) -> None:
    ranked = gpu_class(plane)
    types = [function.resources.gpu_config.gpu_type for function in ranked]
    assert types == ["H100", "H200", "A100-80GB"]
    for function in ranked:
        assert function.max_concurrent_inputs == 4
        assert function.timeout_secs == 2400 and function.startup_timeout_secs == 1200
        assert function.retry_policy.retries == 2
        assert {m.mount_path: m.volume_id for m in function.volume_mounts} == {
            "/weights": "vo-zimage-weights",
            "/cache": "vo-zimage-cache",
            "/loras": "vo-zimage-loras",
        }
        scaler = function.autoscaler_settings
        assert (scaler.min_containers, scaler.max_containers) == (0, 10)
        assert (scaler.buffer_containers, scaler.scaledown_window) == (0, 60)
        assert function.checkpointing_enabled  # snapshot mode cpu
        assert "enable_gpu_snapshot" not in function.experimental_options
        assert set(function.method_definitions) == {"generate"}
        assert not function.secret_ids


def test_the_gateway(plane: Plane) -> None:
    gateway = plane.functions["gateway"]
    assert gateway.webhook_config.type == api.WEBHOOK_TYPE_ASGI_APP
    assert gateway.webhook_config.requested_suffix == "zimage"
    assert not gateway.webhook_config.requires_proxy_auth
    assert isinstance(gateway, api.Function)
    assert gateway.max_concurrent_inputs == 200
    assert gateway.timeout_secs == 24 * 3600  # Modal's own 300 s would end streams
    assert len(gateway.secret_ids) == 1
    assert not gateway.resources.gpu_config.gpu_type


def test_the_job(plane: Plane) -> None:
    job = plane.functions["job"]
    assert isinstance(job, api.Function)
    assert not job.resources.gpu_config.gpu_type and not job.secret_ids
    assert job.retry_policy.retries == 2 and job.timeout_secs == 24 * 3600
    assert job.max_concurrent_inputs == 16


def test_the_cron(plane: Plane) -> None:
    housekeeping = plane.functions["housekeeping"]
    assert isinstance(housekeeping, api.Function)
    assert housekeeping.schedule.cron.cron_string == "*/10 * * * *"


def test_images(plane: Plane) -> None:
    for name in ("gateway", "job", "webhook", "housekeeping"):
        commands = image_of(plane, plane.functions[name])
        assert "fastapi==" in commands and "torch" not in commands
    gpu = image_of(plane, gpu_class(plane)[0])
    assert "torch==2.13.0" in gpu and "diffusers==0.42.1" in gpu
    assert "fastapi" not in gpu


def test_versions_are_those_of_the_tests(plane: Plane) -> None:
    """What runs on Modal is what is tested here."""
    constraints = dict(
        line.replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().split()
    )
    pinned: dict[str, str] = {}
    for name in ("gateway", "fetch_weights"):
        commands = image_of(plane, plane.functions[name]).replace("'", " ").split()
        pinned.update(word.split("==") for word in commands if "==" in word)
    assert "torch" in pinned and "fastapi" in pinned
    assert {name: constraints[name] for name in pinned} == pinned


def test_keys_are_in_no_image(plane: Plane) -> None:
    for secret in SECRETS.values():
        assert not any(secret in str(image) for image in plane.images.values())
        assert not any(secret in str(function) for function in plane.functions.values())


def test_the_hubs_token_goes_where_it_is_needed(tmp_path: Path) -> None:
    done, plane = deployment(tmp_path, ZIMAGE_HUB_SECRET="huggingface-secret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert plane.secrets["huggingface-secret"] == ["HF_TOKEN"]
    functions = {**plane.functions, "Generator.*": gpu_class(plane)[0]}
    holders = {
        name
        for name, function in functions.items()
        if "huggingface-secret" in [plane.secret_names[each] for each in function.secret_ids]
    }
    assert holders == {"job", "fetch_weights"}


@pytest.mark.parametrize(
    ("mode", "snapshot", "gpu_snapshot"),
    [("gpu", True, True), ("off", False, False)],
)
def test_snapshot_modes_and_settings(
    mode: str, snapshot: bool, gpu_snapshot: bool, tmp_path: Path
) -> None:
    done, plane = deployment(
        tmp_path,
        ZIMAGE_SNAPSHOT=mode,
        ZIMAGE_SNAPSHOT_KEY="second",
        ZIMAGE_GPU="L40S, A10",
        ZIMAGE_MIN_CONTAINERS="1",
        ZIMAGE_BUFFER_CONTAINERS="2",
        ZIMAGE_MAX_CONTAINERS="7",
        ZIMAGE_SCALEDOWN_WINDOW="30",
        ZIMAGE_WEIGHTS="Tongyi-MAI/Z-Image-Turbo@abc",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranked = gpu_class(plane)
    assert [f.resources.gpu_config.gpu_type for f in ranked] == ["L40S", "A10"]
    # Modal takes a snapshot of an image; another one, another snapshot.
    assert "ZIMAGE_SNAPSHOT_KEY=second" in image_of(plane, ranked[0])
    for function in ranked:
        assert function.checkpointing_enabled is snapshot
        assert ("enable_gpu_snapshot" in function.experimental_options) is gpu_snapshot
        scaler = function.autoscaler_settings
        assert (scaler.min_containers, scaler.max_containers) == (1, 7)
        assert (scaler.buffer_containers, scaler.scaledown_window) == (2, 30)
    for name in ("gateway", "fetch_weights"):
        assert "Z-Image-Turbo@abc" in image_of(plane, plane.functions[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ZIMAGE_SNAPSHOT": "warm"}, "ZIMAGE_SNAPSHOT: Input should be 'gpu', 'cpu' or 'off'"),
        (
            {"ZIMAGE_MAX_CONTAINERS": "many"},
            "ZIMAGE_MAX_CONTAINERS: Input should be a valid integer",
        ),
        ({"ZIMAGE_WARM_UP": "big"}, "ZIMAGE_WARM_UP: String should match"),
    ],
)
def test_a_wrong_setting_stops_the_deploy(
    settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    done, plane = deployment(tmp_path, **settings)
    assert done.returncode != 0 and not plane.published
    assert message in " ".join((done.stdout + done.stderr).replace("│", "").split())
