"""The ground: text to tokens and back, with chat templates. Imports nothing of accord but ``errors``."""
