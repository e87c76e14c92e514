"""How long a test waits for what is sure to come."""

HANG = 600  # seconds; only ends a test that hangs: no test passes or fails by how long something took
