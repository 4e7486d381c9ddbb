"""LitServe over a model that takes no time, one worker: `python litserve_no_op.py HOME PORT`."""

import sys
from typing import Any

import litserve
from answer import ANSWER


class NoOp(litserve.LitAPI):
    def setup(self, device: str) -> None:
        pass

    def decode_request(self, request: dict[str, Any]) -> str:
        return str(request["prompt"])

    def predict(self, prompt: str) -> dict[str, Any]:
        return ANSWER

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    server = litserve.LitServer(NoOp(), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[2]),
        log_level="warning",  # no access log, as with the others
        generate_client_file=False,
    )
