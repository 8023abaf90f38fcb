"""A reward in ten lines: how colorful an image is (Hasler and Süsstrunk 2003, equation of M3).

``examples/colorfulness.yaml`` trains on it. Nothing of the package changes: a reward is a function
of images and prompts.
"""

import torch


def colorfulness(images, prompts, scale=100.0):
    """Score each image: 0 for gray, about 1 for the most colorful photographs.

    Args:
        images: uint8 tensor [n, 3, height, width].
        prompts: n strings; not used.
        scale: what M3 is divided by.

    Returns:
        n numbers.
    """
    red, green, blue = images.double().unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue]).flatten(2)  # [2, n, pixels]
    spread = opponents.std(2, correction=0).square().sum(0).sqrt()
    shift = opponents.mean(2).square().sum(0).sqrt()
    return (spread + 0.3 * shift) / scale
