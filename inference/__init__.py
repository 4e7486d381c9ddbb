"""The engine: weights → tensors → pictures.

Knows tensors, pictures and tasks; no HTTP, no Modal, no prices.
"""
