"""What operators ask: ``/health``, ``/ready``, ``/metrics``; and the page, ``/``."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import HTMLResponse, JSONResponse, Response

from specrag.serving.errors import busy
from specrag.serving.routes._common import StateOf

router = APIRouter()
_PAGE = Path(__file__).parent.parent / "page.html"


@router.get("/health")
async def health() -> dict[str, str]:
    """The process runs."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(state: StateOf) -> JSONResponse:
    """The models are loaded, and new requests are taken."""
    if state.draining:
        raise busy(503, "the server is stopping", "draining", 5.0)
    return JSONResponse({"status": "ready" if state.loaded else ""})


@router.get("/metrics")
async def metrics(state: StateOf) -> Response:
    """Prometheus's text."""
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/")
async def page() -> HTMLResponse:
    """A page to ask questions, which shows drafts and citations as they arrive."""
    text, policy = _page()
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})


@cache
def _page() -> tuple[str, str]:
    """The page, and the policy that lets it run its own script and style and nothing else."""
    text = _PAGE.read_text(encoding="utf-8")
    allowed = {
        tag: " ".join(f"'sha256-{_digest(part)}'" for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        for tag in ("script", "style")
    }
    return text, (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(part: str) -> str:
    return base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
