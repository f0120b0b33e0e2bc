"""Foundations every other folder stands on: errors, configuration, progress, manifests, devices."""
