"""The fake GPU of the hosts' tests and the models of the cache contract, for the caches of this part."""

from tests.core.cache.conftest import make
from tests.core.conftest import fake_cuda

__all__ = ["fake_cuda", "make"]
