"""What can be asked for: registered models, known methods, and the schema of the report."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from service.api.deps import Here, Page, page
from service.api.errors import declared
from service.api.guard import Guarded, needs
from service.api.shapes import MethodObject, ModelObject, model_object
from service.domain.identity import Scope
from service.domain.report import Report
from service.store import models

router = APIRouter(prefix="/v1", tags=["catalogue"], route_class=Guarded)
public = APIRouter(prefix="/v1", tags=["catalogue"])


@router.get("/models", summary="Registered models", dependencies=[needs(Scope.JOBS_READ)], responses=declared(503))
def list_models(here: Here) -> Page[ModelObject]:
    with here.sessions.begin() as s:
        entries = models.every(s)
    return page([model_object(entry) for entry in entries], [entry.name for entry in entries], has_more=False)


@router.get(
    "/methods", summary="Methods and their hyperparameters", dependencies=[needs(Scope.JOBS_READ)], responses=declared()
)
def list_methods(here: Here) -> Page[MethodObject]:
    methods = here.catalog.methods
    data = [MethodObject(id=name, **method.model_dump()) for name, method in sorted(methods.items())]
    return page(data, sorted(methods), has_more=False)


class SchemaResponse(JSONResponse):
    media_type = "application/schema+json"


@public.get("/schemas/report", summary="JSON Schema of the report", response_class=SchemaResponse, responses=declared())
async def report_schema() -> SchemaResponse:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Report.model_json_schema(
        mode="serialization"
    )
    return SchemaResponse(schema)
