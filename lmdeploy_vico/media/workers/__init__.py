"""Processes that decode, and who gives them work."""
