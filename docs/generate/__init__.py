"""Documents generated from the code: settings, tables, commands, methods and their trees.

``python -m docs.generate`` writes them; a test keeps them in step.
"""
