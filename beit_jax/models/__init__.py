"""Architectures only: no loss, no configuration object."""
