"""Hostile requests against one tiny server: broken pictures and bodies, with known good requests between them."""
