"""Names of a checkpoint's tensors: the part of the model that a tensor belongs to is how its name begins.

This module loads no torch.
"""

Shape = tuple[int, ...]

LANGUAGE_MODEL = 'language_model.'
VIT = 'vision_model.'
FULL_PROJECTOR = 'mlp1.'  # for tiles of 256 visual tokens
COMPRESSED_PROJECTOR = 'mlp2.'  # for tiles of 64
POOLING = 'pooling_before_gating.'  # the router's attention pooling
GATING = 'gating.'  # the router's classifier

FLASH = (COMPRESSED_PROJECTOR, POOLING, GATING)  # what a ViCO checkpoint has and a plain InternVL checkpoint has not
VISION = (VIT, FULL_PROJECTOR, *FLASH)

POOLING_STEPS = (1, 2, 3, 4)
# Steps 3 and 4 of the pooling use the weights of step 2. Checkpoints store weights for them that nothing reads.
UNUSED = tuple(f'{POOLING}{module}{step}.' for module in ('attn', 'norm') for step in (3, 4))
