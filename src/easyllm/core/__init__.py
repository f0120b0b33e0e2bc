"""Foundations for all other packages: errors, configuration, progress, manifests and devices."""
