"""Prompts, completions, rankings and pairs as records, and the files they are read from. Imports from the ground."""
