"""What the reader answers, by how its tiles are compressed: the paper's Tables 1, 2 and 3 in small."""
