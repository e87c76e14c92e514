"""What came of it: results of each cell, where the time went, the tables, and the numbers of the paper."""
