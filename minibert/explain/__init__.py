"""Looking at a model: which words made it say what it says, where its heads look, what each layer would guess; and, of
a fine-tuned one, what it gets wrong."""

from .attribution import integrated_gradients
from .evaluation import render_evaluation
from .explanation import Explanation, Word, explain
from .page import render

__all__ = ["Explanation", "Word", "explain", "integrated_gradients", "render", "render_evaluation"]
