"""The busiest paths go straight to their functions.

FastAPI documents them and would answer the same; its router, its middlewares and its exit stacks,
of which these functions use nothing, take longer than all that is done for a request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from schemas.errors import ApiError

Handler = Callable[[Request], Awaitable[Response]]
OnError = Callable[[Request, Exception], Awaitable[Response]]


class Direct:
    """`posts`: path → what answers a POST to it. Everything else is the app's."""

    def __init__(
        self, app: FastAPI, posts: Mapping[str, Handler], refused: OnError, broken: OnError
    ) -> None:
        self.app, self.posts, self.refused, self.broken = app, posts, refused, broken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        posted = scope["type"] == "http" and scope["method"] == "POST"
        handler = self.posts.get(scope["path"]) if posted else None
        if handler is None:
            return await self.app(scope, receive, send)
        scope["app"] = self.app
        request = Request(scope, receive, send)
        try:
            response = await handler(request)
        except ApiError as error:
            response = await self.refused(request, error)
        except Exception as error:
            response = await self.broken(request, error)
            await response(scope, receive, send)
            raise  # for the server's log
        return await response(scope, receive, send)
