"""`/v1/models`: the names under which the model is served."""

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hetis.server.errors import ApiError, shown
from hetis.server.protocol.models import Model, ModelList
from hetis.server.protocol.schemas import GET_ERRORS, answers
from hetis.server.writing import encode

if TYPE_CHECKING:
    from hetis.server.context import Server

router = APIRouter()


@router.get("/v1/models", responses=GET_ERRORS | answers(ModelList, "The names of the model."))
async def list_models(request: Request) -> Response:
    """The names under which the model is served; answers carry the first one where a request names none."""
    server: Server = request.app.state.server
    models = ModelList(data=[_model(server, name) for name in server.model_names])
    return Response(encode(models), media_type="application/json")


@router.get("/v1/models/{name:path}", responses=GET_ERRORS | answers(Model, "The model."))
async def get_model(request: Request, name: str) -> Response:
    """One of the names; it may have slashes."""
    server: Server = request.app.state.server
    return Response(encode(_model(server, served_name(server, name))), media_type="application/json")


def served_name(server: "Server", name: str | None) -> str:
    """The name of the model that a request means; None: the first one. Raises ApiError 404 for other models."""
    if name is None:
        return server.model_names[0]
    if name not in server.model_names:
        known = ", ".join(map(shown, server.model_names))
        raise ApiError(404, f"model is {shown(name)}, but this server has {known}.", "model", "model_not_found")
    return name


def _model(server: "Server", name: str) -> Model:
    llm = server.llm
    return Model(
        id=name,
        created=server.created,
        root=llm.config.model or server.model_names[0],
        max_model_len=llm.max_model_len if llm.is_ready else None,
    )
