"""A model folder in, an OpenAI-compatible HTTP server on Ray Serve out. The plain app (`app.build_app`) needs no Ray."""

from rlhf_ray.serving.launch import Server, serve

__all__ = ["Server", "serve"]
