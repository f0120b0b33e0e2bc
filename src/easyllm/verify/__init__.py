"""Numerical self-checks: invariants that must hold, measured on a user's own checkpoint."""

from easyllm.verify.laws import Finding, verify

__all__ = ["Finding", "verify"]
