"""Experiments: arms and claims, records, the ledger, and the proof that records still stand."""
