"""``lmdeploy-vico bench``: first-token throughput of a served model, by how far its images are compressed.

A client of HTTP servers that needs neither LMDeploy nor torch, so that it can run on another machine than the server.
"""


class BenchError(RuntimeError):
    """The measurement cannot be made or cannot go on; the message says why in a sentence, and what to do."""
