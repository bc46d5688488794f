"""Marks of tests that need what a machine or a build may lack."""

import pytest

from peftkern import _native

needs_kernels = pytest.mark.skipif(not _native.loaded, reason="needs the compiled library")
