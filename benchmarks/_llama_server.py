"""Serve a GGUF file with llama.cpp's own server: PYTHON benchmarks/_llama_server.py FILE PORT NAME [THREADS]

PYTHON is that of an environment with the package xllamacpp, which is not one of this project's.
"""

import sys
import time

import xllamacpp


def main() -> None:
    file, port, name, threads = [*sys.argv[1:], "1"][:4]
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port = file, int(port)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 8192, 4, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(threads)
    settings.model_alias = {name}
    server = xllamacpp.Server(settings)
    while server is not None:
        time.sleep(3600)


if __name__ == "__main__":
    main()
