"""E-GRPO: which denoising steps should reinforcement learning explore?"""

__version__ = "0.1.0"
