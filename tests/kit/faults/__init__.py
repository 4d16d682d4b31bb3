"""Faults for whole runs: services that crash or freeze at named points, and a ledger kept outside them.

`points` wraps functions of the services of a run (`inject/sitecustomize.py` is on their path), `witness` writes down
what they were acknowledged, `judge` compares that with what the store and the trainer kept. `rounds` strikes one run,
`rivals` gives one a second trainer, `campaign` does both until every victim has had its share; `matrix` is the claim.
"""
