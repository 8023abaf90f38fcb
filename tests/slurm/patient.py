"""A reward that takes its time without using the processor: jobs that last on a busy machine."""

import time


def brightness(images, prompts, seconds=0.0):
    """Mean brightness of each image, in [0, 1]."""
    time.sleep(seconds)
    return images.float().mean((1, 2, 3)) / 255
