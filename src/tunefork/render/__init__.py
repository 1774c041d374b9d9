"""The one path from an Example to token ids and what is trained: training, evaluation, generation and export use it."""

from tunefork.render.rendered import Rendered
from tunefork.render.renderer import Renderer
from tunefork.tasks.base import MASK

__all__ = ["MASK", "Rendered", "Renderer"]
