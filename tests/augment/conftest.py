import jax
import pytest
from fake_batch import make_batch


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture
def key():
    return jax.random.key(7)
