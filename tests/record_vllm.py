"""Record what a real vLLM answers to the tests' requests.

    python -m tests.record_vllm http://127.0.0.1:8811/v1
    python -m tests.record_vllm http://127.0.0.1:8811/v1 prefixes

The server must serve the bundled SmolLM2 under the name `smollm2` in float32:
vllm serve ~/.cache/specrag/models/smollm2 --served-model-name smollm2 --dtype float32 --port 8811
For `prefixes` (tests/test_shared_prefix.py), it must have been started just before, with the options
--enable-prompt-tokens-details --block-size 32
"""

from __future__ import annotations

import sys

import httpx
import pytest

from tests.servers import PREFIXES, RECORDING, recording_proxy


def main() -> int:
    version = httpx.get(sys.argv[1].removesuffix("/v1") + "/version").json()
    facts = {"server": "vLLM", **version, "model": "bundled SmolLM2-135M-Instruct, float32"}
    if sys.argv[2:] == ["prefixes"]:
        with recording_proxy(sys.argv[1], PREFIXES, facts) as url:
            return int(pytest.main(["-q", "tests/test_shared_prefix.py", "-k", "vllm", "--vllm-url", url]))
    with recording_proxy(sys.argv[1], RECORDING, facts) as url:
        return int(
            pytest.main(["-q", "tests/test_openai_lm.py", "tests/test_docs.py", "-k", "vllm", "--vllm-url", url])
        )


if __name__ == "__main__":
    sys.exit(main())
