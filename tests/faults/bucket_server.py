"""An S3 server that can be made to fail: `python -m tests.faults.bucket_server FOLDER PORT GOOD_PORT`.

The file `FOLDER/bucket` says what happens to requests at PORT: `refuse` answers 503, `forget` does what is asked and
answers 500. GOOD_PORT serves the same objects, and never fails.
"""

import sys
import threading
from pathlib import Path

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server


class Failing:
    """A WSGI application around another."""

    def __init__(self, application, flag: Path) -> None:
        self._application, self._flag = application, flag

    def __call__(self, environ, start_response):
        said = self._flag.read_text() if self._flag.exists() else ""
        if said == "refuse":
            environ["wsgi.input"].read()
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        if said == "forget" and environ["REQUEST_METHOD"] != "GET":
            b"".join(self._application(environ, lambda *_answer: None))
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return self._application(environ, start_response)


def main() -> None:
    folder, port, good_port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    application = DomainDispatcherApplication(create_backend_app)
    options = {"threaded": True, "request_handler": MotoRequestHandler}
    good = make_server("127.0.0.1", good_port, application, **options)
    threading.Thread(target=good.serve_forever, daemon=True).start()
    make_server("127.0.0.1", port, Failing(application, folder / "bucket"), **options).serve_forever()


if __name__ == "__main__":
    main()
