"""The mathematics: schedule, entropy, plan, tree, executor, advantage, loss.

Pure functions over explicit arrays. No files, no network, no configuration objects.
``schedule``, ``noise``, ``entropy``, ``plan`` and ``tree`` need no torch.
"""
