"""The toy world: colored shapes on 32x32 images, their prompts, verifier and shipped models.

`prompts`, `shapes` and `verifier` need numpy only. What lies in `assets/toy` is trained by the rule
`toy_world` (workflow/scripts).
"""
