"""A reward of one's own: how well an image shows the text that its prompt asks for.

Used by ``config/presets/sd35_medium_ocr.yaml``. The text is what stands between double quotes in
the prompt, as in Flow-GRPO's OCR task; ``tesseract`` (https://tesseract-ocr.github.io) must be on
PATH.
"""

import io
import subprocess

from PIL import Image


def similarity(images, prompts, program="tesseract"):
    """Score each image: 1 - (edit distance / length of the text), at least 0.

    Args:
        images: uint8 tensor [n, 3, height, width].
        prompts: n strings with the text in double quotes.
        program: the command that reads an image from standard input.

    Returns:
        n numbers in [0, 1]; NaN for a prompt that asks for no text.
    """
    scores = []
    for pixels, prompt in zip(images.permute(0, 2, 3, 1).cpu().numpy(), prompts, strict=True):
        parts = prompt.split('"')
        wanted = squeezed(parts[1]) if len(parts) > 2 else ""
        if not wanted:
            scores.append(float("nan"))
            continue
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        command = [program, "stdin", "stdout", "--psm", "11"]
        found = subprocess.run(command, input=buffer.getvalue(), capture_output=True, check=True)
        distance = edit_distance(wanted, squeezed(found.stdout.decode(errors="replace")))
        scores.append(max(0.0, 1.0 - distance / len(wanted)))
    return scores


def squeezed(text):
    """Lower case, without white space."""
    return "".join(text.lower().split())


def edit_distance(a, b):
    """Levenshtein's distance of two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
