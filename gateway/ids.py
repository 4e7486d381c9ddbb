"""Ids of requests."""

from __future__ import annotations

from uuid_utils import uuid7


def new_id() -> str:
    """Those that come together are neighbours in an index; random ones would each write a page."""
    return str(uuid7())
