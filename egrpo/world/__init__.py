"""The toy world: coloured shapes on 32x32 images, their prompts, verifier and shipped models.

`prompts`, `shapes` and `verifier` need numpy only. `recipe` trains what lies in `assets/toy`.
"""
