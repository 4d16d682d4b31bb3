"""Faults for whole runs: services that crash or freeze at named points, and a ledger kept outside them.

`points` wraps functions of the services of a run (`inject/sitecustomize.py` is on their path), `witness` writes down
what they were acknowledged, `judge` compares that with what the store and the trainer kept, `campaign` strikes.
"""
