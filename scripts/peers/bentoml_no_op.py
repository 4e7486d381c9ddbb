"""BentoML over a model that takes no time, one worker: `python bentoml_no_op.py HOME PORT`."""

import os
import sys
from pathlib import Path
from typing import Any

import bentoml
from answer import ANSWER


@bentoml.service(workers=1, logging={"access": {"enabled": False}}, metrics={"enabled": False})
class NoOp:
    @bentoml.api
    async def predict(
        self, prompt: str, image_size: dict[str, int], sync_mode: bool
    ) -> dict[str, Any]:
        return ANSWER


if __name__ == "__main__":
    home, port = sys.argv[1:]
    os.environ.update(BENTOML_HOME=home, BENTOML_DO_NOT_TRACK="true")
    os.chdir(Path(__file__).parent)
    serve = ("-m", "bentoml", "serve", "bentoml_no_op:NoOp", "--host", "127.0.0.1", "--port", port)
    os.execv(sys.executable, (sys.executable, *serve))
