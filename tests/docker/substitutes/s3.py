"""moto's S3 on port 9000, which answers /healthz as SeaweedFS does. Other arguments are ignored."""

from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

store = DomainDispatcherApplication(create_backend_app)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/healthz":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"ok"]
    return store(environ, start_response)


if __name__ == "__main__":
    run_simple("0.0.0.0", 9000, application, threaded=True)
