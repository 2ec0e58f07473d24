import pytest

from support import Reference


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()
