"""Responses of `/v1/models`."""

import msgspec


class Model(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int  # Unix time at which the server started, seconds
    owned_by: str = "hetis"
    root: str  # the model that is served under this name
    parent: None = None
    max_model_len: int | None  # tokens of a prompt and its output; null until the fleet is up


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[Model]
