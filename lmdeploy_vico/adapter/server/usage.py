"""``usage.prompt_tokens_details.image_tokens``: how many of a prompt's tokens are visual."""

from collections.abc import Sequence

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lmdeploy_vico.adapter.handover import Span
from lmdeploy_vico.adapter.server.served import served_request

FIELD = 'image_tokens'


def show_image_tokens() -> None:
    """Add ``image_tokens`` to the usage that LMDeploy reports, 0 for prompts without images.

    Why: LMDeploy reports the length of a prompt, which does not tell a client how far its images were compressed.
    pydantic drops what a subclass adds, so the field is added to LMDeploy's class, and the classes that embed it are
    built again. Its value is read from the request that is served. Called when a ViCO model starts, so that
    other processes keep LMDeploy's JSON. Can go when LMDeploy counts image tokens. Idempotent.
    """
    from lmdeploy.serve.openai import protocol

    details = protocol.PromptTokensDetails
    if FIELD in details.model_fields:
        return
    details.model_fields[FIELD] = FieldInfo(annotation=int, default_factory=_image_tokens)
    with_usage = [
        model
        for model in vars(protocol).values()
        if isinstance(model, type) and issubclass(model, BaseModel) and 'usage' in model.model_fields
    ]
    for model in (details, protocol.UsageInfo, *with_usage):
        model.model_rebuild(force=True)


def count_image_tokens(spans: Sequence[Span]) -> None:
    """Note how many visual tokens the prompt of the request that is served has."""
    request = served_request()
    if request is not None:
        request.image_tokens = sum(map(len, spans))


def _image_tokens() -> int:
    request = served_request()
    return 0 if request is None else request.image_tokens
