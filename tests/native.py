"""What the tests of the native engine share."""

import pytest

from specrag.engine.native import library, unavailable

needs_native = pytest.mark.skipif(library() is None, reason=f"no native engine: {unavailable()}")
