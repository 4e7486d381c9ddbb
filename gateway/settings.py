"""Settings, read from the environment with the prefix ZIMAGE_. One place, listed by `zimage serve --help`."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gateway.addresses import Network
from schemas.task import Acceleration

HOUR = 3600.0


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="ZIMAGE_")

    home: Path = Field(Path("~/.zimage"), description="State directory: jobs, outputs.")
    weights: str = Field(
        "demo", description="`demo`, a directory in diffusers layout, or a hub id[@revision]."
    )
    device: str | None = Field(
        None, description="Torch device; the first GPU if there is one, otherwise cpu."
    )
    acceleration_default: Acceleration = Field(
        "regular", description="Used when a request does not say: none, regular or high."
    )
    auth: Literal["on", "off"] | None = Field(
        None, description="Require keys; off by default on a loopback bind, on otherwise."
    )
    keys: SecretStr = Field(
        SecretStr(""), description="Accepted keys, `id:secret`, comma-separated."
    )
    fetch_allow: Annotated[tuple[Network, ...], NoDecode] = Field(
        (),
        description="CIDRs the fetcher may also reach, on any port, comma-separated: "
        "for tests and private networks.",
    )
    safety_threshold: float = Field(
        0.8, gt=0, le=1, description="Score from which a picture is flagged and blackened."
    )
    public_url: str | None = Field(
        None, description="Origin in returned URLs; by default taken from each request."
    )
    retention: float = Field(
        24 * HOUR, gt=0, description="Seconds that finished requests and their files are kept."
    )

    @field_validator("fetch_allow", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(ip_network(part.strip()) for part in value.split(",") if part.strip())
        return value

    @field_validator("home")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser()

    @field_validator("public_url")
    @classmethod
    def _origin(cls, value: str | None) -> str | None:
        return value.rstrip("/") if value else value


def describe() -> str:
    """All settings as text, for `--help` and the README."""
    lines = ["Settings from the environment:"]
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = "" if default in (None, ()) or isinstance(default, SecretStr) else f" [{default}]"
        lines.append(f"- `ZIMAGE_{name.upper()}`{shown}: {field.description}")
    return "\n\n".join(lines)
