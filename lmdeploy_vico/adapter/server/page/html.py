"""The page itself: one file without anything from elsewhere, which knows nothing until its user gives it a key."""

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

PATH = '/vico'
FILE = Path(__file__).with_name('page.html')
_INLINE = r'<{tag}>(.*?)</{tag}>'


@cache
def page() -> bytes:
    """The page, UTF-8."""
    return FILE.read_bytes()


@cache
def headers() -> Mapping[str, str]:
    """What the page is sent with: it runs and shows what is in it, talks to its own server, and cannot be framed."""
    policy = {
        'default-src': "'none'",
        'script-src': _hash('script'),
        'style-src': _hash('style'),
        'img-src': 'blob: data:',
        'connect-src': "'self'",
        'base-uri': "'none'",
        'form-action': "'none'",
        'frame-ancestors': "'none'",
    }
    return {
        'Content-Security-Policy': '; '.join(f'{name} {value}' for name, value in policy.items()),
        'Cache-Control': 'no-cache',
        'Referrer-Policy': 'no-referrer',
        'X-Content-Type-Options': 'nosniff',
    }


def _hash(tag: str) -> str:
    """The source expression that allows the one element of this name."""
    [content] = re.findall(_INLINE.format(tag=tag), page().decode(), re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
