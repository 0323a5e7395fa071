"""Offline work around the live path: the command line, cards, census, scales."""
