"""The wire: request and response models, the endpoint table, sizes, errors, and the two plain
dataclasses (`Task`, `Result`) that gateway and engine exchange. Imports pydantic and nothing heavier."""
