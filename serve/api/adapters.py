"""vLLM's endpoints for roles that come and go: POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from __future__ import annotations

import asyncio
import stat
import warnings
from pathlib import Path

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from lragent.adapter_set import AdapterSet, UnknownBaseWarning, check_role_name
from lragent.errors import UserError
from lragent.pack import read_pack
from lragent.peft_io import CONFIG, WEIGHTS, read_peft_folder
from lragent.serve.api.access import must_be_admin
from lragent.serve.api.body import read_json
from lragent.serve.api.context import Context
from lragent.serve.api.errors import ApiError, shown
from lragent.serve.api.openapi import answers, body_of
from lragent.serve.api.schema import Flag, Label, parse_body


class LoadRequest(BaseModel):
    """lora_path: a PEFT folder, or a pack that holds the role, in the server's folder of roles."""

    lora_name: Label
    lora_path: Label
    load_inplace: Flag | None = None
    """Replace a role of that name."""


class UnloadRequest(BaseModel):
    """lora_name: of a loaded role."""

    lora_name: Label


def adapters_router(context: Context) -> APIRouter:
    """Both endpoints, over `context`."""
    router = APIRouter()
    loading = asyncio.Lock()
    done = answers(plain={"type": "string"})

    @router.post("/v1/load_lora_adapter", response_model=None, openapi_extra=body_of(LoadRequest) | done)
    async def load_lora_adapter(request: Request) -> Response:
        folder = _allowed(request, context)
        asked = parse_body(LoadRequest, await read_json(request, context.settings.max_body_bytes))
        name, service = asked.lora_name, context.service
        try:
            check_role_name(name)
        except UserError as error:
            raise UserError(f"lora_name: {error}.") from None
        async with loading:  # one at a time: each takes memory, and the names must not change meanwhile
            if not asked.load_inplace and name in [card.name for card in service.roles]:
                raise UserError(f"lora_name: {name!r} is loaded already; send `load_inplace: true` to replace it.")
            path = await asyncio.to_thread(find, folder, asked.lora_path)

            def prepare() -> None:
                adapters, role = read_role(path, name)
                prepared = service.prepare_role(adapters, role, name=name, root=str(path))
                service.load_role(prepared).result()

            try:
                await asyncio.to_thread(prepare)
            except UserError as error:
                said = str(error).replace(str(folder) + "/", "")
                raise UserError(said if said.startswith("lora_") else f"lora_path: {said}") from None
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_model=None, openapi_extra=body_of(UnloadRequest) | done)
    async def unload_lora_adapter(request: Request) -> Response:
        _allowed(request, context)
        asked = parse_body(UnloadRequest, await read_json(request, context.settings.max_body_bytes))
        async with loading:
            if asked.lora_name not in [card.name for card in context.service.roles if card.parent is not None]:
                raise ApiError(
                    404, f"lora_name: {asked.lora_name!r} is not loaded.", param="lora_name", code="model_not_found"
                )
            await asyncio.wrap_future(context.service.unload_role(asked.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return router


def _allowed(request: Request, context: Context) -> Path:
    """The folder from which roles may be loaded. Raises ApiError where that is not allowed."""
    must_be_admin(request)
    folder = context.settings.roles_folder
    if folder is None:
        raise ApiError(
            403,
            "Roles are not loaded or unloaded while this server runs; start it with --roles-folder DIR to allow it.",
            code="not_allowed",
        )
    return folder.resolve()


def find(folder: Path, given: str) -> Path:
    """The PEFT folder or pack that `given` names inside `folder`, a resolved path. Raises UserError for anything else:
    what lies outside, links that lead out, and what is neither a file nor a folder."""
    if "\0" in given or "://" in given:
        raise UserError(f"lora_path: must be a path inside the server's folder of roles, not {shown(given)}.")
    try:
        path = (folder / given).resolve(strict=True)
    except (OSError, RuntimeError):
        raise ApiError(
            404, f"lora_path: {shown(given)} is not in the server's folder of roles.", param="lora_path"
        ) from None
    if path == folder or not path.is_relative_to(folder):
        raise UserError(f"lora_path: {shown(given)} is not inside the server's folder of roles.")
    files = [path]
    if path.is_dir():
        files = [path / CONFIG, path / WEIGHTS]
        if not all(each.exists() for each in files):
            raise UserError(f"lora_path: {shown(given)} is no PEFT folder: it needs {CONFIG} and {WEIGHTS}.")
    for each in files:
        real = each.resolve()
        if not real.is_relative_to(folder) or not stat.S_ISREG(real.stat().st_mode):
            raise UserError(f"lora_path: {shown(given)} is neither a pack nor a PEFT folder of regular files.")
    return path


def read_role(path: Path, name: str) -> tuple[AdapterSet, str]:
    """What `path` holds, and which of its roles `name` is: the one of that name, or the only one.

    Raises UserError where the file is damaged, is no pack, or holds several roles of other names.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownBaseWarning)  # the server's owner has put it there
        if path.is_dir():
            return read_peft_folder(path, name), name
        adapters = read_pack(path)
    if name in adapters.role_names or len(adapters.roles) > 1:
        adapters.role_index(name)
        return adapters, name
    return adapters, adapters.role_names[0]
