"""``usage.prompt_tokens_details.image_tokens``: how many of a prompt's tokens are visual."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lmdeploy_vico.adapter.server.disconnect import served_request

FIELD = 'image_tokens'


def show_image_tokens() -> None:
    """Add ``image_tokens`` to the usage that LMDeploy reports, 0 for prompts without images.

    Why: LMDeploy reports the length of a prompt, of which a client cannot tell how far its images were compressed.
    pydantic drops what a subclass adds, so the field is added to LMDeploy's class and the classes that embed it are
    built again; its value is read from the request that is being served. Called when a ViCO model starts, so that
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


def count_image_tokens(spans: Sequence[Mapping[str, Any]]) -> None:
    """Note the visual tokens of the prompt of the request that is being served; ``spans`` as it is handed on."""
    request = served_request()
    if request is not None:
        request.image_tokens = sum(span['end'] - span['start'] for span in spans)


def _image_tokens() -> int:
    request = served_request()
    return 0 if request is None else request.image_tokens
