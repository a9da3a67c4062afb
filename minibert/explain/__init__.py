"""Looking inside a model: which words made it say what it says, where its heads look, what each layer would guess."""

from .attribution import integrated_gradients
from .explanation import Explanation, Word, explain
from .page import render

__all__ = ["Explanation", "Word", "explain", "integrated_gradients", "render"]
