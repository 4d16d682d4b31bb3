"""Malformed requests, made from their descriptors: what a broken or hostile client may send."""
