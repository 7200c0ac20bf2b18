"""Routes that list the models: the services, and the routes between versions, that the key may call."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from millstream.broker.contract.errors import UnknownService
from millstream.broker.contract.job import Json
from millstream.gateway.api.bodies import write_answer
from millstream.gateway.api.state import gateway_of, key_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    names = await gateway_of(request).models.get()
    key = key_of(request)
    found = [_model(name) for name in names if key.allows(name)]
    return await write_answer(lambda: {"object": "list", "data": found})


@router.get("/v1/models/{name}")
async def show_model(request: Request, name: str) -> Response:
    if name not in await gateway_of(request).models.get() or not key_of(request).allows(name):
        raise UnknownService(f"no service {name[:80]!r}")
    return await write_answer(lambda: _model(name))


def _model(name: str) -> dict[str, Json]:
    # Nobody notes when a service was registered first.
    return {"id": name, "object": "model", "created": 0, "owned_by": "millstream"}
