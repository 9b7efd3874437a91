"""igpo: reinforcement learning for masked-diffusion language models.

`igpo.ops` needs torch and numpy only; everything else comes with `pip install igpo[train]`.
"""

__version__ = "0.1.0"
