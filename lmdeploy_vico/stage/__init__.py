"""Many requests to device batches: preparation threads and the encoding worker, no LMDeploy."""
