"""A hook of mkdocs: what becomes of links that leave `docs/`, such as `../examples/driver.py`, on the site.

On GitHub they lead to the file. The site has no such file, so they lead to the repository that `extra.repository` of
mkdocs.yml names, or are plain text if it names none.
"""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig

_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\(\.\./(?P<path>[^)\s]+)\)")
_BRANCH = "main"


def on_page_markdown(markdown: str, *, config: MkDocsConfig, **_others: object) -> str:
    """Return the text of a page with its links out of `docs/` replaced."""
    repository = (config.extra["repository"] or "").rstrip("/")
    return _LINK.sub(rf"[\g<text>]({repository}/blob/{_BRANCH}/\g<path>)" if repository else r"\g<text>", markdown)
