"""Settings, read from the environment with the prefix ZIMAGE_. One place, listed by `zimage serve --help`."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator
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
    base_weights: str | None = Field(
        None,
        description="Weights of the `base` endpoints; without them those answer 404. `demo` has its own.",
    )
    device: str | None = Field(
        None, description="Torch device; the first GPU if there is one, otherwise cpu."
    )
    acceleration_default: Acceleration = Field(
        "regular", description="Used when a request does not say: none, regular or high."
    )
    auth: Literal["on", "off"] | None = Field(
        None,
        description="Require keys; by default off on a loopback bind without any, on otherwise.",
    )
    keys: SecretStr = Field(
        SecretStr(""),
        description="Accepted keys, `id:secret`, comma-separated; secrets of 16 characters or more.",
    )
    webhook_key: SecretStr = Field(
        SecretStr(""),
        description="On Modal only: the key that signs webhooks, 64 hexadecimal digits; several, "
        "comma-separated, are all published, and the first signs.",
    )
    fetch_allow: Annotated[tuple[Network, ...], NoDecode] = Field(
        (),
        description="CIDRs that input pictures may also come from and webhooks go to, on any port, "
        "comma-separated: for tests and private networks.",
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
    schedules: Path | None = Field(
        None, description="TOML file of schedules, which `zimage serve` and a deployment run."
    )
    loras: Path | None = Field(
        None,
        description="Directory of LoRA files, yours by name and others as they come; by default "
        "`loras` in ZIMAGE_HOME.",
    )
    upload_max: int = Field(
        256 * 1024 * 1024, gt=0, description="Bytes that one uploaded file may have."
    )

    @property
    def lora_directory(self) -> Path:
        return self.loras or self.home / "loras"

    @property
    def variants(self) -> dict[str, str]:
        """What is served, and its weights."""
        base = self.base_weights or ("demo" if self.weights == "demo" else None)
        return {"turbo": self.weights, **({"base": base} if base else {})}

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


class Deployment(BaseSettings):
    """What `modal deploy` reads besides: the machines. Same prefix, same place in the README."""

    model_config = SettingsConfigDict(env_prefix="ZIMAGE_")

    weights: str = Field(
        "Tongyi-MAI/Z-Image-Turbo", description="Hub id[@revision]; pin the revision."
    )
    gpu: Annotated[tuple[str, ...], NoDecode] = Field(
        ("H100", "H200", "A100-80GB"), description="GPU types in order of preference."
    )
    snapshot: Literal["gpu", "cpu", "off"] = Field(
        "cpu", description="Container snapshot: gpu (alpha at Modal), cpu or off."
    )
    snapshot_key: str = Field(
        "", description="Any text; another one has a new snapshot taken at the next deploy."
    )
    hub_secret: str = Field(
        "",
        description="Modal secret with the HF_TOKEN (and, if there is one, the HF_ENDPOINT) that weights "
        "and LoRA repositories are downloaded with.",
    )
    min_containers: int = Field(0, ge=0, description="GPU containers kept although idle.")
    buffer_containers: int = Field(0, ge=0, description="Spare GPU containers while any is busy.")
    max_containers: int = Field(10, ge=1, description="GPU containers at most.")
    concurrency: int = Field(
        4, ge=1, le=8, description="Requests in a GPU container: one has the GPU, others its CPU."
    )
    scaledown_window: int = Field(
        60, ge=2, le=3600, description="Seconds an idle GPU container is kept."
    )
    warm_up: str = Field(
        "1024x1024",
        pattern=r"^\d+x\d+(,\d+x\d+)*$",
        description="Sizes warmed up, WIDTHxHEIGHT[,…].",
    )

    @field_validator("gpu", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @property
    def warm_up_sizes(self) -> list[tuple[int, int]]:
        pairs = (part.split("x") for part in self.warm_up.split(","))
        return [(int(width), int(height)) for width, height in pairs]


class SettingsError(ValueError):
    """A setting has a value it cannot have; the message names the environment variable."""


S = TypeVar("S", bound=BaseSettings)


def read(settings: type[S], **overrides: object) -> S:
    """Settings from the environment, where `overrides` that are not None win. Raises SettingsError."""
    try:
        given: dict[str, Any] = {k: v for k, v in overrides.items() if v is not None}
        return settings(**given)
    except ValidationError as error:
        problems = (
            f"ZIMAGE_{'.'.join(map(str, item['loc'])).upper()}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        raise SettingsError("; ".join(problems)) from None


def describe(settings: type[BaseSettings] = Settings) -> str:
    """All settings as text, for `--help` and the README."""
    lines = ["Settings from the environment:"]
    for name, field in settings.model_fields.items():
        default = field.default
        shown = "" if default in (None, ()) or isinstance(default, SecretStr) else f" [{default}]"
        lines.append(f"- `ZIMAGE_{name.upper()}`{shown}: {field.description}")
    return "\n\n".join(lines)
