"""`zimage serve`: the API on this machine."""

from __future__ import annotations

import logging
import socket
import ssl
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from gateway.commands.engine import platform_and_engine
from gateway.commands.terminal import console, fail, read_settings


def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind.")] = 8000,
    home: Annotated[Path | None, typer.Option(help="State directory (ZIMAGE_HOME).")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Private key, PEM.")
    ] = None,
) -> None:
    """Serve the fal API from this machine until stopped; restart to continue where it was."""
    import uvicorn

    from gateway.app import create_app
    from gateway.auth import keys_for
    from gateway.schedules import ScheduleError, check_keys, keep, load, saving_below

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    settings = read_settings(home=home)
    try:
        keys = keys_for(settings, default="off" if _is_loopback(host) else "on")
    except ValueError as error:
        fail(str(error))
    _check_certificate(tls_cert, tls_key)
    try:
        schedules = load(settings.schedules) if settings.schedules else []
        check_keys(schedules, keys)
    except ScheduleError as error:
        fail(str(error))
    listener = _bind(host, port)
    with platform_and_engine(settings, context.obj) as (platform, engine):
        shown = f"[{host}]" if ":" in host else host
        url = f"{'https' if tls_cert else 'http'}://{shown}:{listener.getsockname()[1]}"
        console.print(
            f"zimage on {url} · documentation {url}/docs\n"
            f"weights {engine.weights} · "
            f"keys {'off' if keys is None else 'on'} · home {settings.home}"
            + "\nsmall demo weights: ask for 256×256, they know no other size"
            * (settings.weights == "demo"),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        scheduled = None
        if settings.schedules:
            save = saving_below(settings.schedules.parent)
            scheduled = keep(platform, schedules, settings.public_url or url, save)
        config = uvicorn.Config(
            create_app(settings, platform, keys, scheduled),
            ssl_certfile=tls_cert,
            ssl_keyfile=tls_key,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=10,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _check_certificate(chain: Path | None, key: Path | None) -> None:
    """Before a server is started that could not answer anybody."""
    if chain is None and key is None:
        return
    if chain is None or key is None:
        fail("--tls-cert and --tls-key belong together")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key)
    except ssl.SSLError as error:
        fail(
            f"--tls-cert {chain} and --tls-key {key} are no certificate with its key: {error.reason}"
        )


def _bind(host: str, port: int) -> socket.socket:
    """Take the port, without listening yet: until the weights are there, connections are refused."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        fail(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port")
    return bound


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
