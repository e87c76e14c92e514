"""The reader: a model of a few megabytes that answers rightly, and what it is asked about."""
