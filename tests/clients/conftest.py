"""Where clients are pointed: at a server on one machine, and at the deployment on Modal's stand-in."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import trustme

from inference.engine import Engine
from tests.conftest import Server, serving
from tests.modal.cloud import Deployed, deployed

KEY = "id:secret-long-enough"  # the README's
PLACES = ["one machine", "modal"]


@dataclass
class Place:
    """url: plain HTTP or, for clients that insist, HTTPS with an authority that is in `ca`."""

    url: str
    http: httpx2.Client
    ca: Path


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def ca(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), engine, keys=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def local_tls(
    tmp_path_factory: pytest.TempPathFactory, engine: Engine, authority: trustme.CA, ca: Path
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tls")
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    files = {"ssl_certfile": folder / "server.pem"}
    trusting = ssl.create_default_context(cafile=ca)
    with (
        serving(folder / "home", engine, keys=KEY, ssl=files) as server,
        httpx2.Client(base_url=server.url, verify=trusting) as server.http,
    ):
        yield server


@pytest.fixture(scope="package")  # its containers end with these tests
def modal_deployment(
    tmp_path_factory: pytest.TempPathFactory, authority: trustme.CA, ca: Path
) -> Iterator[Deployed]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with deployed(
        tmp_path_factory.mktemp("modal"),
        {"zimage-keys": {"ZIMAGE_KEYS": KEY}},
        {"ZIMAGE_WEIGHTS": "demo", "ZIMAGE_WARM_UP": "64x64"},
        {"ZIMAGE_DEVICE": "cpu"},
        context,
    ) as deployment:
        yield deployment


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, ca: Path) -> Place:
    """Over plain HTTP."""
    if request.param == "modal":
        deployment: Deployed = request.getfixturevalue("modal_deployment")
        return Place(deployment.cloud.plain_url, deployment.http, ca)
    server: Server = request.getfixturevalue("local")
    return Place(server.url, server.http, ca)


@pytest.fixture(scope="module", params=PLACES)
def place_tls(request: pytest.FixtureRequest, ca: Path) -> Place:
    if request.param == "modal":
        deployment: Deployed = request.getfixturevalue("modal_deployment")
        return Place(deployment.url, deployment.http, ca)
    server: Server = request.getfixturevalue("local_tls")
    return Place(server.url, server.http, ca)
