"""Models that somebody else runs: asked, fine-tuned and recorded through the official `openai` client."""

from tunefork.hosted.services import HostedModel, find_model, is_hosted

__all__ = ["HostedModel", "find_model", "is_hosted"]
