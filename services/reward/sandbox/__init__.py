"""Runs a Python program that a model wrote, with limits. No security boundary against hostile code."""
