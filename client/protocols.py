"""The two protocols behind one set of methods, on tritonclient. They live on one event loop's thread.

gRPC goes through tritonclient's thread-safe client, whose calls are bridged to the loop: grpc.aio logs
errors of its own when a process has more than one event loop (grpc issue 25364). HTTP is aiohttp.
Every failure leaves here as RequestFailed with gRPC's status names.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from lightseq_client.errors import INTERNAL, INVALID_ARGUMENT, UNAVAILABLE, RequestFailed
from lightseq_client.signature import Signature

DEFAULT_URLS = {"grpc": "localhost:8001", "http": "localhost:8000"}
CONTROL_TIMEOUT = 5.0  # seconds for a question about health or metadata
Outputs = dict[str, np.ndarray]
Sides = Sequence[np.ndarray]  # one array, or sources and targets
HTTP_STATUS = {
    "400": INVALID_ARGUMENT,
    "403": "PERMISSION_DENIED",
    "404": "NOT_FOUND",
    "499": "CANCELLED",
    "500": INTERNAL,
    "501": "UNIMPLEMENTED",
    "503": UNAVAILABLE,
}


class Grpc:
    def __init__(self, url: str, admin_key: str | None):
        from tritonclient import grpc

        self._triton = grpc
        self._admin = {"triton-grpc-protocol-admin-key": admin_key} if admin_key else None
        self._client = grpc.InferenceServerClient(url)

    async def live(self) -> bool:
        return await self._call(self._client.is_server_live)

    async def ready(self) -> bool:
        return await self._call(self._client.is_server_ready)

    async def model_ready(self, model: str) -> bool:
        return await self._call(self._client.is_model_ready, model)

    async def metadata(self, model: str) -> dict[str, Any]:
        return await self._call(self._client.get_model_metadata, model, as_json=True)

    async def config(self, model: str) -> dict[str, Any]:
        return (await self._call(self._client.get_model_config, model, as_json=True))["config"]

    async def index(self) -> list[dict[str, str]]:
        answer = await self._call(self._client.get_model_repository_index, headers=self._admin, as_json=True)
        return answer.get("models", [])

    async def infer(self, model: str, tensors: Signature, sides: Sides, parameters: Mapping[str, Any]) -> Outputs:
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if done.done():  # given up, by a time limit or by the caller
                return
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        def arrived(result: Any, error: Exception | None) -> None:  # called on a thread of gRPC's
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        given = inputs_of(self._triton, tensors, sides)
        async with _plain_failures():
            call = self._client.async_infer(model, given, arrived, parameters=dict(parameters))
            try:
                return _outputs(await done, tensors.outputs(sides, parameters))
            except asyncio.CancelledError:
                call.cancel()
                raise

    async def close(self) -> None:
        self._client.close()

    async def _call(self, method: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        async with _plain_failures():
            return await asyncio.to_thread(method, *args, client_timeout=CONTROL_TIMEOUT, **keywords)


class Http:
    def __init__(self, url: str, admin_key: str | None, connections: int):
        from tritonclient.http import aio

        self._triton = aio
        self._admin = {"admin-key": admin_key} if admin_key else None
        # No time limit of its own: the caller has one for every request.
        self._client = aio.InferenceServerClient(url, conn_limit=connections, conn_timeout=None)

    async def live(self) -> bool:
        async with _plain_failures():
            return await self._client.is_server_live()

    async def ready(self) -> bool:
        async with _plain_failures():
            return await self._client.is_server_ready()

    async def model_ready(self, model: str) -> bool:
        async with _plain_failures():
            return await self._client.is_model_ready(model)

    async def metadata(self, model: str) -> dict[str, Any]:
        async with _plain_failures():
            return await self._client.get_model_metadata(model)

    async def config(self, model: str) -> dict[str, Any]:
        async with _plain_failures():
            return await self._client.get_model_config(model)

    async def index(self) -> list[dict[str, str]]:
        async with _plain_failures():
            return await self._client.get_model_repository_index(headers=self._admin)

    async def infer(self, model: str, tensors: Signature, sides: Sides, parameters: Mapping[str, Any]) -> Outputs:
        given = inputs_of(self._triton, tensors, sides)
        async with _plain_failures():
            return _outputs(
                await self._client.infer(model, given, parameters=dict(parameters)),
                tensors.outputs(sides, parameters),
            )

    async def close(self) -> None:
        await self._client.close()


def checked_url(url: str) -> str:
    """host:port as it stands; ValueError for anything else."""
    host, _, port = url.rpartition(":")
    if not host or "/" in url or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"url is {url!r}; it must be host:port, without a scheme or a path")
    return url


def inputs_of(protocol: Any, tensors: Signature, sides: Sides) -> list[Any]:
    """The sides as inputs of one of tritonclient's protocols, a module."""
    inputs = []
    for name, datatype, side in tensors.given(sides):
        inputs.append(protocol.InferInput(name, list(side.shape), datatype))
        inputs[-1].set_data_from_numpy(side)
    return inputs


@asynccontextmanager
async def _plain_failures() -> AsyncIterator[None]:
    """Turn what tritonclient, gRPC and aiohttp raise into RequestFailed."""
    from tritonclient.utils import InferenceServerException

    try:
        yield
    except InferenceServerException as error:
        code = (error.status() or INTERNAL).removeprefix("StatusCode.")
        raise RequestFailed(HTTP_STATUS.get(code, code), error.message() or "no reason given") from None
    except OSError as error:  # aiohttp's connection errors among them
        raise RequestFailed(UNAVAILABLE, str(error) or type(error).__name__) from None
    except Exception as error:
        if not type(error).__module__.startswith("aiohttp"):
            raise
        raise RequestFailed(UNAVAILABLE, str(error) or type(error).__name__) from None


def _outputs(result: Any, names: Iterable[str]) -> Outputs:
    arrays = {}
    for name in names:
        try:
            arrays[name] = result.as_numpy(name)
        except ValueError as error:  # bytes that do not fill the shape
            raise RequestFailed(INTERNAL, f"the model's answer has a broken output {name}: {error}") from None
        if arrays[name] is None:
            raise RequestFailed(INTERNAL, f"the model's answer lacks its output {name}")
    return arrays
