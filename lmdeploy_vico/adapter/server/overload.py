"""What a client is told when the vision stage cannot take its images now: 503, and when to try again."""

from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

RETRY_AFTER = 1  # seconds; the stage encodes hundreds of tiles in that time


class OverloadError(RequestError):
    """The request is right and may succeed later; answered with 503 and ``Retry-After``."""

    retry_after = RETRY_AFTER

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.ENGINE_UNAVAILABLE, message)
