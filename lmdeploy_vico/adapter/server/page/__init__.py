"""The page at ``/vico``: pictures, what the router makes of them, answers side by side, and counters."""
