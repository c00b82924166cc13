"""Layers of the mixture-of-experts family."""
