"""The service: fal's protocol, fetching, jobs, keys, files. Imports no torch; meets the engine only
through `schemas.task`."""
