"""Exit with status 0 if a URL returns a status below 400 and a text without "failure" and "unhealthy"."""

import sys
import urllib.error
import urllib.request


def is_healthy(url: str, seconds: float = 5.0) -> bool:
    """Whether the URL responds as healthy; the request bypasses proxies."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=seconds) as response:
            text = response.read(1000).decode(errors="replace").lower()
    except (urllib.error.URLError, OSError):
        return False
    return "failure" not in text and "unhealthy" not in text


if __name__ == "__main__":
    sys.exit(0 if is_healthy(sys.argv[1]) else 1)
