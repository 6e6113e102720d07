"""What pages of a list have in common: the link to the next one."""

from __future__ import annotations

from urllib.parse import urlencode

from fastapi import Request


def link_to_next(request: Request, cursor: str | int | None) -> dict[str, str]:
    """Return the header that leads to the next page, with the same filters; nothing on the last page."""
    if cursor is None:
        return {}
    query = [(name, value) for name, value in request.query_params.multi_items() if name != "after"]
    return {"Link": f'<{request.url.path}?{urlencode([*query, ("after", cursor)])}>; rel="next"'}
