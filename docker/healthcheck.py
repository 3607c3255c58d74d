"""End with status 0 where the address answers with a status below 400 and without the word "failure" or "unhealthy"."""

import sys
import urllib.error
import urllib.request


def is_healthy(url: str, seconds: float = 5.0) -> bool:
    """One request of this machine's own service, past any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=seconds) as answer:
            text = answer.read(1000).decode(errors="replace").lower()
    except (urllib.error.URLError, OSError):
        return False
    return "failure" not in text and "unhealthy" not in text


if __name__ == "__main__":
    sys.exit(0 if is_healthy(sys.argv[1]) else 1)
