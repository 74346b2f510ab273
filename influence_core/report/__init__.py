"""One HTML page that shows what scores say: which sequences, which tokens, which layers.

content.py is what the page says, made by queries.py and overview.py; render.py and templates/ are how it looks.
"""
