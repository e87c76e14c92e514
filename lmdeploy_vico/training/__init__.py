"""Makes a plain InternVL checkpoint a ViCO checkpoint: consistency training and router training (paper, 3.1 and 3.2).

The model is the vision side of :mod:`lmdeploy_vico.vision` and the language model of ``transformers``. Nothing here
knows of LMDeploy; what comes out is the published layout, which a server takes as it is.
"""


class TrainingError(Exception):
    """Training cannot begin or go on; the message is a sentence that says why."""


class CommonError(TrainingError):
    """The same, found by all processes of a run together: one of them has to say it."""
