"""The end of a server: its engine dies, or it is told to stop."""
