"""The small world: scenes, painter, exact judge, simulated users, and a Stable Diffusion that draws it."""
