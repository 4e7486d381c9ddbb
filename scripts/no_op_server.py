"""The service over an engine that takes no time: what is left is the gateway. For measurements and tests.

python scripts/no_op_server.py HOME PORT
"""

from __future__ import annotations

import sys
from ipaddress import ip_network
from pathlib import Path

import uvicorn
from PIL import Image

from gateway.app import create_app
from gateway.auth import keys_for
from gateway.platforms.local import LocalPlatform
from gateway.services import OnProgress
from gateway.settings import Settings
from media.encode import encode
from schemas.task import EncodedImage, Result, Task

FILE = encode(Image.new("RGB", (64, 64)), "png")


async def generate(task: Task, on_progress: OnProgress) -> Result:
    images = tuple(EncodedImage(FILE, False) for _ in range(task.num_images))
    return Result(images, task.seed, task.prompt, 0, {"inference": 0.0})


def main(home: Path, port: int) -> None:
    settings = Settings(home=home, fetch_allow=(ip_network("127.0.0.0/8"),))
    platform = LocalPlatform(settings, generate)
    app = create_app(settings, platform, keys_for(settings, default="off"))
    uvicorn.run(app, port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
