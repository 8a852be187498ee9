"""The command line.

Exit codes:

| code | means |
|---|---|
| 0 | done |
| 1 | it could not be done; standard error says why, and what to do next |
| 2 | wrong usage: an option or argument that there is not, or a bad value |
| 3 | no server answers, or it has no worker yet |
| 4 | done, and the answer is no: other numbers, a damaged part, a job that did not succeed |
| 130 | Ctrl-C; what is done stays, and the same command goes on from there |
"""

from layerstack.cli.app import app, main

__all__ = ["app", "main"]
