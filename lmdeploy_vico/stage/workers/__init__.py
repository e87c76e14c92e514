"""What drives the devices of a stage. Today a worker is a thread beside the device; see :mod:`.protocol` for others."""
