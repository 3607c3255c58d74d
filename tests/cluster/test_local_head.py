"""The demo's Ray refuses jobs without its token."""

import urllib.error
import urllib.request
from pathlib import Path

import pytest

from paml.distributed.local_head import ray_head


def _status(url: str, headers: dict[str, str]) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_jobs_need_the_token_of_the_head(tmp_path: Path):
    with ray_head(tmp_path, cpus=1) as found:
        assert found["RAY_AUTH_MODE"] == "token"
        jobs = f"{found['RAY_API_SERVER_ADDRESS']}/api/jobs/"
        assert jobs.startswith("http://127.0.0.1:")
        assert _status(jobs, {}) == 401
        assert _status(jobs, {"Authorization": f"Bearer {'0' * 64}"}) in (401, 403)
        assert _status(jobs, {"Authorization": f"Bearer {found['RAY_AUTH_TOKEN']}"}) == 200
