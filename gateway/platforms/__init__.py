"""Implementations of `gateway.platform.Platform`, chosen at start-up by a composition root."""
