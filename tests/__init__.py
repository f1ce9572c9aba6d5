"""Tests; a package, so that one test file can use what another defines (`tests.core.cache.policy_contract`)."""
