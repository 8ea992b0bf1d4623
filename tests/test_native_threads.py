"""The native engine's threads: several callers at once, and children of a fork."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from specrag.engine.blocks import BlockMatrix, Kind
from tests.native import needs_native

pytestmark = needs_native


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_several_callers_at_once_get_what_one_gets(three_threads):
    matrices = [BlockMatrix(kind, 300, 256).read_floats(torch.randn(300, 256)) for kind in (Kind.Q8_0, Kind.BF16)]
    x = torch.randn(9, 256)
    expected = [matrix.multiply(x) for matrix in matrices]
    begin = threading.Barrier(6)

    def work(i: int) -> bool:
        begin.wait()
        made = [matrices[i % 2].multiply(x) for _ in range(200)]
        return all(torch.equal(one, expected[i % 2]) for one in made)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


FORK = """
import os, sys, threading
import torch
from specrag.engine.blocks import BlockMatrix, Kind

torch.set_num_threads(3)
matrix = BlockMatrix(Kind.Q8_0, 300, 256).read_floats(torch.randn(300, 256))
x = torch.randn(5, 256)
expected = matrix.multiply(x)
stop = threading.Event()

def keep_busy():
    while not stop.is_set():
        matrix.multiply(x)

busy = threading.Thread(target=keep_busy)
busy.start()
for _ in range(20):  # forks while the other thread is somewhere inside the engine
    child = os.fork()
    if not child:
        os._exit(0 if all(torch.equal(matrix.multiply(x), expected) for _ in range(20)) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
stop.set()
busy.join()
assert torch.equal(matrix.multiply(x), expected)
print("done")
"""


def test_a_child_of_fork_multiplies_too():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr
