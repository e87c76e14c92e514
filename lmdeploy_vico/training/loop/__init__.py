"""What every stage of training has in common: processes, sharding, the loop over steps, its state and its log."""
