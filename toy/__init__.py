"""The 2-D laboratory: the objectives of `dkto.losses` where the truth is known in closed form (paper 7)."""
