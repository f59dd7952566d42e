"""A model folder in, an OpenAI-compatible HTTP server on Ray Serve out. `app.build_app` is the app without Ray.

May import: errors, tables, config, runs, models, data, generation, training, rewards,
actors, publish, votes, ppo.
Heavy packages: fastapi, ray, sqlalchemy.
"""

from rlhf_ray.serving.launch import Server, serve

__all__ = ["Server", "serve"]
