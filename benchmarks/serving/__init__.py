"""A served model: first-token throughput, hand-over of visual tokens, placement, and long runs."""
