"""Comparisons with stored or wanted numbers, and the run on a GPU machine that takes them."""
