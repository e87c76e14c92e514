"""That prompts share device batches and get their own tokens, for any encoder."""

import threading

import torch

from lmdeploy_vico.stage.stage import VisionStage


def require_shared_batches(encoder, alone_in_prompt, job, pictures, monkeypatch):
    """Let prompts meet in the queue of a stage whose ``encoder`` takes four tiles a batch.

    Args:
        encoder: of the stage's device.
        alone_in_prompt: encodes the images of one prompt by themselves.
        job: makes an ImageJob of a picture and the most tiles that it may have.
    """
    large, small = ('coffee', 'rocket'), ('chelsea', 'astronaut', 'text')
    alone = [alone_in_prompt([pictures[name]], 'none')[0] for name in large]
    entered, release, sizes = threading.Event(), threading.Event(), []

    def start(tiles):
        entered.set()
        release.wait()
        sizes.append(len(tiles))
        return encode(tiles)

    encode = encoder.start
    monkeypatch.setattr(encoder, 'start', start)
    stage = VisionStage([encoder], torch.float32, threads=1, capacity=200)
    first = stage.submit([job(pictures['page'], 1)], 'none')
    entered.wait()  # in a batch of its own, since a lone request does not wait for company
    others = [stage.submit([job(pictures[name])], 'none') for name in large]
    others += [stage.submit([job(pictures[name], 1)], 'none') for name in small]
    last = stage._prepare.submit(lambda: None)
    last.result()  # the only thread has cut everything by now
    release.set()
    for future, expected in zip(others, alone, strict=False):
        assert torch.equal(future.result()[0].tokens.embeddings, expected.embeddings)
    assert [len(future.result()) for future in (first, *others)] == [1] * 6
    rest = sum(len(image.tile_tokens) for image in alone) + len(small)
    assert sizes == [1] + [4] * (rest // 4) + [rest % 4] * (rest % 4 > 0)
    stage.close()
