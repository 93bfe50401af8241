import pytest
pytestmark = pytest.mark.gpu
def test_x(): pass
