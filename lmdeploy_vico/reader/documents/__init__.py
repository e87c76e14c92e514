"""Documents rendered on the fly: pictures of several tiles, with questions whose answers are known."""
