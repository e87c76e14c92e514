"""Compression as an overload valve: how much the language model has to do, and what share of tiles that costs."""
