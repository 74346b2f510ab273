"""pytest -p tests.pretended.plugin: tests marked `gpu` have a pretended CUDA device."""

import pytest

from tests.pretended import library

library.load()


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Files that ask for a device when they are imported find one."""
    from tests.pretended.device import pretended_cuda

    with pretended_cuda():
        return (yield)


@pytest.fixture
def cuda():
    """The device; what it noted."""
    from tests.pretended.device import pretended_cuda

    with pretended_cuda() as device:
        yield device


@pytest.fixture(autouse=True)
def _device_of_gpu_tests(request):
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("cuda")
