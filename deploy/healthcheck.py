"""Ask an HTTP server in this container how it is: `healthcheck.py VARIABLE PORT PATH`; exit code 0 if it says 200.

Args:
    VARIABLE: environment variable that holds the port, if it is set.
    PORT: the port if it is not.
    PATH: such as /ready.
"""

import http.client
import os
import sys

variable, default, path = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get(variable) or default), timeout=4)
try:
    connection.request("GET", path)
    response = connection.getresponse()
except OSError as exc:
    sys.exit(f"{path}: {exc}")
print(response.status, response.read(500).decode(errors="replace"))
sys.exit(response.status != http.client.OK)
