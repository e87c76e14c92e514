"""See what a checkpoint's router does with pictures."""


class InspectionError(ValueError):
    """Something that was given cannot be shown; the message is a sentence that says why."""
