"""An answer in one piece."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import Response


class JsonReply(Response):
    """A reply as JSON."""

    def __init__(self, reply: BaseModel, status: int = 200):
        super().__init__(to_json(reply), status, media_type="application/json")
