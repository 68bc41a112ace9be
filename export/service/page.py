"""The page of `run-onnx --serve`, with its files and the bundle's, as routes."""

from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from numpy_ref.errors import PaliGemmaError, note

from .. import serve
from ..bundle import Bundle

BLOCK = 2**20


def page_routes(bundle: Bundle) -> list[Route]:
    """Everything that the page needs, and nothing else. Its libraries are there if npm has fetched them."""
    files = serve.files_of(bundle)

    def root(request: Request) -> Response:
        return RedirectResponse(serve.PAGE, headers=serve.HEADERS)

    def file(request: Request) -> Response:
        served = files[request.scope["path"]]
        if not serve.may_have(served, request.headers):
            return Response(status_code=403, headers=serve.HEADERS)
        opened = serve.opened_served(served)
        try:
            stream, size = opened.__enter__()
        except (OSError, PaliGemmaError) as error:
            note(f"serve-onnx: {served.file} is not served any more ({error})")
            return Response(status_code=404, headers=serve.HEADERS)

        def blocks(left=size) -> Iterator[bytes]:
            """As many bytes as were promised: a file that grows must not become the next answer."""
            while left and (block := stream.read(min(left, BLOCK))):
                yield block
                left -= len(block)

        return _File(blocks(), opened, headers=serve.headers_of(served, size))

    return [Route("/", root), *(Route(path, file) for path in files)]


class _File(StreamingResponse):
    """A file that is closed when it was sent, or could not be."""

    def __init__(self, blocks, opened, headers):
        super().__init__(blocks, headers=headers)
        self.opened = opened

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.opened.__exit__(None, None, None)
