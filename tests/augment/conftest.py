import jax
import pytest
from augment.fake_batch import make_batch


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture
def key():
    return jax.random.key(7)
