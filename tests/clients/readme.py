"""The README's lines for clients, so that the lines people copy are the lines the tests run."""

from __future__ import annotations

import re

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
HOST = "you--zimage.modal.run"


def block(word: str, url: str) -> str:
    """The one program in Python that contains a word, with a server's URL in place of the example's."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (found,) = (each for each in blocks if word in each)
    return found.replace(f"https://{HOST}", url)


def pointing(client: str, url: str) -> list[str]:
    """The pieces of code in a client's row, with a server's URL in place of the example's."""
    (row,) = (line for line in README.splitlines() if line.startswith(f"| {client} |"))
    pieces = re.findall(r"`([^`]+)`", row)
    host = url.partition("://")[2]
    return [piece.replace(f"https://{HOST}", url).replace(HOST, host) for piece in pieces]
